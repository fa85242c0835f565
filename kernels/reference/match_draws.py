"""`match_verify` where the target has drawn already, so that no logits need be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows


def match_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    forced_acceptance: float | None = None,
) -> None:
    """n = the first i with draws[row_start + i] != x_i, else k_b; emits x_0 … x_{n-1} and the draw of row n.

    drawn, drawn_error: `[R]` int32
    drafts:     what is judged; their law is not read
    rows:       `[B]`, by sequence; whatever their rule is
    is_running: `[B]` int32
    verdict:    written for the sequences that run
    forced_acceptance: for timing only: x_i is kept where uniform i of the acceptance stream (position seq_len + i,
                base seq_len) is below this, whatever was drawn
    """
    for b in is_running.nonzero()[:, 0].tolist():
        k = int(drafts.num_draft[b])
        of_target = slice(int(drafts.row_start[b]), int(drafts.row_start[b]) + k + 1)
        is_kept = drawn[of_target][:k] == drafts.tokens[b, :k]
        if forced_acceptance is not None:
            seq_len = drafts.seq_len[b]
            position = seq_len + torch.arange(k, device=drawn.device, dtype=torch.int32)
            bits = rng.accept_bits(rows.seeds[b].expand(k), position, seq_len.expand(k))
            is_kept = rng.uniform(bits) < forced_acceptance
        n = int(is_kept.int().cumprod(dim=0).sum())
        verdict.tokens[b, :n] = drafts.tokens[b, :n]
        verdict.tokens[b, n] = drawn[of_target][n]
        verdict.num_accepted[b] = n
        verdict.error[b] = drawn_error[of_target][: n + 1].any().int()
