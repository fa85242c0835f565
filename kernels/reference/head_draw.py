"""Head and draw in one op: the next token of each row without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.reference.sample_rows import sample_rows
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.statistics import STAT_ERROR


def head_draw(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """argmax_v(z_v / T + g_v) with the target's noise over the kept v, z = LayerNorm(hidden) W^T; greedy: argmax z.

    What `head`, `filter_rows` and `sample_rows` (target stream) give, bit for bit, with no logits returned.

    hidden:      `[R, D]` fp32
    weight:      D -> at least vocab_size
    temperature: `[R]` fp32, 0 = greedy
    top_k, top_p, min_p: `[R]` int32, fp32, fp32, as in `filter_rows`; None, all three, where no row has a filter
    seeds:       `[R]` int64, the bits of the 64-bit seeds
    positions:   `[R]` int32, the absolute position of the token being decided
    returns      tokens `[R]` int32; errors `[R]` int32, 1 where a row holds a NaN or nothing finite
    """
    logits = head(hidden, norm, weight, vocab_size)
    off = torch.zeros_like(temperature)
    top_k = off.int() if top_k is None else top_k
    top_p = off + 1 if top_p is None else top_p
    min_p = off if min_p is None else min_p
    stats = filter_rows(logits, temperature, top_k, top_p, min_p)
    base = torch.zeros_like(positions)
    tokens, _ = sample_rows(logits, stats, temperature, seeds, positions, rng.STREAM_TARGET, base)
    return tokens, stats[:, STAT_ERROR].int()
