"""Int8 layers of prompts: rows are rounded once, by a launch of their own, and then multiplied.

A program of an int8 layer rounds every row that it meets, which the programs of other columns do again; of many rows
that is most of the work. Products of integers are exact, so any tile will do, and only the sums of the chunks of K,
each with a row's unit, have to be added in the order of few rows (`multiply_split`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    PART_DEPTH,
    PARTS,
    ROWS_AT_ONCE,
    count_rows,
    first_block,
    load_parts,
    round_to_127ths,
)
from specengine.kernels.device.workspace import scratch
from specengine.kernels.types.packed import PackedLinear

_CHUNKS_AT_ONCE = 8


@triton.jit(do_not_specialize=["num_rows"])
def spec_round_rows(
    x_ptr,
    x_stride,
    out_ptr,
    out_stride,
    unit_ptr,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    end = count_rows(num_rows, num_rows_ptr)
    rows = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    is_row = rows < end
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    k = chunk[:, None] * PART_DEPTH + tl.arange(0, PART_DEPTH)[None, :]
    x = load_parts(x_ptr, x_stride, rows, is_row, k, None, None, None, None, WIDTH, False)
    store_rounded(x, out_ptr, out_stride, unit_ptr, rows, is_row, chunk, k)


@triton.jit
def store_rounded(x, out_ptr, out_stride, unit_ptr, rows, is_row, chunk, k):
    """x `[CHUNKS, ROWS, 128]` at places k `[CHUNKS, 128]` of rows as int8, and their units `[T, chunks of a row]`."""
    rounded, unit = round_to_127ths(x)
    at = rows[None, :, None].to(tl.int64) * out_stride + k[:, None, :]
    tl.store(out_ptr + at, rounded, is_row[None, :, None] & (k < out_stride)[:, None, :])
    num_chunks = (out_stride + PART_DEPTH - 1) // PART_DEPTH
    at = rows[None, :] * num_chunks + chunk[:, None]
    tl.store(unit_ptr + at, unit, is_row[None, :] & (chunk < num_chunks)[:, None])


def rounded_scratch(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Where rows `[T, width]` go as weights of this type meet them, and the units of int8, `[T, width / 128]` fp32."""
    rows, units = scratch(num_rows * width, dtype, device)[: num_rows * width].view(num_rows, width), None
    if dtype == torch.int8:
        units = scratch(num_rows * ceil_div(width, PART_DEPTH.value), torch.float32, device)
    return rows, units


