"""The next token of each row without its logits, in one launch: a tile of 128 logits is computed, raced and forgotten.

Each program raises its rows' best race keys (an integer maximum: no order matters); the last program of a row tile
turns them into tokens and leaves the keys at zero; where the tokens are drafts it also stages them. Rows with filters
need their logits: where any row has one, the draw is `head`, `filter_rows` and `sample_rows`, with the same bits. See
`specengine.kernels.reference.head_draw`.
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
from specengine.kernels.device.race import check_columns, check_output, check_small, check_table
from specengine.kernels.device.tiles import BLOCK_M, choose_tile
from specengine.kernels.device.workspace import zeroed
from specengine.kernels.filter_rows import filter_rows
from specengine.kernels.head import head
from specengine.kernels.sample_rows import sample_rows
from specengine.kernels.stage_draft import stage_draft
from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows

_STAT_ERROR = 3


@triton.jit
def stage_rows(
    rows,
    tokens,
    is_bad,
    step,
    tokens_ptr,
    tokens_stride,
    slots_ptr,
    seq_len_ptr,
    is_drafting_ptr,
    draft_tokens_ptr,
    num_draft_ptr,
    num_sequences,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`stage_draft` of the draws of some rows, `[M]` each; rows beyond those drawn have token -1."""
    b = tl.arange(0, BLOCK_B)
    is_sequence = b < num_sequences
    is_drafting = (tl.load(is_drafting_ptr + b, is_sequence, 0) != 0).to(tl.int32)
    slot = tl.load(slots_ptr + b, is_sequence, 0).to(tl.int64)
    seq_len = tl.load(seq_len_ptr + b, is_sequence, 0)
    num_draft = tl.load(num_draft_ptr + b, is_sequence, 0)
    row = tl.cumsum(is_drafting, axis=0) - is_drafting
    is_own = (row[None, :] == rows[:, None]) & (is_drafting[None, :] != 0)
    token = tl.max(tl.where(is_own, tokens[:, None], -1), axis=0)
    ends = tl.max(tl.where(is_own, is_bad[:, None].to(tl.int32), 0), axis=0) != 0
    is_drawn = token >= 0
    tl.store(tokens_ptr + slot * tokens_stride + seq_len + step, token, is_drawn)
    tl.store(draft_tokens_ptr + b.to(tl.int64) * K + step, token, is_drawn)
    tl.store(num_draft_ptr + b, tl.minimum(num_draft, step), is_drawn & ends)


@triton.jit(do_not_specialize=["num_rows", "step", "slots_ptr", "is_drafting_ptr", "num_sequences"])
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
    step,
    state_tokens_ptr,
    state_tokens_stride,
    slots_ptr,
    seq_len_ptr,
    is_drafting_ptr,
    draft_tokens_ptr,
    num_draft_ptr,
    num_sequences,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
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
        if draft_tokens_ptr is not None:
            stage_rows(
                rows,
                tl.where(row_mask, key_token(best), -1),
                is_bad,
                step,
                state_tokens_ptr,
                state_tokens_stride,
                slots_ptr,
                seq_len_ptr,
                is_drafting_ptr,
                draft_tokens_ptr,
                num_draft_ptr,
                num_sequences,
                K,
                BLOCK_B,
            )


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
    staging: Staging | None = None,
) -> tuple[Tensor, Tensor]:
    """See `specengine.kernels.reference.head_draw`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    staging:  what else to do with the draws: `stage_draft`
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
        error = stats[:, _STAT_ERROR].int()
        if staging is not None:
            step, state_tokens, slots, seq_len, is_drafting, *drafts = staging
            stage_draft(step, state_tokens, slots, seq_len, is_drafting, tokens, error, *drafts)
        return tokens, error
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
        *_staging_arguments(staging),
        K=1 if staging is None else staging.draft_tokens.shape[1],
        BLOCK_B=1 if staging is None else triton.next_power_of_2(max(staging.slots.numel(), 1)),
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


def _staging_arguments(staging: Staging | None) -> tuple[Tensor | int | None, ...]:
    """What the kernel stages by, in its order."""
    if staging is None:
        return (None,) * 9
    count, k = staging.slots.numel(), staging.draft_tokens.shape[-1]
    if not 0 <= staging.step < k:
        raise ValueError(f"step: {staging.step} is outside 0 … {k - 1}, the columns of draft_tokens")
    return (
        staging.step,
        check_table("tokens", staging.tokens),
        staging.tokens.stride(0),
        check_small("slots", staging.slots, (count,), torch.int32),
        check_small("seq_len", staging.seq_len, (count,), torch.int32),
        check_small("is_drafting", staging.is_drafting, (count,), torch.int32),
        check_output("draft_tokens", staging.draft_tokens, (count, k), torch.int32),
        check_output("num_draft", staging.num_draft, (count,), torch.int32),
        count,
    )
