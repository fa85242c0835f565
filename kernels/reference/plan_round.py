"""What a round's forwards feed, found from the state of its sequences: the host need not know their lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.types.round import RoundPlan


def plan_round(
    slots: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
) -> RoundPlan:
    """k_b = min(num_speculative, length_limit - seq_len - 1, draft_positions - seq_len + 1, k), at least 0.

    A round emits up to k_b + 1 tokens, so it never passes the limit; the draft model's last forward feeds position
    seq_len + k_b - 2.

    slots:           `[B]` int32, rows of the next three
    seq_len:         `[S]` int32, committed tokens
    length_limit:    `[S]` int32, the most tokens a sequence may have; from there on it does not run
    num_speculative: `[S]` int32, drafts asked for
    k:               the most drafts of any sequence in this round
    draft_positions: positions that the draft model has
    """
    slot = slots.long()
    length, limit = seq_len[slot], length_limit[slot]
    is_running = length < limit
    room = torch.minimum(limit - length - 1, (draft_positions - length.long() + 1).clamp_max(k).int())
    num_draft = torch.minimum(num_speculative[slot], room).clamp(0, k) * is_running
    step = torch.arange(k, dtype=torch.int32, device=slots.device)[:, None]
    is_drafting = (step < num_draft).int()
    return RoundPlan(
        seq_len=length,
        is_running=is_running.int(),
        num_draft=num_draft,
        last_position=length - 1,
        draft_start=length + torch.where(step == 0, -2, step - 1),
        draft_q_len=is_drafting * (1 + (step == 0).int()),
        is_drafting=is_drafting,
    )
