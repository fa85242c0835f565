"""Match verification: the target's own draw decides; a draft token survives if it is that draw."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.sample_rows import sample_rows
from specengine.kernels.types.statistics import STAT_ERROR


def match_verify(
    logits: Tensor,
    stats: Tensor,
    row_start: Tensor,
    num_draft: Tensor,
    draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    seq_len: Tensor,
    is_selected: Tensor,
    tokens: Tensor,
    num_accepted: Tensor,
    error: Tensor,
) -> None:
    """t_i = the target's draw at row i; n = the first i with x_i != t_i, else k_b; emits x_0 … x_{n-1}, t_n.

    Greedy (T = 0) draws the argmax, otherwise the Gumbel race on stream 0 at position seq_len[b] + i: what is
    emitted is what plain decoding with the same seed emits, whatever was drafted.

    logits:       `[R, V]` fp32; rows row_start[b] + i, i = 0 … num_draft[b], belong to sequence b; not written
    stats:        `[R, 4]` of `filter_rows`
    row_start:    `[B]` int32
    num_draft:    `[B]` int32, k_b in 0 … k
    draft_tokens: `[B, k]` int32, x
    temperature, seeds: `[B]` fp32, int64
    seq_len:      `[B]` int32, committed tokens: row i decides absolute position seq_len[b] + i
    is_selected:  `[B]` bool; the other rows of the outputs are left alone
    tokens:       `[B, k + 1]` int32, written up to column n
    num_accepted: `[B]` int32, written: n
    error:        `[B]` int32, written: 1 if a row that was used is not a distribution
    """
    for b in is_selected.nonzero()[:, 0].tolist():
        k = int(num_draft[b])
        rows = slice(int(row_start[b]), int(row_start[b]) + k + 1)
        positions = seq_len[b] + torch.arange(k + 1, device=logits.device, dtype=torch.int32)
        drawn, _ = sample_rows(
            logits[rows],
            stats[rows],
            temperature[b].expand(k + 1),
            seeds[b].expand(k + 1),
            positions,
            rng.STREAM_TARGET,
            torch.zeros_like(positions),
        )
        is_match = drawn[:k] == draft_tokens[b, :k]
        n = int(is_match.int().cumprod(dim=0).sum())
        tokens[b, : n + 1] = drawn[: n + 1]
        num_accepted[b] = n
        error[b] = stats[rows][: n + 1, STAT_ERROR].any().int()
