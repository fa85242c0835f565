"""activation(norm(hidden) W^T + b) in one launch, of prompts in two.

Each program norms sixteen rows and multiplies them with a tile of the weights. Of narrow layers with weights of any
type but fp32 it holds its tile over all of K in registers, which it loads while the kernel before still runs; then rows
follow, four at a time. Of many rows another launch norms them first (`specengine.kernels.device.normed`). See
`specengine.kernels.reference.norm_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import (
    GATED,
    ROWS_AT_ONCE,
    activate,
    check_activation,
    check_linear,
    chunk_of,
    count_rows,
    gate,
    held_rows,
    hold_norm,
    hold_weights,
    norm_multiply_held,
    num_held_rows,
)
from specengine.kernels.device.normed import multiply_rows, norm_first
from specengine.kernels.device.tiles import choose_tile, rows_of_tile
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit
def store_activated(
    total,
    out_ptr,
    out_stride,
    rows,
    row_mask,
    NUM_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes activation(total) of this program's columns."""
    if ACTIVATION == "swiglu":
        out = gate(total)
        at = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        has_column = at < NUM_COLUMNS // 2
    else:
        out = activate(total, ACTIVATION)
        at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        has_column = at < NUM_COLUMNS
    where = rows[:, None].to(tl.int64) * out_stride + at[None, :]
    tl.store(out_ptr + where, out, mask=row_mask[:, None] & has_column[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def spec_norm_linear(
    hidden_ptr,
    hidden_stride,
    unit_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    out_stride,
    num_rows,
    num_rows_ptr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(wanted, NUM_COLUMNS - 1)
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
            total = norm_multiply_held(
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
            store_activated(total, out_ptr, out_stride, rows, row_mask, NUM_COLUMNS, ACTIVATION, BLOCK_N)
    else:
        prefetch_weight(weight_ptr, columns, 0, WEIGHT_STRIDE, PDL)
        wait(PDL)
        num_rows = count_rows(num_rows, num_rows_ptr)
        if first_row >= num_rows:
            return
        total, rows, row_mask = multiply_rows(
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
        store_activated(total, out_ptr, out_stride, rows, row_mask, NUM_COLUMNS, ACTIVATION, BLOCK_N)


def norm_linear(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    activation: str,
    *,
    out: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.norm_linear`.

    out:      `[T, N]` fp32 (`swiglu`: `[T, N / 2]`) with contiguous rows to write to
    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    check_linear("hidden", hidden, weight)
    check_activation(activation, may_gate=True)
    width = weight.out_features
    if activation == GATED:
        if width % 2:
            raise ValueError(f"weight: {width} output features are no pairs, which swiglu wants")
        width //= 2
    if out is None:
        out = torch.empty(hidden.shape[0], width, device=hidden.device)
    tile = choose_tile(
        "norm_linear", weight.out_features, weight.in_features, weight.weight.dtype, hidden.device
    )
    held, rows, units, tile, most_rows = norm_first(hidden, norm, weight, tile, num_rows)
    block_m, options = rows_of_tile(tile, hidden.shape[0], largest=most_rows)
    launch(
        spec_norm_linear,
        (ceil_div(weight.out_features, tile.block_n), ceil_div(hidden.shape[0], block_m)),
        rows,
        rows.stride(0),
        units,
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        out,
        out.stride(0),
        hidden.shape[0],
        num_rows,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        NUM_COLUMNS=weight.out_features,
        ACTIVATION=activation,
        CHUNK=chunk_of(weight.in_features),
        HELD=held,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **options,
    )
    return out
