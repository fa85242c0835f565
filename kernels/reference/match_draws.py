"""`match_verify` where the target has drawn already, so that no logits need be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng


def match_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    row_start: Tensor,
    num_draft: Tensor,
    draft_tokens: Tensor,
    is_running: Tensor,
    tokens: Tensor,
    num_accepted: Tensor,
    error: Tensor,
    forced_acceptance: float | None = None,
    seeds: Tensor | None = None,
    seq_len: Tensor | None = None,
) -> None:
    """n = the first i with draws[row_start + i] != x_i, else k_b; emits x_0 … x_{n-1} and the draw of row n.

    drawn, drawn_error: `[R]` int32; rows row_start[b] + i, i = 0 … num_draft[b], are sequence b's
    row_start, num_draft: `[B]` int32
    draft_tokens: `[B, k]` int32, x
    is_running:   `[B]` int32; the other rows of the outputs are left alone
    tokens:       `[B, k + 1]` int32, written up to column n
    num_accepted: `[B]` int32, written: n
    error:        `[B]` int32, written: 1 if a row that was used is not a distribution
    forced_acceptance: for timing only: x_i is kept where uniform i of the acceptance stream (position seq_len + i,
                  base seq_len) is below this, whatever was drawn; needs seeds `[B]` int64 and seq_len `[B]` int32
    """
    for b in is_running.nonzero()[:, 0].tolist():
        k = int(num_draft[b])
        rows = slice(int(row_start[b]), int(row_start[b]) + k + 1)
        is_kept = drawn[rows][:k] == draft_tokens[b, :k]
        if forced_acceptance is not None:
            assert seeds is not None, "forced acceptance draws by seeds"
            assert seq_len is not None, "forced acceptance draws by seq_len"
            position = seq_len[b] + torch.arange(k, device=drawn.device, dtype=torch.int32)
            bits = rng.accept_bits(seeds[b].expand(k), position, seq_len[b].expand(k))
            is_kept = rng.uniform(bits) < forced_acceptance
        n = int(is_kept.int().cumprod(dim=0).sum())
        tokens[b, :n] = draft_tokens[b, :n]
        tokens[b, n] = drawn[rows][n]
        num_accepted[b] = n
        error[b] = drawn_error[rows][: n + 1].any().int()
