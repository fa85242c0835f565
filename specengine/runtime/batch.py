"""Builds the one kind of batch there is: for each sequence a start, a length, and how many logits are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.models.decoder import ForwardBatch


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
    slot, first = slots.long(), start.long()
    row, offset = _ragged(q_len)
    positions = first[row] + offset
    row_slot = slot[row]
    block = block_table[row_slot, positions // block_size].long()
    q_end = q_len.cumsum(0)
    logit_row, logit_offset = _ragged(num_logits)
    return ForwardBatch(
        token_ids=tokens[row_slot, positions],
        positions=positions.int(),
        kv_slots=block * block_size + positions % block_size,
        q_start=torch.cat((q_end.new_zeros(1), q_end)).int(),
        context_len=start + q_len,
        slots=slots,
        block_table=block_table,
        logit_rows=(q_end - num_logits)[logit_row] + logit_offset,
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
