"""Head and draw in one op: the next token of each row without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.packed import Norm, PackedLinear
from specengine.kernels.reference.filter_rows import STAT_ERROR, filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.reference.sample_rows import sample_rows


def head_draw(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """argmax_v(z_v / T + g_v) with the target's noise, z = LayerNorm(hidden) W^T; greedy rows take argmax z.

    What `head`, `filter_rows` (no filter) and `sample_rows` (target stream) give, bit for bit, with nothing of
    the vocabulary's size stored.

    hidden:      `[R, D]` fp32
    weight:      D -> at least vocab_size
    temperature: `[R]` fp32, 0 = greedy
    seeds:       `[R]` int64, the bits of the 64-bit seeds
    positions:   `[R]` int32, the absolute position of the token being decided
    returns      tokens `[R]` int32; errors `[R]` int32, 1 where a row holds a NaN or nothing finite
    """
    logits = head(hidden, norm, weight, vocab_size)
    zero = torch.zeros_like(positions)
    stats = filter_rows(
        logits, temperature, zero, torch.ones_like(temperature), torch.zeros_like(temperature)
    )
    tokens, _ = sample_rows(logits, stats, temperature, seeds, positions, rng.STREAM_TARGET, zero)
    return tokens, stats[:, STAT_ERROR].int()