def round_rows(x: Tensor, weight: PackedLinear, num_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x `[T, K]` fp32 as `multiply_rounded` takes it, in scratch memory."""
    rows, units = rounded_scratch(x.shape[0], weight.weight.shape[1], torch.int8, x.device)
    chunks = min(_CHUNKS_AT_ONCE, triton.next_power_of_2(ceil_div(x.shape[1], PART_DEPTH.value)))
    launch(
        spec_round_rows,
        (ceil_div(x.shape[0], ROWS_AT_ONCE.value), ceil_div(rows.shape[1], chunks * PART_DEPTH.value)),
        x,
        x.stride(0),
        rows,
        rows.stride(0),
        units,
        x.shape[0],
        num_rows,
        WIDTH=x.shape[1],
        CHUNKS=chunks,
        num_warps=4,
    )
    return rows, units


@triton.jit
def multiply_rounded(
    rows_ptr,
    unit_ptr,
    rows,
    row_mask,
    weight_ptr,
    scale_ptr,
    columns,
    WEIGHT_STRIDE: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of `round_rows` times W^T for `columns`, scaled, `[BLOCK_M, BLOCK_N]` fp32: with the bits of RANGES of K
    by `multiply_split`, added up by `add_splits`. BLOCK_K: of the tile of few rows, a chunk or one for each part."""
    CHUNKS: tl.constexpr = BLOCK_K // PART_DEPTH
    tl.static_assert(CHUNKS * PART_DEPTH == BLOCK_K and (CHUNKS == 1 or CHUNKS == PARTS) and PARTS == 4)
    NUM_BLOCKS: tl.constexpr = (WEIGHT_STRIDE + BLOCK_K - 1) // BLOCK_K
    # Of ranges without a block the sum is 0, which changes nothing.
    SPLITS: tl.constexpr = min(RANGES, NUM_BLOCKS)
    scale = tl.load(scale_ptr + columns)[:, None]
    # -0 is what changes no sum.
    total = tl.full((columns.shape[0], rows.shape[0]), -0.0, tl.float32)
    first = tl.zeros_like(total)
    second, third, fourth = first, first, first
    place = 0
    IS_WHOLE: tl.constexpr = WEIGHT_STRIDE % BLOCK_K == 0
    for block in tl.range(0, NUM_BLOCKS):
        # Numbers that the compiler knows are none any more, for Triton 3.6, in a tuple.
        where = (rows_ptr, unit_ptr, rows, row_mask, weight_ptr, columns)
        chunk = block * CHUNKS
        first += multiply_chunk(chunk, *where, WEIGHT_STRIDE, IS_WHOLE)
        if CHUNKS > 1:
            second += multiply_chunk(chunk + 1, *where, WEIGHT_STRIDE, IS_WHOLE)
            third += multiply_chunk(chunk + 2, *where, WEIGHT_STRIDE, IS_WHOLE)
            fourth += multiply_chunk(chunk + 3, *where, WEIGHT_STRIDE, IS_WHOLE)
        if SPLITS == NUM_BLOCKS:
            total += add_chunks(first, second, third, fourth, CHUNKS) * scale
            first = tl.zeros_like(total)
            second, third, fourth = first, first, first
        elif SPLITS > 1:
            ends = block + 1 == first_block(place + 1, WEIGHT_STRIDE, SPLITS, BLOCK_K)
            place += ends.to(tl.int32)
            of_range = add_chunks(first, second, third, fourth, CHUNKS)
            total = tl.where(ends, total + of_range * scale, total)
            first, second = tl.where(ends, 0.0, first), tl.where(ends, 0.0, second)
            third, fourth = tl.where(ends, 0.0, third), tl.where(ends, 0.0, fourth)
    if SPLITS == 1 and NUM_BLOCKS > 1:
        total = add_chunks(first, second, third, fourth, CHUNKS) * scale
    return tl.trans(total)


@triton.jit
def add_chunks(first, second, third, fourth, CHUNKS: tl.constexpr):
    """The sums of a block's chunks, of one or four, in the order of `add_parts`."""
    if CHUNKS == 1:
        return first
    else:
        return (first + third) + (second + fourth)


@triton.jit
def multiply_chunk(
    chunk,
    rows_ptr,
    unit_ptr,
    rows,
    row_mask,
    weight_ptr,
    columns,
    WEIGHT_STRIDE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Weights times rows over a chunk of K, in the rows' units, `[BLOCK_N, BLOCK_M]` fp32: zeros beyond K, unless
    IS_WHOLE says that no place is there. The fewer of both are the product's first side."""
    NUM_CHUNKS: tl.constexpr = (WEIGHT_STRIDE + PART_DEPTH - 1) // PART_DEPTH
    k = chunk * PART_DEPTH + tl.arange(0, PART_DEPTH)[None, :]
    weight_at = columns[:, None].to(tl.int64) * WEIGHT_STRIDE + k
    x_at = rows[:, None].to(tl.int64) * WEIGHT_STRIDE + k
    if IS_WHOLE:
        weight = tl.load(weight_ptr + weight_at)
        x = tl.load(rows_ptr + x_at, mask=row_mask[:, None], other=0)
    else:
        weight = tl.load(weight_ptr + weight_at, mask=k < WEIGHT_STRIDE, other=0)
        x = tl.load(rows_ptr + x_at, mask=row_mask[:, None] & (k < WEIGHT_STRIDE), other=0)
    # Beyond K any unit will do.
    unit_at = rows * NUM_CHUNKS + tl.minimum(chunk, NUM_CHUNKS - 1)
    unit = tl.load(unit_ptr + unit_at, mask=row_mask, other=0.0)
    if columns.shape[0] <= rows.shape[0]:
        exact = tl.dot(weight, tl.trans(x), out_dtype=tl.int32)
    else:
        exact = tl.trans(tl.dot(x, tl.trans(weight), out_dtype=tl.int32))
    return exact.to(tl.float32) * unit[None, :]
