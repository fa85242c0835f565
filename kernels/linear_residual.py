"""residual + x W^T + b in one launch.

A tile of columns may be split along K over several programs: each leaves its sum in scratch memory, and the last to
arrive adds them in the order of K. The split belongs to the layer, not to the number of rows. Of many rows that meet
int8 weights another launch rounds them first, and a program adds up all ranges of K itself
(`specengine.kernels.device.rounded`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    add_splits,
    check_linear,
    check_residual,
    count_rows,
    first_block,
    multiply_split,
)
from specengine.kernels.device.rounded import multiply_rounded, round_rows
from specengine.kernels.device.tiles import BLOCK_M, FEWEST_ALONE, ROUNDED_TILE, choose_tile, rows_of_tile
from specengine.kernels.device.workspace import scratch, zeroed
from specengine.kernels.types.packed import PackedLinear

# Of a tile in prompts: without spills, and in shared memory.
_LARGEST_ROWS = {torch.float16: 128, torch.bfloat16: 128, torch.uint8: 64}


@triton.jit(do_not_specialize=["num_rows"])
def spec_linear_residual(
    x_ptr,
    x_stride,
    unit_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    partial_ptr,
    counter_ptr,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(wanted, NUM_COLUMNS - 1)
    split = tl.program_id(2)
    first = first_block(split, WIDTH, SPLIT_K, BLOCK_K) * BLOCK_K
    prefetch_weight(weight_ptr, columns, first, WEIGHT_STRIDE, PDL)
    wait(PDL)
    num_rows = count_rows(num_rows, num_rows_ptr)
    if tl.program_id(1) * BLOCK_M >= num_rows:
        return
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    if unit_ptr is not None:
        total = multiply_rounded(
            x_ptr, unit_ptr, rows, row_mask, weight_ptr, scale_ptr, columns, WEIGHT_STRIDE, RANGES, BLOCK_K
        )
    else:
        total = multiply_split(
            x_ptr,
            x_stride,
            weight_ptr,
            scale_ptr,
            rows,
            row_mask,
            columns,
            split,
            WIDTH,
            WEIGHT_STRIDE,
            SPLIT_K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if SPLIT_K > 1:
            tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            total, is_last = add_splits(
                total, partial_ptr, counter_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N
            )
            if not is_last:
                return
    mask = row_mask[:, None] & (wanted < NUM_COLUMNS)[None, :]
    residual = tl.load(residual_ptr + rows[:, None].to(tl.int64) * residual_stride + wanted[None, :], mask)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns)[None, :]
    tl.store(out_ptr + rows[:, None].to(tl.int64) * out_stride + wanted[None, :], total + residual, mask)


def linear_residual(
    x: Tensor,
    weight: PackedLinear,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.linear_residual`.

    out:      `[T, N]` fp32 with contiguous rows to write to; may be `residual`
    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    check_linear("x", x, weight)
    shape = check_residual(x, weight, residual)
    if out is None:
        out = torch.empty(shape, device=x.device)
    tile = choose_tile(
        "linear_residual", weight.out_features, weight.in_features, weight.weight.dtype, x.device
    )
    rows, units, num_splits, columns = x, None, tile.split_k, tile
    largest = _LARGEST_ROWS.get(weight.weight.dtype, BLOCK_M)
    if weight.weight.dtype == torch.int8 and x.shape[0] >= FEWEST_ALONE:
        (rows, units), num_splits, columns, largest = round_rows(x, weight, num_rows), 1, ROUNDED_TILE, 64
    block_m, options = rows_of_tile(columns, x.shape[0], largest=largest)
    grid = (ceil_div(weight.out_features, columns.block_n), ceil_div(x.shape[0], block_m), num_splits)
    num_tiles = grid[0] * grid[1]
    launch(
        spec_linear_residual,
        grid,
        rows,
        rows.stride(0),
        units,
        weight.weight,
        weight.scale,
        weight.bias,
        residual,
        residual.stride(0),
        out,
        out.stride(0),
        scratch(num_tiles * num_splits * block_m * columns.block_n, torch.float32, x.device),
        zeroed(num_tiles, torch.int32, x.device),
        x.shape[0],
        num_rows,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        NUM_COLUMNS=weight.out_features,
        SPLIT_K=num_splits,
        RANGES=tile.split_k,
        BLOCK_M=block_m,
        BLOCK_N=columns.block_n,
        BLOCK_K=tile.block_k,
        **options,
    )
    return out
