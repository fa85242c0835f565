"""Makes what a round emitted part of its sequences, and leaves a record of it for the host."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Appends emitted[b, : num_accepted[b] + 1] to sequence b, unless it does not run or its target failed.

    A sequence with an error gets length_limit 0, so that it does not run again.

    tokens:       `[S, n]` int32, written from tokens[slots[b], start[b]] on
    seq_len:      `[S]` int32, written: start[b] + num_accepted[b] + 1
    length_limit: `[S]` int32, written where there was an error
    slots, start, is_running, num_accepted, num_draft, error: `[B]` int32; start: committed tokens before this round
    emitted:      `[B, k + 1]` int32
    returns       `[B, 3 + k + 1]` int32: tokens emitted (0 for a sequence that does not run or has an error), drafts
                  that were judged, error, and the row of `emitted`
    """
    slot = slots.long()
    is_error = (error != 0) & (is_running != 0)
    is_committed = (is_running != 0) & ~is_error
    num_emitted = (num_accepted + 1) * is_committed
    for b in is_committed.nonzero()[:, 0].tolist():
        first, count = int(start[b]), int(num_emitted[b])
        tokens[slot[b], first : first + count] = emitted[b, :count]
        seq_len[slot[b]] = first + count
    length_limit[slot[is_error]] = 0
    columns = (num_emitted.int(), num_draft * (is_running != 0), is_error.int())
    return torch.cat((torch.stack(columns, dim=1).int(), emitted), dim=1)
