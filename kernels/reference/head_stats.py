"""Head and the statistics of its rows in one op."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.filter_rows import filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows


def head_stats(
    hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int, rows: SamplingRows
) -> tuple[Tensor, Tensor]:
    """What `head` gives, and what `filter_rows` gives for it with every filter off, bit for bit.

    hidden, weight, vocab_size: as in `head`
    rows:    `[R]`, of which temperature is read; 0 = greedy: T = 1 in the statistics
    returns  logits `[R, V]` fp32, and `[R, 4]` fp32: max, -inf, log-normaliser, error
    """
    logits = head(hidden, norm, weight, vocab_size)
    return logits, filter_rows(logits, rows.without_filters())
