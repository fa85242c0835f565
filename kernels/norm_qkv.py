"""Norm, query/key/value projection, rotary positions and the KV append in one launch.

A program computes some features of one head for sixteen rows and writes them where they belong: queries to the
output, keys and values to the paged cache. See `specengine.kernels.reference.norm_qkv`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    ROWS_AT_ONCE,
    check_linear,
    chunk_of,
    count_rows,
    held_rows,
    hold_norm,
    hold_weights,
    norm_multiply_held,
    num_held_rows,
)
from specengine.kernels.device.normed import multiply_rows, norm_first
from specengine.kernels.device.qkv import check_places, head_columns, head_tiles, store_head
from specengine.kernels.device.tiles import choose_tile, rows_of_tile
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def spec_norm_qkv(
    hidden_ptr,
    hidden_stride,
    unit_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    query_ptr,
    positions_ptr,
    kv_slots_ptr,
    kv_cache_ptr,
    num_blocks,
    rotary_ptr,
    head_norm_ptr,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    head, features, has_feature = head_columns(tl.program_id(0), HEAD_DIM, BLOCK_N)
    columns = head * HEAD_DIM + tl.minimum(features, HEAD_DIM - 1)
    first_row = tl.program_id(1) * BLOCK_M
    if HELD > 0 and hidden_ptr.dtype.element_ty == tl.float32:
        weight = hold_weights(weight_ptr, columns, WIDTH, WEIGHT_STRIDE, HELD)
        norm_weight = hold_norm(norm_weight_ptr, weight, WIDTH, HELD)
        norm_bias = None if norm_bias_ptr is None else hold_norm(norm_bias_ptr, weight, WIDTH, HELD)
        scale = None if scale_ptr is None else tl.load(scale_ptr + columns)
        bias = None if bias_ptr is None else tl.load(bias_ptr + columns)
        wait(PDL)
        end = count_rows(num_rows, num_rows_ptr)
        for first in tl.range(0, num_held_rows(first_row, end, BLOCK_M), ROWS_AT_ONCE, num_stages=1):
            group = first_row + first + tl.arange(0, ROWS_AT_ONCE)
            x = norm_multiply_held(
                hidden_ptr,
                hidden_stride,
                group,
                num_rows,
                norm_weight,
                norm_bias,
                eps,
                weight,
                scale,
                bias,
                WIDTH,
                HELD,
            )
            rows, row_mask = held_rows(first_row + first, end)
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
                head_norm_ptr,
                eps,
                NUM_HEADS,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                ROTARY_DIM,
            )
    else:
        prefetch_weight(weight_ptr, columns, 0, WEIGHT_STRIDE, PDL)
        wait(PDL)
        num_rows = count_rows(num_rows, num_rows_ptr)
        if first_row >= num_rows:
            return
        x, rows, row_mask = multiply_rows(
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
            WIDTH,
            WEIGHT_STRIDE,
            CHUNK,
            HELD,
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
            head_norm_ptr,
            eps,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            ROTARY_DIM,
        )


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    positions: Tensor,
    kv_slots: Tensor,
    kv_cache: Tensor,
    rotary: Tensor | None,
    head_norm: Tensor | None = None,
    *,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.norm_qkv`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    check_linear("hidden", hidden, weight)
    num_heads = check_places(hidden.shape[0], weight, positions, kv_slots, kv_cache, rotary, head_norm)
    _, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
    query = torch.empty(hidden.shape[0], num_heads, head_dim, device=hidden.device)
    layer = (weight.out_features, weight.in_features, weight.weight.dtype, hidden.device)
    together = (num_heads + 2 * num_kv_heads, head_dim, rotary, head_norm)
    tile = choose_tile("norm_qkv", *layer)
    _, block_n = head_tiles(*together, block_n=tile.block_n)
    if block_n > tile.block_n:
        tile = choose_tile("norm_heads", *layer)
        _, block_n = head_tiles(*together, block_n=tile.block_n)
    # A head's norm is a sum over a tile's columns, in an order that is known of sixteen rows only.
    held, rows, units, tile, most_rows = norm_first(
        hidden, norm, weight, replace(tile, block_n=block_n), num_rows, may=head_norm is None
    )
    num_tiles, block_n = head_tiles(*together, block_n=tile.block_n)
    block_m, options = rows_of_tile(tile, hidden.shape[0], largest=most_rows)
    launch(
        spec_norm_qkv,
        (num_tiles, ceil_div(hidden.shape[0], block_m)),
        rows,
        rows.stride(0),
        units,
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        query,
        positions,
        kv_slots,
        kv_cache,
        num_blocks,
        rotary,
        head_norm,
        hidden.shape[0],
        num_rows,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROTARY_DIM=0 if rotary is None else 2 * rotary.shape[2],
        CHUNK=chunk_of(weight.in_features),
        HELD=held,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=tile.block_k,
        **options,
    )
    return query
