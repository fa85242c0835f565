"""logits = norm(hidden) W^T in one launch, fp32, rows padded to whole tiles of 128 tokens with -inf.

See `specengine.kernels.reference.head`.
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
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.types.packed import Norm, PackedLinear


@triton.jit(do_not_specialize=["num_rows"])
def spec_head(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    token_ids_ptr,
    logits_ptr,
    num_rows,
    num_rows_ptr,
    NUM_TOKENS: tl.constexpr,
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
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_weight(weight_ptr, tl.minimum(columns, NUM_TOKENS - 1), 0, WEIGHT_STRIDE, PDL)
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
        columns,
        NUM_TOKENS,
        WIDTH,
        WEIGHT_STRIDE,
        CHUNK,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask = row_mask[:, None]
    if token_ids_ptr is None:
        tokens = columns
    else:
        tokens = tl.load(token_ids_ptr + columns, columns < NUM_TOKENS, other=VOCAB_SIZE)
        mask = mask & (tokens < VOCAB_SIZE)[None, :]
    tl.store(logits_ptr + rows[:, None].to(tl.int64) * ROW_LENGTH + tokens[None, :], logits, mask)


def head(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    *,
    token_ids: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.head`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    num_tokens = check_head(hidden, weight, vocab_size, token_ids)
    shape = hidden.shape[0], ceil_div(vocab_size, TILE_TOKENS) * TILE_TOKENS
    logits = torch.empty(shape, device=hidden.device)
    if token_ids is not None:
        logits.fill_(float("-inf"))
    tile = choose_tile("head", weight.out_features, weight.in_features, weight.weight.dtype, hidden.device)
    launch(
        spec_head,
        (ceil_div(num_tokens, TILE_TOKENS), ceil_div(hidden.shape[0], BLOCK_M)),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        token_ids,
        logits,
        hidden.shape[0],
        num_rows,
        NUM_TOKENS=num_tokens,
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
    return logits
