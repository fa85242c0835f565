"""What a round feeds, and the record of it that the host reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The columns of `commit_round`'s record that come before the tokens.
NUM_RESULT_COLUMNS = 3
RESULT_EMITTED, RESULT_DRAFTED, RESULT_ERROR = range(NUM_RESULT_COLUMNS)


class RoundPlan(NamedTuple):
    """What the forwards of a round feed: k of the draft model, then one of the target. int32.

    seq_len:       `[B]` committed tokens
    is_running:    `[B]` 1 where the sequence takes part, 0 where it has reached its limit or is padding
    num_draft:     `[B]` tokens to be drafted, 0 … k
    last_position: `[B]` seq_len - 1, where the target's rows begin
    draft_start:   `[k, B]` where forward i of the draft model begins: the last two committed tokens, then the last
                   drawn token (the first of the two may be in its cache already: it is written again, same bits)
    draft_q_len:   `[k, B]` tokens that it feeds: 2, then 1; 0 for a sequence that drafts no more
    is_drafting:   `[k, B]` 1 where the sequence draws draft i
    """

    seq_len: Tensor
    is_running: Tensor
    num_draft: Tensor
    last_position: Tensor
    draft_start: Tensor
    draft_q_len: Tensor
    is_drafting: Tensor
