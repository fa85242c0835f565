"""residual + attended W^T + b + expanded Wm^T + bm in one launch.

Each program sums its range of the attention's K, then its range of the MLP's; ranges are added in order, as in
`linear_residual`. See `specengine.kernels.reference.parallel_linear_residual`.
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
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.device.workspace import scratch, zeroed
from specengine.kernels.types.packed import PackedLinear


@triton.jit(do_not_specialize=["num_rows"])
def spec_parallel_linear_residual(
    attended_ptr,
    attended_stride,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    expanded_ptr,
    expanded_stride,
    mlp_weight_ptr,
    mlp_scale_ptr,
    mlp_bias_ptr,
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
    MLP_WIDTH: tl.constexpr,
    MLP_WEIGHT_STRIDE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
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
    total = multiply_split(
        attended_ptr,
        attended_stride,
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
    total += multiply_split(
        expanded_ptr,
        expanded_stride,
        mlp_weight_ptr,
        mlp_scale_ptr,
        rows,
        row_mask,
        columns,
        split,
        MLP_WIDTH,
        MLP_WEIGHT_STRIDE,
        SPLIT_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if SPLIT_K > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        total, is_last = add_splits(total, partial_ptr, counter_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N)
        if not is_last:
            return
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns)[None, :]
    if mlp_bias_ptr is not None:
        total += tl.load(mlp_bias_ptr + columns)[None, :]
    mask = row_mask[:, None] & (wanted < NUM_COLUMNS)[None, :]
    residual = tl.load(residual_ptr + rows[:, None].to(tl.int64) * residual_stride + wanted[None, :], mask)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * out_stride + wanted[None, :], total + residual, mask)


def parallel_linear_residual(
    attended: Tensor,
    weight: PackedLinear,
    expanded: Tensor,
    mlp_weight: PackedLinear,
    residual: Tensor,
    *,
    out: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.parallel_linear_residual`. Both weights are of one type.

    out:      `[T, D]` fp32 with contiguous rows to write to; may be `residual`
    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    check_linear("attended", attended, weight)
    check_linear("expanded", expanded, mlp_weight)
    shape = check_residual(attended, weight, residual)
    if expanded.shape[0] != shape[0] or mlp_weight.out_features != shape[1]:
        raise ValueError(
            f"expanded: expected [{shape[0]}, {mlp_weight.in_features}] to {shape[1]} features, got "
            f"{list(expanded.shape)} to {mlp_weight.out_features}"
        )
    if weight.weight.dtype != mlp_weight.weight.dtype:
        raise ValueError(f"mlp_weight: expected {weight.weight.dtype}, got {mlp_weight.weight.dtype}")
    device = attended.device
    if out is None:
        out = torch.empty(shape, device=device)
    width = weight.in_features + mlp_weight.in_features
    tile = choose_tile("linear_residual", shape[1], width, weight.weight.dtype, device)
    grid = (ceil_div(shape[1], tile.block_n), ceil_div(shape[0], BLOCK_M), tile.split_k)
    num_tiles = grid[0] * grid[1]
    launch(
        spec_parallel_linear_residual,
        grid,
        attended,
        attended.stride(0),
        weight.weight,
        weight.scale,
        weight.bias,
        expanded,
        expanded.stride(0),
        mlp_weight.weight,
        mlp_weight.scale,
        mlp_weight.bias,
        residual,
        residual.stride(0),
        out,
        out.stride(0),
        scratch(num_tiles * tile.split_k * BLOCK_M * tile.block_n, torch.float32, device),
        zeroed(num_tiles, torch.int32, device),
        shape[0],
        num_rows,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        MLP_WIDTH=mlp_weight.in_features,
        MLP_WEIGHT_STRIDE=mlp_weight.weight.shape[1],
        NUM_COLUMNS=shape[1],
        SPLIT_K=tile.split_k,
        BLOCK_M=BLOCK_M,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return out
