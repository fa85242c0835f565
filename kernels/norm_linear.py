"""activation(norm(hidden) W^T + b) in one launch.

Each program norms sixteen rows (their mean and variance in one pass over the row, which stays in the first cache) and
multiplies them with a tile of the weights. Reads hidden and the weights once, writes the output; see
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
    activate,
    check_activation,
    check_linear,
    chunk_of,
    count_rows,
    gate,
    norm_multiply,
)
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit(do_not_specialize=["num_rows"])
def spec_norm_linear(
    hidden_ptr,
    hidden_stride,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(wanted, NUM_COLUMNS - 1)
    prefetch_weight(weight_ptr, columns, 0, WEIGHT_STRIDE, PDL)
    wait(PDL)
    num_rows = count_rows(num_rows, num_rows_ptr)
    first_row = tl.program_id(1) * BLOCK_M
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
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
    if ACTIVATION == "swiglu":
        out = gate(total)
        at = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        has_column = at < NUM_COLUMNS // 2
    else:
        out = activate(total, ACTIVATION)
        at = wanted
        has_column = wanted < NUM_COLUMNS
    where = rows[:, None].to(tl.int64) * out_stride + at[None, :]
    tl.store(out_ptr + where, out, mask=row_mask[:, None] & has_column[None, :])


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
    launch(
        spec_norm_linear,
        (ceil_div(weight.out_features, tile.block_n), ceil_div(hidden.shape[0], BLOCK_M)),
        hidden,
        hidden.stride(0),
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
        BLOCK_M=BLOCK_M,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return out
