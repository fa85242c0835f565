"""What a batch's draws depend on, row by row instead of sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.types.rows import SamplingRows


def row_keys(
    rows: SamplingRows, q_start: Tensor, positions: Tensor, logit_rows: Tensor
) -> tuple[SamplingRows, Tensor]:
    """Row r decides the position after token logit_rows[r], for the sequence that this token belongs to.

    rows:       `[B]`, by sequence
    q_start:    `[B + 1]` int32, tokens q_start[b] … q_start[b + 1] - 1 belong to sequence b
    positions:  `[T]` int32
    logit_rows: `[R]` int64, ascending
    returns     the rows of `logit_rows`, `[R]`, and the positions that they decide, `[R]` int32
    """
    owner = torch.searchsorted(q_start, logit_rows.int(), right=True) - 1
    return rows.take(owner), positions[logit_rows] + 1
