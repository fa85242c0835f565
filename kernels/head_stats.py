"""Logits and the statistics of their rows in one launch: rejection verification then needs no pass over the logits.

Each program leaves the maximum and the sum of exp(z - max) of its 128 tokens behind; the last of a row tile combines
them. See `specengine.kernels.reference.head_stats`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.head import TILE_TOKENS, check_head, logit_tile
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import chunk_of, count_rows
from specengine.kernels.device.noise import NEGATIVE_INFINITY, scale_logits
from specengine.kernels.device.race import check_columns
from specengine.kernels.device.statistics import group_share, group_sum, log_normaliser
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.device.workspace import scratch, zeroed
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows


@triton.jit
def _combine(maxima_ptr, sums_ptr, first, num_tiles, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum and log-normaliser `[BLOCK_M]` of rows whose tiles' `[num_tiles, BLOCK_M]` begin at `first`."""
    lanes = tl.arange(0, BLOCK_M)[:, None]
    largest = tl.full((BLOCK_M, BLOCK), NEGATIVE_INFINITY, tl.float32)
    for done in tl.range(0, num_tiles, BLOCK):
        tiles = done + tl.arange(0, BLOCK)[None, :]
        at = first + tiles * BLOCK_M + lanes
        maxima = tl.load(maxima_ptr + at, tiles < num_tiles, NEGATIVE_INFINITY, cache_modifier=".cg")
        largest = tl.maximum(largest, maxima)
    maximum = tl.max(largest, axis=1)
    shares = tl.zeros((BLOCK_M, BLOCK), tl.int64)
    for done in tl.range(0, num_tiles, BLOCK):
        tiles = done + tl.arange(0, BLOCK)[None, :]
        at = first + tiles * BLOCK_M + lanes
        maxima = tl.load(maxima_ptr + at, tiles < num_tiles, NEGATIVE_INFINITY, cache_modifier=".cg")
        sums = tl.load(sums_ptr + at, tiles < num_tiles, 0.0, cache_modifier=".cg")
        shares += group_share(sums, maxima, maximum[:, None])
    return maximum, log_normaliser(maximum, tl.sum(shares, axis=1))


@triton.jit(do_not_specialize=["num_rows"])
def spec_head_stats(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    temperature_ptr,
    logits_ptr,
    stats_ptr,
    maxima_ptr,
    sums_ptr,
    flags_ptr,
    counter_ptr,
    num_rows,
    num_rows_ptr,
    VOCAB_SIZE: tl.constexpr,
    ROW_LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_weight(weight_ptr, tl.minimum(tokens, VOCAB_SIZE - 1), 0, WEIGHT_STRIDE, PDL)
    wait(PDL)
    num_rows = count_rows(num_rows, num_rows_ptr)
    first_row = tl.program_id(1) * BLOCK_M
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    logits = logit_tile(
        hidden_ptr,
        hidden_stride,
        norm_weight_ptr,
        norm_bias_ptr,
        eps,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        first_row,
        num_rows,
        tokens,
        VOCAB_SIZE,
        WIDTH,
        WEIGHT_STRIDE,
        CHUNK,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(
        logits_ptr + rows[:, None].to(tl.int64) * ROW_LENGTH + tokens[None, :], logits, row_mask[:, None]
    )
    temperature = tl.load(temperature_ptr + rows, row_mask, other=0.0)
    scaled = scale_logits(logits, temperature[:, None])
    maximum = tl.max(scaled, axis=1)
    first = tl.program_id(1) * (tl.num_programs(0) * BLOCK_M)
    at = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(maxima_ptr + at, maximum)
    tl.store(sums_ptr + at, group_sum(scaled, maximum))
    has_nan = tl.max((logits != logits).to(tl.int32), axis=1)
    tl.atomic_max(flags_ptr + rows, has_nan, row_mask & (has_nan > 0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + tl.program_id(1), 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr + tl.program_id(1), 0)
        maximum, normaliser = _combine(maxima_ptr, sums_ptr, first, tl.num_programs(0), BLOCK_M, 64)
        flag = tl.atomic_xchg(flags_ptr + rows, tl.zeros((BLOCK_M,), tl.int32), row_mask, sem="relaxed")
        is_bad = (flag > 0) | (maximum == NEGATIVE_INFINITY)
        tl.store(stats_ptr + rows * 4, maximum, row_mask)
        tl.store(stats_ptr + rows * 4 + 1, tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32), row_mask)
        tl.store(stats_ptr + rows * 4 + 2, normaliser, row_mask)
        tl.store(stats_ptr + rows * 4 + 3, is_bad.to(tl.float32), row_mask)


def head_stats(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    rows: SamplingRows,
    *,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `specengine.kernels.reference.head_stats`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    num_tiles = ceil_div(check_head(hidden, weight, vocab_size), TILE_TOKENS)
    count, device = hidden.shape[0], hidden.device
    (temperature,) = check_columns(rows, count, "temperature")
    logits = torch.empty(count, num_tiles * TILE_TOKENS, device=device)
    stats = torch.empty(count, 4, device=device)
    tile = choose_tile("head", weight.out_features, weight.in_features, weight.weight.dtype, device)
    num_row_tiles = ceil_div(count, BLOCK_M)
    num_groups = num_tiles * num_row_tiles * BLOCK_M
    sums = scratch(2 * num_groups, torch.float32, device)
    flags_at = ceil_div(num_row_tiles, 16) * 16  # where alignment is kept
    integers = zeroed(flags_at + count, torch.int32, device)
    launch(
        spec_head_stats,
        (num_tiles, num_row_tiles),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        temperature,
        logits,
        stats,
        sums,
        sums[num_groups:],
        integers[flags_at:],
        integers,
        count,
        num_rows,
        VOCAB_SIZE=vocab_size,
        ROW_LENGTH=logits.shape[1],
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        CHUNK=chunk_of(weight.in_features),
        BLOCK_M=BLOCK_M,
        BLOCK_N=TILE_TOKENS,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return logits, stats
