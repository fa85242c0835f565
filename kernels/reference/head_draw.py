"""Head and draw in one op: the next token of each row without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.reference.sample_rows import sample_rows
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.statistics import STAT_ERROR


def head_draw(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    rows: SamplingRows,
    positions: Tensor,
    *,
    has_filters: bool = True,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """argmax_v(z_v / T + g_v) with the target's noise over the kept v, z = norm(hidden) W^T; greedy: argmax z.

    What `head`, `filter_rows` and `sample_rows` (target stream) give, bit for bit, with no logits returned.

    hidden:      `[R, D]` fp32
    weight, token_ids: as in `head`
    rows:        `[R]`, as in `filter_rows` and `sample_rows`
    positions:   `[R]` int32, the absolute position of the token being decided
    has_filters: False promises that no row has a filter
    returns      tokens `[R]` int32; errors `[R]` int32, 1 where a row holds a NaN or nothing finite
    """
    logits = head(hidden, norm, weight, vocab_size, token_ids=token_ids)
    stats = filter_rows(logits, rows if has_filters else rows.without_filters())
    base = torch.zeros_like(positions)
    tokens, _ = sample_rows(logits, stats, rows, positions, rng.STREAM_TARGET, base)
    return tokens, stats[:, STAT_ERROR].int()
