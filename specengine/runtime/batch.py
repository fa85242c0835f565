"""Builds the one kind of batch there is: for each sequence a start, a length, and how many logits are wanted."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.program import ForwardBatch
from specengine.ops import Backend


def build_forward_batch(
    backend: Backend,
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    *,
    block_size: int,
) -> ForwardBatch:
    """Sequence b feeds tokens[slots[b], start[b] : start[b] + q_len[b]] and wants its last num_logits[b] logits.

    tokens:      `[S, max_seq_len]` int32, committed tokens and, beyond them, staged drafts
    block_table: `[S, max_blocks]` int32
    slots, start, q_len, num_logits: `[B]` int32
    """
    token_ids, positions, kv_slots, q_start, context_len, logit_rows = backend.expand_batch(
        tokens, block_table, slots, start, q_len, num_logits, block_size
    )
    return ForwardBatch(token_ids, positions, kv_slots, q_start, context_len, slots, block_table, logit_rows)


def row_starts(num_rows: Tensor) -> Tensor:
    """`[B]` int32: where each sequence's rows begin in a ragged concatenation."""
    return (num_rows.cumsum(0) - num_rows).int()
