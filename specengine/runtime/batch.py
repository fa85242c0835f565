"""Builds the one kind of batch there is: for each sequence a start, a length, and how many logits are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import _C
from specengine.kernels.program import ForwardBatch


def build_forward_batch(
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
    where = (slots, start, q_len, num_logits)
    expand = _C.expand_batch if tokens.device.type == "cpu" else _expand
    token_ids, positions, kv_slots, q_start, context_len, logit_rows = expand(
        tokens, block_table, *where, block_size
    )
    return ForwardBatch(token_ids, positions, kv_slots, q_start, context_len, slots, block_table, logit_rows)


def _expand(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
) -> tuple[Tensor, ...]:
    """`_C.expand_batch` on any device."""
    slot, first = slots.long(), start.long()
    row, offset = _ragged(q_len)
    positions = first[row] + offset
    row_slot = slot[row]
    block = block_table[row_slot, positions // block_size].long()
    q_end = q_len.cumsum(0)
    logit_row, logit_offset = _ragged(num_logits)
    return (
        tokens[row_slot, positions],
        positions.int(),
        block * block_size + positions % block_size,
        torch.cat((q_end.new_zeros(1), q_end)).int(),
        start + q_len,
        (q_end - num_logits)[logit_row] + logit_offset,
    )


def row_starts(num_rows: Tensor) -> Tensor:
    """`[B]` int32: where each sequence's rows begin in a ragged concatenation."""
    return (num_rows.cumsum(0) - num_rows).int()


def row_owners(lengths: Tensor) -> Tensor:
    """For rows of the given lengths `[B]` laid end to end: whose each element is, `[sum(lengths)]` int64.

    Not `repeat_interleave`, which forks PyTorch's threads for a handful of numbers: milliseconds on a busy machine.
    """
    ends = lengths.cumsum(0)
    return torch.searchsorted(ends, torch.arange(int(lengths.sum()), device=lengths.device), right=True)


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each element's row and its offset in it, int64."""
    row = row_owners(lengths)
    offset = torch.arange(row.numel(), device=lengths.device) - (lengths.cumsum(0) - lengths)[row]
    return row, offset
