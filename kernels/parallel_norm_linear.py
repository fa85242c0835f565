"""Queries, keys, values and the MLP's inner layer of a parallel-residual layer in one launch.

The grid's columns are the tiles of `norm_qkv`, then those of `norm_linear`: a program does what it would do there.
See `specengine.kernels.reference.parallel_norm_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    activate,
    check_activation,
    check_linear,
    chunk_of,
    count_rows,
    norm_multiply,
)
from specengine.kernels.device.qkv import check_places, head_columns, head_tiles, store_head
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def spec_parallel_norm_linear(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    mlp_norm_weight_ptr,
    mlp_norm_bias_ptr,
    mlp_eps,
    mlp_weight_ptr,
    mlp_scale_ptr,
    mlp_bias_ptr,
    query_ptr,
    positions_ptr,
    kv_slots_ptr,
    kv_cache_ptr,
    num_blocks,
    rotary_ptr,
    expanded_ptr,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NUM_EXPANDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUM_HEAD_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    is_head = tl.program_id(0) < NUM_HEAD_TILES
    head, features, has_feature = head_columns(tl.program_id(0), HEAD_DIM, BLOCK_N)
    head_feature = head * HEAD_DIM + tl.minimum(features, HEAD_DIM - 1)
    wanted = (tl.program_id(0) - NUM_HEAD_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.where(is_head, head_feature, tl.minimum(wanted, NUM_EXPANDED - 1))
    if PDL:
        first_weight_ptr = tl.where(is_head, weight_ptr, mlp_weight_ptr)
        prefetch_weight(first_weight_ptr, columns, 0, WEIGHT_STRIDE, PDL)
    wait(PDL)
    num_rows = count_rows(num_rows, num_rows_ptr)
    first_row = tl.program_id(1) * BLOCK_M
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    if is_head:
        x = norm_multiply(
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
        store_head(
            x,
            head,
            features,
            has_feature,
            rows,
            row_mask,
            query_ptr,
            positions_ptr,
            kv_slots_ptr,
            kv_cache_ptr,
            num_blocks,
            rotary_ptr,
            None,
            eps,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            ROTARY_DIM,
        )
    else:
        expanded = norm_multiply(
            hidden_ptr,
            hidden_stride,
            mlp_norm_weight_ptr,
            mlp_norm_bias_ptr,
            mlp_eps,
            mlp_weight_ptr,
            mlp_scale_ptr,
            mlp_bias_ptr,
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
        at = rows[:, None].to(tl.int64) * NUM_EXPANDED + wanted[None, :]
        mask = row_mask[:, None] & (wanted < NUM_EXPANDED)[None, :]
        tl.store(expanded_ptr + at, activate(expanded, ACTIVATION), mask)


def parallel_norm_linear(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    mlp_norm: Norm,
    mlp_weight: PackedLinear,
    activation: str,
    positions: Tensor,
    kv_slots: Tensor,
    kv_cache: Tensor,
    rotary: Tensor | None,
    *,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `specengine.kernels.reference.parallel_norm_linear`. Both weights are of one type.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    check_linear("hidden", hidden, weight)
    check_linear("hidden", hidden, mlp_weight)
    check_activation(activation)
    if weight.weight.dtype != mlp_weight.weight.dtype:
        raise ValueError(f"mlp_weight: expected {weight.weight.dtype}, got {mlp_weight.weight.dtype}")
    count, device = hidden.shape[0], hidden.device
    num_heads = check_places(count, weight, positions, kv_slots, kv_cache, rotary)
    _, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
    query = torch.empty(count, num_heads, head_dim, device=device)
    expanded = torch.empty(count, mlp_weight.out_features, device=device)
    num_columns = weight.out_features + mlp_weight.out_features
    tile = choose_tile("norm_heads", num_columns, weight.in_features, weight.weight.dtype, device)
    num_head_tiles, block_n = head_tiles(num_heads + 2 * num_kv_heads, head_dim, rotary, block_n=tile.block_n)
    launch(
        spec_parallel_norm_linear,
        (num_head_tiles + ceil_div(mlp_weight.out_features, block_n), ceil_div(count, BLOCK_M)),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        mlp_norm.weight,
        mlp_norm.bias,
        mlp_norm.eps,
        mlp_weight.weight,
        mlp_weight.scale,
        mlp_weight.bias,
        query,
        positions,
        kv_slots,
        kv_cache,
        num_blocks,
        rotary,
        expanded,
        count,
        num_rows,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROTARY_DIM=0 if rotary is None else 2 * rotary.shape[2],
        NUM_EXPANDED=mlp_weight.out_features,
        ACTIVATION=activation,
        NUM_HEAD_TILES=num_head_tiles,
        CHUNK=chunk_of(weight.in_features),
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return query, expanded
