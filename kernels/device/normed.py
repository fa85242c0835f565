"""Normed layers of prompts: rows are normed and rounded once, by a launch of their own, and then multiplied.

A program of a normed layer norms every row that it meets, which the programs of other columns do again; of many rows
that is most of the work. A row's bits do not depend on the way that it takes: it is normed by the same expressions, in
the same layout, and multiplied with the same parts of K, whose sums are added in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    FEW_COLUMNS,
    PART_DEPTH,
    ROWS_AT_ONCE,
    as_matrix,
    chunk_moments,
    chunk_of,
    count_rows,
    finish_columns,
    held_depth,
    load_parts,
    multiply,
    norm_rows,
    round_to_127ths,
)
from specengine.kernels.device.rounding import as_operand, round_to
from specengine.kernels.device.tiles import BLOCK_M, FEWEST_NORMED, NORMED_DTYPES, NORMED_TILE, Tile
from specengine.kernels.device.workspace import scratch
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit(do_not_specialize=["num_rows"])
def spec_norm_rows(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    out_ptr,
    out_stride,
    unit_ptr,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    end = count_rows(num_rows, num_rows_ptr)
    rows = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    is_row = rows < end
    if HELD > 0:
        x = norm_rows(hidden_ptr, hidden_stride, rows, end, norm_weight_ptr, norm_bias_ptr, eps, WIDTH, HELD)
        at = rows[:, None].to(tl.int64) * out_stride + tl.arange(0, HELD)[None, :]
        if unit_ptr is None:
            tl.store(out_ptr + at, as_matrix(round_to(x, out_ptr.dtype.element_ty)), is_row[:, None])
        else:
            rounded, unit = round_to_127ths(x)
            tl.store(out_ptr + at, as_matrix(rounded), is_row[:, None])
            part = tl.arange(0, x.shape[0])[:, None]
            tl.store(unit_ptr + rows[None, :] * x.shape[0] + part, unit, is_row[None, :])
    else:
        HAS_MEAN: tl.constexpr = norm_bias_ptr is not None
        mean, variance = chunk_moments(hidden_ptr, hidden_stride, rows, is_row, WIDTH, CHUNK, HAS_MEAN)
        inverse = 1.0 / tl.sqrt_rn(variance + eps)
        DEPTH: tl.constexpr = min(CHUNK, PART_DEPTH)
        for first in tl.static_range(0, WIDTH, CHUNK):
            # In three dimensions, so that what is written has no say in how the moments were laid out.
            k = first + tl.arange(0, CHUNK // DEPTH)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
            norm = (norm_weight_ptr, norm_bias_ptr, mean, inverse)
            x = load_parts(hidden_ptr, hidden_stride, rows, is_row, k, *norm, WIDTH, False)
            at = rows[None, :, None].to(tl.int64) * out_stride + k[:, None, :]
            mask = is_row[None, :, None] & (k < out_stride)[:, None, :]
            tl.store(out_ptr + at, round_to(x, out_ptr.dtype.element_ty), mask)


class RowsOfLayer(NamedTuple):
    """What a normed layer multiplies, and in which tiles.

    rows:      fp32 that its programs norm; or normed and rounded as they meet the weights, in scratch memory: fp16,
               bf16, or int8 in `units` of `[T, D / 128]` fp32
    most_rows: of a tile
    """

    rows: Tensor
    units: Tensor | None
    tile: Tile
    most_rows: int


def norm_first(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    tile: Tile,
    num_rows: Tensor | None,
    *,
    may: bool = True,
) -> RowsOfLayer:
    """Norms the rows for `multiply_normed` where they are many and weights are of 16 bits, or int8 and would be held:
    else that is left to the layer's programs, and the rows are returned as they are.

    tile: of few rows, which decides in what order sums are made
    may:  False leaves it to the programs in any case
    """
    count, dtype = hidden.shape[0], weight.weight.dtype
    held = held_depth(weight, tile.block_n)
    if not may or count < FEWEST_NORMED or dtype not in (NORMED_DTYPES if held else NORMED_DTYPES[:2]):
        return RowsOfLayer(hidden, None, tile, 64 if held else BLOCK_M)
    depth = held or weight.weight.shape[1]
    rows = scratch(count * depth, dtype, hidden.device)[: count * depth].view(count, depth)
    units = None
    if dtype == torch.int8:
        num_parts = depth // min(depth, PART_DEPTH.value)
        units = scratch(count * num_parts, torch.float32, hidden.device)
    launch(
        spec_norm_rows,
        (ceil_div(count, ROWS_AT_ONCE.value),),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        rows,
        depth,
        units,
        count,
        num_rows,
        WIDTH=hidden.shape[1],
        CHUNK=chunk_of(hidden.shape[1]),
        HELD=held,
        num_warps=4,
    )
    if held:
        return RowsOfLayer(rows, units, NORMED_TILE, 64 if dtype == torch.int8 else 128)
    return RowsOfLayer(rows, units, tile, 64 if tile.block_n <= FEW_COLUMNS.value else 32)


@triton.jit
def multiply_normed(
    rows_ptr,
    row_stride,
    unit_ptr,
    rows,
    row_mask,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    columns,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rows W^T + b of `norm_first`, `[BLOCK_M, BLOCK_N]` fp32, with the bits of `norm_multiply_held`, or where weights
    are not held of `norm_multiply`."""
    if HELD > 0:
        total = multiply_parts_of_held(
            rows_ptr, row_stride, unit_ptr, rows, row_mask, weight_ptr, columns, HELD, WEIGHT_STRIDE
        )
    else:
        end: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
        where = (rows_ptr, row_stride, rows, row_mask, weight_ptr, columns)
        total = multiply(*where, None, None, None, None, 0, end, WEIGHT_STRIDE, WEIGHT_STRIDE, BLOCK_K)
    return finish_columns(total, scale_ptr, bias_ptr, columns)


