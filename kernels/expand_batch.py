"""From lengths to a ragged batch in one launch, one program a sequence: see the reference of the same name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.race import check_table


@triton.jit
def _before(lengths, sequences, b):
    """The sum of the lengths of the sequences before b."""
    return tl.sum(tl.where(sequences < b, lengths, 0), axis=0)


@triton.jit(
    do_not_specialize=[
        "tokens_stride",
        "table_stride",
        "slots_ptr",
        "start_ptr",
        "q_len_ptr",
        "num_logits_ptr",
        "num_sequences",
        "num_logit_rows",
    ]
)
def spec_expand_batch(
    tokens_ptr,
    tokens_stride,
    block_table_ptr,
    table_stride,
    slots_ptr,
    start_ptr,
    q_len_ptr,
    num_logits_ptr,
    token_ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    q_start_ptr,
    context_len_ptr,
    logit_rows_ptr,
    num_sequences,
    num_logit_rows,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0)
    sequences = tl.arange(0, BLOCK_B)
    mask = sequences < num_sequences
    q_lens = tl.load(q_len_ptr + sequences, mask, other=0)
    logit_counts = tl.load(num_logits_ptr + sequences, mask, other=0)
    first_row, q_len = _before(q_lens, sequences, b), tl.load(q_len_ptr + b)
    first_logit, num_logits = _before(logit_counts, sequences, b), tl.load(num_logits_ptr + b)
    start, slot = tl.load(start_ptr + b), tl.load(slots_ptr + b).to(tl.int64)
    tl.store(q_start_ptr + b, first_row)
    tl.store(context_len_ptr + b, tl.where(q_len > 0, start + q_len, 0))
    if b == num_sequences - 1:
        tl.store(q_start_ptr + num_sequences, first_row + q_len)
        for done in tl.range(first_logit + num_logits, num_logit_rows, BLOCK):
            row = done + tl.arange(0, BLOCK)
            tl.store(logit_rows_ptr + row, tl.zeros((BLOCK,), tl.int64), row < num_logit_rows)
    for done in tl.range(0, q_len, BLOCK):
        offset = done + tl.arange(0, BLOCK)
        is_fed = offset < q_len
        position = start + offset
        token = tl.load(tokens_ptr + slot * tokens_stride + position, is_fed)
        block = tl.load(block_table_ptr + slot * table_stride + position // BLOCK_SIZE, is_fed).to(tl.int64)
        tl.store(token_ids_ptr + first_row + offset, token, is_fed)
        tl.store(positions_ptr + first_row + offset, position, is_fed)
        tl.store(kv_slots_ptr + first_row + offset, block * BLOCK_SIZE + position % BLOCK_SIZE, is_fed)
        row = first_row + q_len - num_logits + offset
        tl.store(logit_rows_ptr + first_logit + offset, row.to(tl.int64), offset < num_logits)


def expand_batch(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
    *,
    num_tokens: int | None = None,
    num_logit_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `specengine.kernels.reference.expand_batch`.

    num_tokens, num_logit_rows: T and R where the host knows them, or upper bounds; without them the sums are read
                                from the device, which waits for it. Beyond the sums logit_rows are 0, so that they
                                can be used as indices, and the tokens are left alone
    """
    check_table("tokens", tokens)
    check_table("block_table", block_table)
    count = slots.numel()
    for name, vector in (("slots", slots), ("start", start), ("q_len", q_len), ("num_logits", num_logits)):
        if vector.shape != (count,) or vector.dtype != torch.int32 or not vector.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [{count}] torch.int32, got {list(vector.shape)} {vector.dtype}"
            )
    if num_tokens is None:
        num_tokens = int(q_len.sum())
    if num_logit_rows is None:
        num_logit_rows = int(num_logits.sum())
    device = tokens.device

    def empty(length: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(length, dtype=dtype, device=device)

    token_ids, positions, kv_slots = empty(num_tokens), empty(num_tokens), empty(num_tokens, torch.int64)
    q_start, context_len, logit_rows = empty(count + 1), empty(count), empty(num_logit_rows, torch.int64)
    if count == 0:
        q_start.zero_()
        logit_rows.zero_()
    launch(
        spec_expand_batch,
        (count,),
        tokens,
        tokens.stride(0),
        block_table,
        block_table.stride(0),
        slots,
        start,
        q_len,
        num_logits,
        token_ids,
        positions,
        kv_slots,
        q_start,
        context_len,
        logit_rows,
        count,
        num_logit_rows,
        BLOCK_SIZE=block_size,
        BLOCK_B=triton.next_power_of_2(max(count, 1)),
        BLOCK=128,
        num_warps=4,
    )
    return token_ids, positions, kv_slots, q_start, context_len, logit_rows
