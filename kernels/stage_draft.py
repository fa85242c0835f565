"""Puts one drawn draft of each sequence where others read it, in one launch, with the law it was drawn from.

The program of a sequence and a tile of the vocabulary finds its row among those drawn by counting the drafting
sequences before it; the first tile's also writes the token. Moves a row of logits a sequence where they are kept, else
a few numbers; see `specengine.kernels.reference.stage_draft`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.race import (
    ERROR,
    NUM_STATS,
    check_logits,
    check_output,
    check_small,
    check_table,
)

# Logits that a program copies: 128 bytes of each thread's.
TILE = 4096


@triton.jit(
    do_not_specialize=[
        "step",
        "tokens_stride",
        "slots_ptr",
        "seq_len_ptr",
        "is_drafting_ptr",
        "num_draft_ptr",
        "num_sequences",
        "num_rows",
    ]
)
def spec_stage_draft(
    step,
    tokens_ptr,
    tokens_stride,
    slots_ptr,
    seq_len_ptr,
    is_drafting_ptr,
    drawn_ptr,
    drawn_error_ptr,
    draft_tokens_ptr,
    num_draft_ptr,
    log_probs_ptr,
    logits_ptr,
    logits_stride,
    stats_ptr,
    draft_log_probs_ptr,
    draft_logits_ptr,
    draft_sequence_stride,
    draft_logits_stride,
    draft_stats_ptr,
    num_sequences,
    num_rows,
    K: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b, split = tl.program_id(0), tl.program_id(1)
    if tl.load(is_drafting_ptr + b) == 0:
        return
    sequences = tl.arange(0, BLOCK_B)
    others = tl.load(is_drafting_ptr + sequences, sequences < b, 0)
    row = tl.sum((others != 0).to(tl.int32), axis=0)
    if row >= num_rows:
        return
    draft = b.to(tl.int64) * K + step
    if split == 0:
        token = tl.load(drawn_ptr + row)
        slot, seq_len = tl.load(slots_ptr + b).to(tl.int64), tl.load(seq_len_ptr + b)
        tl.store(tokens_ptr + slot * tokens_stride + seq_len + step, token)
        tl.store(draft_tokens_ptr + draft, token)
        if stats_ptr is None:
            is_bad = tl.load(drawn_error_ptr + row) != 0
        else:
            is_bad = tl.load(stats_ptr + row * NUM_STATS + ERROR) != 0.0
        if is_bad:
            tl.store(num_draft_ptr + b, tl.minimum(tl.load(num_draft_ptr + b), step))
        if draft_log_probs_ptr is not None:
            tl.store(draft_log_probs_ptr + draft, tl.load(log_probs_ptr + row))
        if draft_stats_ptr is not None:
            column = tl.arange(0, NUM_STATS)
            row_stats = tl.load(stats_ptr + row * NUM_STATS + column)
            tl.store(draft_stats_ptr + draft * NUM_STATS + column, row_stats)
    if draft_logits_ptr is not None:
        column = split * TILE + tl.arange(0, TILE)
        is_token = column < VOCAB
        source_ptr = logits_ptr + row.to(tl.int64) * logits_stride
        target_ptr = (
            draft_logits_ptr
            + b.to(tl.int64) * draft_sequence_stride
            + step.to(tl.int64) * draft_logits_stride
        )
        tl.store(target_ptr + column, tl.load(source_ptr + column, is_token), is_token)


def stage_draft(
    step: int,
    tokens: Tensor,
    slots: Tensor,
    seq_len: Tensor,
    is_drafting: Tensor,
    drawn: Tensor,
    drawn_error: Tensor | None,
    draft_tokens: Tensor,
    num_draft: Tensor,
    log_probs: Tensor | None = None,
    logits: Tensor | None = None,
    stats: Tensor | None = None,
    draft_log_probs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
) -> None:
    """See `specengine.kernels.reference.stage_draft`. A drafting sequence beyond the rows drawn is left alone."""
    count, rows, k = slots.numel(), drawn.numel(), draft_tokens.shape[-1]
    if not 0 <= step < k:
        raise ValueError(f"step: {step} is outside 0 … {k - 1}, the columns of draft_tokens")
    if stats is None and drawn_error is None:
        raise ValueError("drawn_error: give drawn_error or stats")
    if stats is not None:
        stats = check_small("stats", stats, (rows, NUM_STATS.value), torch.float32)
    elif drawn_error is not None:
        drawn_error = check_small("drawn_error", drawn_error, (rows,), torch.int32)
    if log_probs is None or draft_log_probs is None:
        log_probs = draft_log_probs = None
    else:
        log_probs = check_small("log_probs", log_probs, (rows,), torch.float32)
        check_output("draft_log_probs", draft_log_probs, (count, k), torch.float32)
    if stats is None or draft_stats is None:
        draft_stats = None
    else:
        check_output("draft_stats", draft_stats, (count, k, NUM_STATS.value), torch.float32)
    vocab_size = 1
    if logits is None or draft_logits is None:
        logits = draft_logits = None
    else:
        check_logits("logits", logits, (rows,))
        check_logits("draft_logits", draft_logits, (count, k))
        vocab_size = logits.shape[1]
        if draft_logits.shape[2] != vocab_size:
            raise ValueError(f"draft_logits: rows of {draft_logits.shape[2]} for logits of {vocab_size}")
    launch(
        spec_stage_draft,
        (count, ceil_div(vocab_size, TILE)),
        step,
        check_table("tokens", tokens),
        tokens.stride(0),
        check_small("slots", slots, (count,), torch.int32),
        check_small("seq_len", seq_len, (count,), torch.int32),
        check_small("is_drafting", is_drafting, (count,), torch.int32),
        check_small("drawn", drawn, (rows,), torch.int32),
        None if stats is not None else drawn_error,
        check_output("draft_tokens", draft_tokens, (count, k), torch.int32),
        check_output("num_draft", num_draft, (count,), torch.int32),
        log_probs,
        logits,
        None if logits is None else logits.stride(0),
        stats,
        draft_log_probs,
        draft_logits,
        None if draft_logits is None else draft_logits.stride(0),
        None if draft_logits is None else draft_logits.stride(1),
        draft_stats,
        count,
        rows,
        K=k,
        VOCAB=vocab_size,
        TILE=TILE,
        BLOCK_B=triton.next_power_of_2(max(count, 1)),
        num_warps=4,
    )