@triton.jit
def multiply_parts_of_held(
    rows_ptr,
    row_stride,
    unit_ptr,
    rows,
    row_mask,
    weight_ptr,
    columns,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
):
    """A loop over pairs of parts of K, half of K apart, so that the sums of up to eight parts are added as `add_parts`
    does it. WIDTH: of the rows, row_stride, which the compiler does not know here and so does not unroll the loop."""
    PARTS: tl.constexpr = WIDTH // min(WIDTH, PART_DEPTH)
    PAIRS: tl.constexpr = PARTS // 2
    tl.static_assert(PARTS <= 8)
    if PAIRS == 0:
        total = multiply_part(
            0, rows_ptr, unit_ptr, rows, row_mask, weight_ptr, columns, WIDTH, WEIGHT_STRIDE
        )
    else:
        # -0 is what changes no sum.
        before = tl.full((columns.shape[0], rows.shape[0]), -0.0, tl.float32)
        total = before
        for step in tl.range(0, row_stride // (WIDTH // PAIRS)):
            pair = (step % 2) * (PAIRS // 2) + step // 2
            first = multiply_part(
                pair, rows_ptr, unit_ptr, rows, row_mask, weight_ptr, columns, WIDTH, WEIGHT_STRIDE
            )
            second = multiply_part(
                pair + PAIRS, rows_ptr, unit_ptr, rows, row_mask, weight_ptr, columns, WIDTH, WEIGHT_STRIDE
            )
            both = first + second
            if PAIRS < 4:
                total += both
            else:
                total = tl.where(step % 2 == 1, total + (before + both), total)
                before = both
    return tl.trans(total)


@triton.jit
def multiply_part(
    part,
    rows_ptr,
    unit_ptr,
    rows,
    row_mask,
    weight_ptr,
    columns,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
):
    """Weights times rows, `[BLOCK_N, BLOCK_M]` fp32, over a part of K: of columns too few for `wgmma`, which may round
    otherwise than the `mma` of `multiply_held`."""
    tl.static_assert(columns.shape[0] < 64)
    DEPTH: tl.constexpr = min(WIDTH, PART_DEPTH)
    k = tl.arange(0, DEPTH)[None, :]
    weight_at = columns[:, None].to(tl.int64) * WEIGHT_STRIDE + k
    if WEIGHT_STRIDE == WIDTH:
        weight = tl.load(weight_ptr + part * DEPTH + weight_at)
    else:
        mask = k < WEIGHT_STRIDE - part * DEPTH
        weight = tl.load(weight_ptr + part * DEPTH + weight_at, mask, other=0)
    x = tl.load(
        rows_ptr + part * DEPTH + rows[:, None].to(tl.int64) * WIDTH + k, mask=row_mask[:, None], other=0
    )
    if unit_ptr is not None:
        exact = tl.dot(weight, tl.trans(x), out_dtype=tl.int32).to(tl.float32)
        unit = tl.load(unit_ptr + rows * (WIDTH // DEPTH) + part, mask=row_mask, other=0.0)
        return exact * unit[None, :]
    else:
        total = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
        return tl.dot(as_operand(weight), as_operand(tl.trans(x)), total)
