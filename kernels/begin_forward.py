"""All that comes before a forward's first layer, in one launch: a program a token, which finds its sequence itself.

A token's program looks at the lengths of all sequences, so none needs what another one found; the first also writes
what there is of each sequence, and where logit rows are padded, program r fills row r. Everything is loaded before
anything is stored: a load behind a store waits for it. See `specengine.kernels.reference.begin_forward`.

A round's first forward may be begun from the state itself (`begin_round`): every program then finds what all sequences
feed as `plan_round` does, and the first writes the plan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.race import check_columns, check_table
from specengine.kernels.embed import check_tables
from specengine.kernels.plan_round import RoundState, load_plan, store_plan
from specengine.kernels.row_keys import load_each, store_each
from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.rows import SamplingRows


@triton.jit(
    do_not_specialize=[
        "tokens_stride",
        "table_stride",
        "slots_ptr",
        "start_ptr",
        "q_len_ptr",
        "num_logits_ptr",
        "num_more_ptr",
        "num_sequences",
        "num_logit_rows",
        "draft_positions",
    ]
)
def spec_begin_forward(
    tokens_ptr,
    tokens_stride,
    block_table_ptr,
    table_stride,
    slots_ptr,
    start_ptr,
    q_len_ptr,
    num_logits_ptr,
    num_more_ptr,
    token_ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    q_start_ptr,
    context_len_ptr,
    logit_rows_ptr,
    num_sequences,
    num_logit_rows,
    sequence_ptrs,
    row_ptrs,
    decided_ptr,
    token_table_ptr,
    position_table_ptr,
    hidden_ptr,
    state_ptrs,
    plan_ptr,
    draft_positions,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_FED: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    NUM_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.program_id(0)
    sequences = tl.arange(0, BLOCK_B)
    is_sequence = sequences < num_sequences
    if state_ptrs is None:
        q_lens = tl.load(q_len_ptr + sequences, is_sequence, 0)
        logit_counts = tl.load(num_logits_ptr + sequences, is_sequence, 0)
        starts = tl.load(start_ptr + sequences, is_sequence, 0)
        slots = tl.load(slots_ptr + sequences, is_sequence, 0)
        if num_more_ptr is not None:
            num_more = tl.load(num_more_ptr + sequences, is_sequence, 0)
            q_lens += num_more
            logit_counts += num_more
    else:
        slots = tl.load(slots_ptr + sequences, is_sequence, 0)
        lengths, is_running, num_draft = load_plan(
            slots, is_sequence, state_ptrs[0], state_ptrs[1], state_ptrs[2], draft_positions, K
        )
        logit_counts = (is_running if K == 0 else num_draft > 0).to(tl.int32)
        q_lens = logit_counts * NUM_FED
        starts = lengths - NUM_FED
    ends = tl.cumsum(q_lens, axis=0)
    is_before = is_sequence & (ends <= row)
    owner = tl.sum(is_before.to(tl.int32), axis=0)
    is_fed = owner < num_sequences
    # Whose the rows of padding are matters to nobody.
    owner = tl.minimum(owner, num_sequences - 1)
    is_own = sequences == owner
    offset = row - tl.sum(tl.where(is_before, q_lens, 0), axis=0)
    first_unwanted = tl.sum(tl.where(is_own, q_lens - logit_counts, 0), axis=0)
    first_logit = tl.sum(tl.where(is_before, logit_counts, 0), axis=0)
    total_logits = tl.sum(logit_counts, axis=0)
    position = tl.sum(tl.where(is_own, starts, 0), axis=0) + offset
    slot = tl.sum(tl.where(is_own, slots, 0), axis=0).to(tl.int64)
    # The row of logits that this token has, and the one of padding that its program fills.
    kind = tl.arange(0, 2)
    logit_row = tl.where(kind == 0, first_logit + offset - first_unwanted, row)
    is_wanted = is_fed & (offset >= first_unwanted)
    is_padding = (row >= total_logits) & (row < num_logit_rows)
    is_logit_row = tl.where(kind == 0, is_wanted.to(tl.int32), is_padding.to(tl.int32)) != 0

    token = tl.load(tokens_ptr + slot * tokens_stride + position, is_fed, 0)
    block = tl.load(block_table_ptr + slot * table_stride + position // BLOCK_SIZE, is_fed, 0).to(tl.int64)
    if row_ptrs is not None:
        keys = load_each(sequence_ptrs, owner, is_wanted | is_padding)
    if hidden_ptr is not None:
        columns = tl.arange(0, BLOCK)
        is_column = columns < tl.where(is_fed, WIDTH, 0)
        if position_table_ptr is not None:
            known = tl.minimum(tl.maximum(position, 0), NUM_POSITIONS - 1).to(tl.int64)
            place = tl.load(position_table_ptr + known * WIDTH + columns, is_column)
        known_token = tl.minimum(tl.maximum(token, 0), NUM_TOKENS - 1).to(tl.int64)
        hidden = tl.load(token_table_ptr + known_token * WIDTH + columns, is_column).to(tl.float32)
        if position_table_ptr is not None:
            hidden += place.to(tl.float32)
        tl.store(hidden_ptr + row.to(tl.int64) * WIDTH + columns, hidden, is_column)

    tl.store(token_ids_ptr + row, token, is_fed)
    tl.store(positions_ptr + row, position, is_fed)
    tl.store(kv_slots_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE, is_fed)
    tl.store(logit_rows_ptr + logit_row, tl.where(kind == 0, row, 0).to(tl.int64), is_logit_row)
    if row_ptrs is not None:
        store_each(row_ptrs, keys, logit_row, is_logit_row)
        tl.store(decided_ptr + logit_row, position + 1, is_logit_row)
    if row == 0:
        tl.store(q_start_ptr, 0)
        tl.store(q_start_ptr + 1 + sequences, ends, is_sequence)
        tl.store(context_len_ptr + sequences, tl.where(q_lens > 0, starts + q_lens, 0), is_sequence)
        if state_ptrs is not None:
            store_plan(
                plan_ptr, sequences, is_sequence, num_sequences, lengths, is_running, num_draft, K, BLOCK_K
            )


class Feed(NamedTuple):
    """What sequences feed, `[B]` int32 each; see `specengine.kernels.reference.begin_forward`. Without
    the first three it is a round's."""

    start: Tensor | None = None
    q_len: Tensor | None = None
    num_logits: Tensor | None = None
    num_more: Tensor | None = None


