"""Makes what a round emitted part of its sequences, in one launch, one program a sequence.

Reads and writes k + 1 tokens and a few numbers a sequence; see `specengine.kernels.reference.commit_round`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.race import check_output, check_small, check_table
from specengine.kernels.types.round import (
    NUM_RESULT_COLUMNS,
    RESULT_DRAFTED,
    RESULT_EMITTED,
    RESULT_ERROR,
)

_NUM_RESULT_COLUMNS = tl.constexpr(NUM_RESULT_COLUMNS)
_EMITTED = tl.constexpr(RESULT_EMITTED)
_DRAFTED = tl.constexpr(RESULT_DRAFTED)
_ERROR = tl.constexpr(RESULT_ERROR)


@triton.jit
def commit_row(
    b,
    emitted,
    is_running,
    is_bad,
    num_accepted,
    num_draft,
    slot,
    start,
    tokens_ptr,
    tokens_stride,
    seq_len_ptr,
    length_limit_ptr,
    record_ptr,
    K: tl.constexpr,
):
    """Writes sequence b's row of the record and, where it runs, what emitted `[BLOCK]` makes of its state."""
    column = tl.arange(0, emitted.shape[0])
    is_error = is_running & is_bad
    num_emitted = tl.where(is_running & (is_error == 0), num_accepted + 1, 0)
    record_ptr += b * (_NUM_RESULT_COLUMNS + K + 1)
    tl.store(record_ptr + _EMITTED, num_emitted)
    tl.store(record_ptr + _DRAFTED, tl.where(is_running, num_draft, 0))
    tl.store(record_ptr + _ERROR, is_error.to(tl.int32))
    tl.store(record_ptr + _NUM_RESULT_COLUMNS + column, emitted, column <= K)
    if is_running:
        if is_error:
            tl.store(length_limit_ptr + slot, 0)
        else:
            row_ptr = tokens_ptr + slot.to(tl.int64) * tokens_stride
            tl.store(row_ptr + start + column, emitted, column < num_emitted)
            tl.store(seq_len_ptr + slot, start + num_emitted)


@triton.jit(
    do_not_specialize=[
        "tokens_stride",
        "start_ptr",
        "is_running_ptr",
        "num_accepted_ptr",
        "num_draft_ptr",
        "error_ptr",
    ]
)
def spec_commit_round(
    tokens_ptr,
    tokens_stride,
    seq_len_ptr,
    length_limit_ptr,
    slots_ptr,
    start_ptr,
    is_running_ptr,
    emitted_ptr,
    num_accepted_ptr,
    num_draft_ptr,
    error_ptr,
    record_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    emitted = tl.load(emitted_ptr + b * (K + 1) + column, column <= K, 0)
    commit_row(
        b,
        emitted,
        tl.load(is_running_ptr + b) != 0,
        tl.load(error_ptr + b) != 0,
        tl.minimum(tl.maximum(tl.load(num_accepted_ptr + b), 0), K),
        tl.load(num_draft_ptr + b),
        tl.load(slots_ptr + b),
        tl.load(start_ptr + b),
        tokens_ptr,
        tokens_stride,
        seq_len_ptr,
        length_limit_ptr,
        record_ptr,
        K,
    )


def commit_round(
    tokens: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    slots: Tensor,
    start: Tensor,
    is_running: Tensor,
    emitted: Tensor,
    num_accepted: Tensor,
    num_draft: Tensor,
    error: Tensor,
) -> Tensor:
    """See `specengine.kernels.reference.commit_round`. num_accepted outside 0 … k is taken as the nearest of them."""
    check_table("tokens", tokens)
    count, num_slots, width = slots.numel(), tokens.shape[0], emitted.shape[-1]
    if emitted.dim() != 2 or width < 1:
        raise ValueError(f"emitted: expected [{count}, k + 1] torch.int32, got {list(emitted.shape)}")
    record = torch.empty(count, NUM_RESULT_COLUMNS + width, dtype=torch.int32, device=tokens.device)
    launch(
        spec_commit_round,
        (count,),
        tokens,
        tokens.stride(0),
        check_output("seq_len", seq_len, (num_slots,), torch.int32),
        check_output("length_limit", length_limit, (num_slots,), torch.int32),
        check_small("slots", slots, (count,), torch.int32),
        check_small("start", start, (count,), torch.int32),
        check_small("is_running", is_running, (count,), torch.int32),
        check_small("emitted", emitted, (count, width), torch.int32),
        check_small("num_accepted", num_accepted, (count,), torch.int32),
        check_small("num_draft", num_draft, (count,), torch.int32),
        check_small("error", error, (count,), torch.int32),
        record,
        K=width - 1,
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )
    return record
