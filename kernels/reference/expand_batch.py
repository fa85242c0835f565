"""From lengths to a ragged batch: which tokens a forward feeds, at which positions, into which cache slots."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Sequence b feeds tokens[slots[b], start[b] : start[b] + q_len[b]] and wants its last num_logits[b] logits.

    tokens:      `[S, max_seq_len]` int32
    block_table: `[S, max_blocks]` int32
    slots, start, q_len, num_logits: `[B]` int32; num_logits <= q_len; where q_len is 0, start may be anything,
                 and the context_len is 0
    num_tokens, num_logit_rows: bounds of T and R for backends that cannot look at the lengths; here, and natively,
                 they are ignored: the results have the exact sizes
    returns      token_ids `[T]` int32, positions `[T]` int32, kv_slots `[T]` int64, q_start `[B + 1]` int32,
                 context_len `[B]` int32 and logit_rows `[R]` int64: the first fields of a `ForwardBatch`
    """
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
        torch.where(q_len > 0, start + q_len, 0),
        (q_end - num_logits)[logit_row] + logit_offset,
    )


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
