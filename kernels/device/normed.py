"""Normed layers of prompts: rows are normed and rounded once, by a launch of their own, and then multiplied.

A program of a normed layer norms every row that it meets, which the programs of other columns do again; of many rows
that is most of the work. A row's bits do not depend on the way that it takes: it is normed by the same expressions, in
the same layout, and multiplied with the same parts of K, whose sums are added in the same order.
"""

from __future__ import annotations

from dataclasses import replace
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
    norm_multiply,
    norm_rows,
    round_to_127ths,
)
from specengine.kernels.device.rounded import multiply_rounded, rounded_scratch, store_rounded
from specengine.kernels.device.rounding import as_operand, round_to
from specengine.kernels.device.tiles import (
    BLOCK_M,
    DTYPES_ALONE,
    FEWEST_ALONE,
    NORMED_TILE,
    ROUNDED_TILE,
    Tile,
)
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
            if unit_ptr is None:
                at = rows[None, :, None].to(tl.int64) * out_stride + k[:, None, :]
                mask = is_row[None, :, None] & (k < out_stride)[:, None, :]
                tl.store(out_ptr + at, round_to(x, out_ptr.dtype.element_ty), mask)
            else:
                chunk = first // DEPTH + tl.arange(0, CHUNK // DEPTH)
                store_rounded(x, out_ptr, out_stride, unit_ptr, rows, is_row, chunk, k)


class RowsOfLayer(NamedTuple):
    """What a normed layer multiplies, and in which tiles.

    held:      see `held_depth`
    rows:      fp32 that its programs norm; or normed and rounded as they meet the weights, in scratch memory: fp16,
               bf16, or int8 in `units` of `[T, D / 128]` fp32
    most_rows: of a tile
    """

    held: int
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
    """Norms and rounds the rows for `multiply_normed` where they are many, of weights by group or fp32 excepted: else
    that is left to the layer's programs, and the rows are returned as they are.

    tile: of few rows, which decides in what order sums are made
    may:  False leaves it to the programs in any case
    """
    count, dtype = hidden.shape[0], weight.weight.dtype
    held, is_int8 = held_depth(weight, tile.block_n), dtype == torch.int8
    if not may or count < FEWEST_ALONE or dtype not in DTYPES_ALONE:
        return RowsOfLayer(held, hidden, None, tile, 64 if held else BLOCK_M)
    rows, units = rounded_scratch(count, held or weight.weight.shape[1], dtype, hidden.device)
    launch(
        spec_norm_rows,
        (ceil_div(count, ROWS_AT_ONCE.value),),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        rows,
        rows.shape[1],
        units,
        count,
        num_rows,
        WIDTH=hidden.shape[1],
        CHUNK=chunk_of(hidden.shape[1]),
        HELD=held,
        num_warps=4,
    )
    is_narrow = tile.block_n <= FEW_COLUMNS.value
    if held:
        return RowsOfLayer(held, rows, units, NORMED_TILE, 64 if is_int8 else 128)
    if is_int8 and is_narrow:
        tile = replace(ROUNDED_TILE, block_k=tile.block_k)
    return RowsOfLayer(held, rows, units, tile, 64 if is_narrow else 32)


@triton.jit
def multiply_rows(
    hidden_ptr,
    hidden_stride,
    unit_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    first_row,
    num_rows,
    columns,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """norm(rows from first_row on) W^T + b for `columns`, `[BLOCK_M, BLOCK_N]` fp32, of fp32 rows or of those that
    `norm_first` made of them; and which rows these are, and which of them there are."""
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    if hidden_ptr.dtype.element_ty == tl.float32:
        total = norm_multiply(
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
            columns,
            WIDTH,
            WEIGHT_STRIDE,
            CHUNK,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        total = multiply_normed(
            hidden_ptr,
            hidden_stride,
            unit_ptr,
            rows,
            row_mask,
            weight_ptr,
            scale_ptr,
            bias_ptr,
            columns,
            WIDTH,
            WEIGHT_STRIDE,
            HELD,
            BLOCK_K,
        )
    return total, rows, row_mask


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
    elif unit_ptr is not None:
        total = multiply_rounded(
            rows_ptr, unit_ptr, rows, row_mask, weight_ptr, scale_ptr, columns, WEIGHT_STRIDE, 1, BLOCK_K
        )
        return finish_columns(total, None, bias_ptr, columns)
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
