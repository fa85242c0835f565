"""Builds the one kind of batch there is: for each sequence a start, a length, and how many logits are wanted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from specengine.kernels.types.program import ForwardBatch, ForwardStart
from specengine.kernels.types.round import RoundPlan, StateTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend


class Feed(NamedTuple):
    """What a forward feeds: sequence b its q_len[b] tokens from start[b] on, for its last num_logits[b] logits.

    start, q_len, num_logits: `[B]` int32; the same tensor for the last two: every token's logits are wanted
    max_tokens, max_logits:   bounds of their sums, as the host knows them
    num_more:                 `[B]` int32, to be added to q_len and num_logits; None: nothing
    """

    start: Tensor
    q_len: Tensor
    num_logits: Tensor
    max_tokens: int
    max_logits: int
    num_more: Tensor | None = None


class FirstForward(NamedTuple):
    """The forward that a round begins with: it feeds the last num_fed committed tokens of each sequence that drafts, or
    that runs, where nobody may draft.

    token_table, position_table: the model's, which enter the first layer
    """

    num_fed: int
    block_size: int
    token_table: Tensor
    position_table: Tensor | None


def build_forward_batch(
    backend: Backend,
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    feed: Feed,
    entry: tuple[SamplingRows, Tensor, Tensor | None] | None = None,
    *,
    block_size: int,
) -> ForwardBatch:
    """Sequence b feeds tokens[slots[b], start[b] : start[b] + q_len[b]].

    tokens:      `[S, max_seq_len]` int32, committed tokens and, beyond them, staged drafts
    block_table: `[S, max_blocks]` int32
    slots:       `[B]` int32
    entry:       what the sequences are judged by, `[B]`, and the model's embedding tables: where launches are dear,
                 `begin_forward` does with them what else comes before the layers
    """
    start, q_len, num_logits, num_tokens, num_logit_rows, num_more = feed
    where, logit_stride = (tokens, block_table, slots, start), int(num_logits is q_len)
    if entry is not None and backend.has_launches:
        started = backend.begin_forward(
            *where,
            q_len,
            num_logits,
            block_size,
            *entry,
            num_tokens=num_tokens,
            num_logit_rows=num_logit_rows,
            num_more=num_more,
        )
    else:
        if num_more is not None:
            q_len = q_len + num_more
            num_logits = q_len if logit_stride else num_logits + num_more
        expanded = backend.expand_batch(
            *where, q_len, num_logits, block_size, num_tokens=num_tokens, num_logit_rows=num_logit_rows
        )
        started = ForwardStart(*expanded, hidden=None, row_keys=None)
    return _complete(backend, started, slots, block_table, logit_stride=logit_stride)


def begin_round(
    backend: Backend,
    state: StateTensors,
    slots: Tensor,
    rows: SamplingRows,
    first: FirstForward,
    *,
    k: int,
    draft_positions: int,
) -> tuple[RoundPlan, ForwardBatch]:
    """A round's plan, and its first forward.

    slots: `[B]` int32
    rows:  what the sequences are judged by, `[B]`
    """
    plan, started = backend.begin_round(
        state.tokens,
        state.block_table,
        slots,
        state.seq_len,
        state.length_limit,
        state.num_speculative,
        k,
        draft_positions,
        first.num_fed,
        first.block_size,
        rows,
        first.token_table,
        first.position_table,
    )
    return plan, _complete(backend, started, slots, state.block_table, logit_stride=first.num_fed)


def _complete(
    backend: Backend, started: ForwardStart, slots: Tensor, block_table: Tensor, *, logit_stride: int
) -> ForwardBatch:
    """The batch of a forward that has been begun."""
    token_ids, positions, kv_slots, q_start, context_len, logit_rows = started.expanded
    num_tokens = q_start[-1:] if backend.has_padding else None
    return ForwardBatch(
        token_ids,
        positions,
        kv_slots,
        q_start,
        context_len,
        slots,
        block_table,
        logit_rows,
        logit_stride=logit_stride,
        num_tokens=num_tokens,
        num_logit_rows=num_tokens if logit_stride == 1 else None,
        hidden=started.hidden,
        row_keys=started.row_keys,
    )
