"""The next token of each row without its logits, in one launch: a tile of 128 logits is computed, raced and forgotten.

Each program raises its rows' best race keys (an integer maximum: no order matters); the last program of a row tile
turns them into tokens and leaves the keys at zero. Rows with filters need their logits: where any row has one, the
draw is `head`, `filter_rows` and `sample_rows`, with the same bits. See `specengine.kernels.reference.head_draw`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine import rng
from specengine.kernels.device.dependent import prefetch_weight, wait
from specengine.kernels.device.head import TILE_TOKENS, check_head, logit_tile, tile_noise, token_noise
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import chunk_of, count_rows
from specengine.kernels.device.noise import (
    NEGATIVE_INFINITY,
    key_score,
    key_token,
    race_key,
    scale_logits,
)
from specengine.kernels.device.race import check_columns, check_small
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.device.workspace import zeroed
from specengine.kernels.filter_rows import filter_rows
from specengine.kernels.head import head
from specengine.kernels.sample_rows import sample_rows
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows

_STAT_ERROR = 3


@triton.jit(do_not_specialize=["num_rows"])
def spec_head_draw(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    keys_ptr,
    flags_ptr,
    counter_ptr,
    tokens_ptr,
    error_ptr,
    num_rows,
    num_rows_ptr,
    NUM_TOKENS: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
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
    if token_ids_ptr is None:
        tokens = columns
    else:
        tokens = tl.load(token_ids_ptr + columns, columns < NUM_TOKENS, other=VOCAB_SIZE)
        logits = tl.where((tokens < VOCAB_SIZE)[None, :], logits, NEGATIVE_INFINITY)
    temperature = tl.load(temperature_ptr + rows, row_mask, other=0.0)
    score = scale_logits(logits, temperature[:, None])
    if tl.max(temperature, axis=0) > 0.0:
        seeds = tl.load(seeds_ptr + rows, row_mask, other=0)
        positions = tl.load(positions_ptr + rows, row_mask, other=0)
        if token_ids_ptr is None:
            noise = tile_noise(seeds, positions, first_column, BLOCK_M)
        else:
            noise = token_noise(seeds, positions, tokens, BLOCK_M)
        score = tl.where(temperature[:, None] > 0.0, score + noise, score)
    keys = tl.where(
        (columns < NUM_TOKENS)[None, :], race_key(score, tl.broadcast_to(tokens[None, :], score.shape)), 0
    )
    tl.atomic_max(keys_ptr + rows, tl.max(keys, axis=1), row_mask, sem="relaxed")
    has_nan = tl.max((logits != logits).to(tl.int32), axis=1)
    tl.atomic_max(flags_ptr + rows, has_nan, row_mask & (has_nan > 0), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + tl.program_id(1), 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr + tl.program_id(1), 0)
        best = tl.atomic_xchg(keys_ptr + rows, tl.zeros((BLOCK_M,), tl.int64), row_mask, sem="relaxed")
        flag = tl.atomic_xchg(flags_ptr + rows, tl.zeros((BLOCK_M,), tl.int32), row_mask, sem="relaxed")
        is_bad = (flag > 0) | (key_score(best) == NEGATIVE_INFINITY)
        tl.store(tokens_ptr + rows, key_token(best), row_mask)
        tl.store(error_ptr + rows, is_bad.to(tl.int32), row_mask)


def head_draw(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    rows: SamplingRows,
    positions: Tensor,
    *,
    has_filters: bool = True,
    token_ids: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `specengine.kernels.reference.head_draw`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    num_tokens = check_head(hidden, weight, vocab_size, token_ids)
    count, device = hidden.shape[0], hidden.device
    positions = check_small("positions", positions, (count,), torch.int32)
    if has_filters:
        logits = head(hidden, norm, weight, vocab_size, token_ids=token_ids, num_rows=num_rows)
        stats = filter_rows(logits, rows, num_rows=num_rows)
        base = torch.zeros_like(positions)
        drawn = (rows, positions, rng.STREAM_TARGET, base)
        tokens, _ = sample_rows(logits, stats, *drawn, num_rows=num_rows)
        return tokens, stats[:, _STAT_ERROR].int()
    tokens = torch.empty(count, dtype=torch.int32, device=device)
    error = torch.empty_like(tokens)
    tile = choose_tile("head", weight.out_features, weight.in_features, weight.weight.dtype, device)
    num_row_tiles = ceil_div(count, BLOCK_M)
    flags_at = ceil_div(num_row_tiles, 16) * 16  # where alignment is kept
    integers = zeroed(flags_at + count, torch.int32, device)
    launch(
        spec_head_draw,
        (ceil_div(num_tokens, TILE_TOKENS), num_row_tiles),
        hidden,
        hidden.stride(0),
        norm.weight,
        norm.bias,
        norm.eps,
        weight.weight,
        weight.scale,
        weight.bias,
        token_ids,
        *check_columns(rows, count, "temperature", "seeds"),
        positions,
        zeroed(count, torch.int64, device),
        integers[flags_at:],
        integers,
        tokens,
        error,
        count,
        num_rows,
        NUM_TOKENS=num_tokens,
        VOCAB_SIZE=vocab_size,
        WIDTH=weight.in_features,
        WEIGHT_STRIDE=weight.weight.shape[1],
        CHUNK=chunk_of(weight.in_features),
        BLOCK_M=BLOCK_M,
        BLOCK_N=TILE_TOKENS,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return tokens, error