class RoundFeed(NamedTuple):
    """The last num_fed committed tokens of whoever takes part in a round, for the last one's logits."""

    state: RoundState
    num_fed: int


class Entry(NamedTuple):
    """What `spec_begin_forward` makes besides token rows: keys of logit rows, and what enters the first layer."""

    rows: SamplingRows
    token_table: Tensor
    position_table: Tensor | None


def begin_forward(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
    rows: SamplingRows,
    token_table: Tensor,
    position_table: Tensor | None,
    *,
    num_tokens: int | None = None,
    num_logit_rows: int | None = None,
    num_more: Tensor | None = None,
) -> ForwardStart:
    """See `specengine.kernels.reference.begin_forward`, and `expand_batch` for bounds. Rows of padding have keys that
    some sequence has; hidden is left alone there."""
    check_tables(token_table, position_table)
    entry, feed = Entry(rows, token_table, position_table), Feed(start, q_len, num_logits, num_more)
    return launch_begin(tokens, block_table, slots, feed, block_size, num_tokens, num_logit_rows, entry)


def launch_begin(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    feed: Feed | RoundFeed,
    block_size: int,
    num_tokens: int | None,
    num_logit_rows: int | None,
    entry: Entry | None,
) -> ForwardStart:
    """One launch of `spec_begin_forward`; without an entry there are neither hidden rows nor keys. With a round's feed
    the numbers of rows are given."""
    check_table("tokens", tokens)
    check_table("block_table", block_table)
    count, device = slots.numel(), tokens.device
    lengths, begun = (feed, None) if isinstance(feed, Feed) else (Feed(), feed)
    for name, vector in {"slots": slots, **lengths._asdict()}.items():
        if vector is None:
            continue
        if vector.shape != (count,) or vector.dtype != torch.int32 or not vector.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [{count}] torch.int32, got {list(vector.shape)} {vector.dtype}"
            )
    if num_tokens is None:
        num_tokens = _total(lengths.q_len, lengths.num_more)
    if num_logit_rows is None:
        num_logit_rows = _total(lengths.num_logits, lengths.num_more)

    def empty(length: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(length, dtype=dtype, device=device)

    token_ids, positions, kv_slots = empty(num_tokens), empty(num_tokens), empty(num_tokens, torch.int64)
    q_start, context_len, logit_rows = empty(count + 1), empty(count), empty(num_logit_rows, torch.int64)
    if count == 0:
        q_start.zero_()
        logit_rows.zero_()
    expanded = (token_ids, positions, kv_slots, q_start, context_len, logit_rows)
    given = token_table = position_table = hidden = row_keys = None
    if entry is not None:
        rows, token_table, position_table = entry
        given = check_columns(rows, count)
        row_keys = (
            SamplingRows(*(each.new_empty(num_logit_rows) for each in given)),
            empty(num_logit_rows),
        )
        hidden = torch.empty(num_tokens, token_table.shape[1], device=device)
    width = 1 if hidden is None else hidden.shape[1]
    k = 0 if begun is None else begun.state.k
    launch(
        spec_begin_forward,
        (max(1, num_tokens, num_logit_rows) if count else 0,),
        tokens,
        tokens.stride(0),
        block_table,
        block_table.stride(0),
        slots,
        *lengths,
        *expanded,
        count,
        num_logit_rows,
        given,
        None if row_keys is None else tuple(row_keys[0]),
        None if row_keys is None else row_keys[1],
        token_table,
        position_table,
        hidden,
        None if begun is None else begun.state.tensors,
        None if begun is None else begun.state.plan,
        None if begun is None else begun.state.draft_positions,
        K=k,
        BLOCK_K=triton.next_power_of_2(max(k, 1)),
        NUM_FED=0 if begun is None else begun.num_fed,
        NUM_TOKENS=1 if token_table is None else token_table.shape[0],
        NUM_POSITIONS=1 if position_table is None else position_table.shape[0],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_SIZE=block_size,
        BLOCK_B=triton.next_power_of_2(max(count, 1)),
        num_warps=4,
    )
    return ForwardStart(*expanded, hidden, row_keys)


def _total(*counts: Tensor | None) -> int:
    return sum(int(each.sum()) for each in counts if each is not None)
