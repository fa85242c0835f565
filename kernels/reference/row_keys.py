"""What the draws of a batch depend on, row by row instead of sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def row_keys(
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    q_start: Tensor,
    positions: Tensor,
    logit_rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row r decides the position after token logit_rows[r], for the sequence that this token belongs to.

    temperature, top_p, min_p: `[B]` fp32; top_k `[B]` int32; seeds `[B]` int64
    q_start:    `[B + 1]` int32, tokens q_start[b] … q_start[b + 1] - 1 belong to sequence b
    positions:  `[T]` int32
    logit_rows: `[R]` int64, ascending
    returns     the first five for each row, and the position that it decides, int32: `[R]` each
    """
    owner = torch.searchsorted(q_start, logit_rows.int(), right=True) - 1
    filters = (top_k[owner], top_p[owner], min_p[owner])
    return temperature[owner], *filters, seeds[owner], positions[logit_rows] + 1
