"""What each sequence asks to be done to its logits, in one launch.

Each program copies one tile of a row, penalises what was seen before, and applies the entries for its tokens in their
order. Reads the logits once and writes them once (twice with a penalty); see
`specengine.kernels.reference.transform_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import count_rows
from specengine.kernels.device.race import check_logits, check_small, check_table
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms

# Logits of a program, and entries and tokens of the past that it looks at together to find its own. (With 512 tokens
# registers are spilled on sm_90.)
TILE = 1024
BLOCK_E = 64
BLOCK_H = 256
# Tokens of a prefix that are compared together.
BLOCK_P = 16


@triton.jit(do_not_specialize=["num_sequences", "num_tokens"])
def spec_transform_rows(
    logits_ptr,
    logits_stride,
    out_ptr,
    slot_ptr,
    q_start_ptr,
    position_ptr,
    logit_row_ptr,
    penalty_ptr,
    presence_ptr,
    frequency_ptr,
    prompt_length_ptr,
    history_ptr,
    history_stride,
    num_entries_ptr,
    token_ptr,
    value_ptr,
    first_ptr,
    end_ptr,
    prefix_start_ptr,
    prefix_length_ptr,
    prefix_ptr,
    entry_stride,
    prefix_stride,
    num_sequences,
    num_tokens,
    num_rows_ptr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.program_id(0)
    if row >= count_rows(tl.num_programs(0), num_rows_ptr):
        return
    place = tl.load(logit_row_ptr + row)
    sequences = tl.arange(0, BLOCK_B)
    ends = tl.load(q_start_ptr + 1 + sequences, sequences < num_sequences, 2**31 - 1)
    owner = tl.minimum(tl.sum((ends <= place).to(tl.int32)), num_sequences - 1)
    place = tl.minimum(tl.maximum(place, 0), num_tokens - 1)
    slot, position = tl.load(slot_ptr + owner), tl.load(position_ptr + place) + 1
    history_ptr += slot.to(tl.int64) * history_stride

    first_token = tl.program_id(1) * TILE
    tokens = first_token + tl.arange(0, TILE)
    is_token = tokens < VOCAB
    logits_ptr += row.to(tl.int64) * logits_stride
    out_ptr += row.to(tl.int64) * VOCAB
    logits = tl.load(logits_ptr + tokens, is_token)

    penalty = tl.load(penalty_ptr + owner)
    if penalty != 1.0:
        tl.store(out_ptr + tokens, logits, is_token)
        tl.debug_barrier()  # the copies come before what is written over them
        end_token = tl.minimum(first_token + TILE, VOCAB)
        for block in range(0, position, BLOCK_H):
            earlier = block + tl.arange(0, BLOCK_H)
            at = history_ptr + earlier
            token = tl.load(at, earlier < position, -1)
            is_own = (token >= first_token) & (token < end_token)
            # Of a token that was seen twice, the same is written twice.
            seen = tl.load(logits_ptr + token, is_own, 0.0)
            seen = tl.where(seen < 0.0, seen * penalty, tl.div_rn(seen, penalty))
            tl.store(out_ptr + token, seen, is_own)
        tl.debug_barrier()
        logits = tl.load(out_ptr + tokens, is_token)

    presence, frequency = tl.load(presence_ptr + owner), tl.load(frequency_ptr + owner)
    if (presence != 0.0) | (frequency != 0.0):
        count = tl.zeros((TILE,), tl.int32)
        for block in range(tl.load(prompt_length_ptr + owner), position, BLOCK_H):
            generated = block + tl.arange(0, BLOCK_H)
            at = history_ptr + generated
            token = tl.load(at, generated < position, -1) - first_token
            is_own = (token >= 0) & (token < TILE)
            count += tl.histogram(tl.where(is_own, token, 0), TILE, is_own)
        logits = tl.where(count > 0, logits - count * frequency - presence, logits)

    # The slot's entries are in order of their tokens: those of this tile are begin … end - 1.
    num_entries, entries = tl.load(num_entries_ptr + slot), slot * entry_stride
    begin, end = 0, 0
    for block in range(0, num_entries, BLOCK_E):
        entry = block + tl.arange(0, BLOCK_E)
        token = tl.load(token_ptr + entries + entry, entry < num_entries, 2**31 - 1)
        begin += tl.sum((token < first_token).to(tl.int32))
        end += tl.sum((token < first_token + TILE).to(tl.int32))
    for entry in range(entries + begin, entries + end):
        length = tl.load(prefix_length_ptr + entry)
        holds = (tl.load(first_ptr + entry) <= position) & (position < tl.load(end_ptr + entry))
        holds &= length <= position
        wanted = prefix_ptr + slot * prefix_stride + tl.load(prefix_start_ptr + entry)
        found = history_ptr + position - length
        for block in range(0, tl.where(holds, length, 0), BLOCK_P):
            offset = block + tl.arange(0, BLOCK_P)
            is_part = offset < length
            differs = tl.load(wanted + offset, is_part, 0) != tl.load(found + offset, is_part, 0)
            holds &= tl.sum(differs.to(tl.int32)) == 0
        is_changed = (tokens == tl.load(token_ptr + entry)) & holds
        logits = tl.where(is_changed, logits + tl.load(value_ptr + entry), logits)
    tl.store(out_ptr + tokens, logits, is_token)


def transform_rows(
    logits: Tensor,
    rows: SamplingRows,
    slots: Tensor,
    q_start: Tensor,
    positions: Tensor,
    logit_rows: Tensor,
    transforms: Transforms,
    *,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.transform_rows`.

    logit_rows outside the tokens are taken as the nearest that exist.
    num_rows: `[1]` int32 on the device: rows from there on are padding, and nothing is written for them
    """
    check_logits("logits", logits)
    num_logit_rows, vocab_size = logits.shape
    count, num_tokens = slots.numel(), positions.numel()
    num_slots, capacity = transforms.token.shape
    table, prefix_capacity = (num_slots, capacity), transforms.prefix.shape[-1]
    if num_logit_rows and not (count and num_tokens):
        raise ValueError(f"logit_rows: {num_logit_rows} rows of {count} sequences with {num_tokens} tokens")
    out = torch.empty(num_logit_rows, vocab_size, device=logits.device)
    launch(
        spec_transform_rows,
        (num_logit_rows, ceil_div(vocab_size, TILE)),
        logits,
        logits.stride(0),
        out,
        check_small("slots", slots, (count,), torch.int32),
        check_small("q_start", q_start, (count + 1,), torch.int32),
        check_small("positions", positions, (num_tokens,), torch.int32),
        check_small("logit_rows", logit_rows, (num_logit_rows,), torch.int64),
        check_small("repetition_penalty", rows.repetition_penalty, (count,), torch.float32),
        check_small("presence_penalty", rows.presence_penalty, (count,), torch.float32),
        check_small("frequency_penalty", rows.frequency_penalty, (count,), torch.float32),
        check_small("prompt_length", rows.prompt_length, (count,), torch.int32),
        check_table("history", transforms.history),
        transforms.history.stride(0),
        check_small("num_entries", transforms.num_entries, (num_slots,), torch.int32),
        check_small("token", transforms.token, table, torch.int32),
        check_small("value", transforms.value, table, torch.float32),
        check_small("first", transforms.first, table, torch.int32),
        check_small("end", transforms.end, table, torch.int32),
        check_small("prefix_start", transforms.prefix_start, table, torch.int32),
        check_small("prefix_length", transforms.prefix_length, table, torch.int32),
        check_small("prefix", transforms.prefix, (num_slots, prefix_capacity), torch.int32),
        capacity,
        prefix_capacity,
        count,
        num_tokens,
        num_rows,
        VOCAB=vocab_size,
        TILE=TILE,
        BLOCK_B=triton.next_power_of_2(max(count, 1)),
        BLOCK_E=BLOCK_E,
        BLOCK_H=BLOCK_H,
        BLOCK_P=BLOCK_P,
        num_warps=4,
    )
    return out
