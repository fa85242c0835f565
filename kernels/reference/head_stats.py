"""Head and the statistics of its rows in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.reference.filter_rows import filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.types.packed import Norm, PackedLinear


def head_stats(
    hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """What `head` gives, and what `filter_rows` gives for it with every filter off, bit for bit.

    hidden, weight, vocab_size: as in `head`
    temperature: `[R]` fp32; 0 = greedy: T = 1 in the statistics
    returns      logits `[R, V]` fp32, and `[R, 4]` fp32: max, -inf, log-normaliser, error
    """
    logits = head(hidden, norm, weight, vocab_size)
    off = torch.zeros_like(temperature)
    return logits, filter_rows(logits, temperature, off.int(), off + 1, off)
