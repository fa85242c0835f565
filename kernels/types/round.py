"""What a round feeds, and the record of it that the host reads."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms

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


class StateTensors(NamedTuple):
    """What a round reads and writes of all slots, int32: `[S, P]`, `[S, M]`, and three times `[S]`; see `RunningBatch`
    and the ops `plan_round` and `commit_round`."""

    tokens: Tensor
    block_table: Tensor
    seq_len: Tensor
    length_limit: Tensor
    num_speculative: Tensor


class RoundTensors(NamedTuple):
    """A round of B sequences that are decided by draws, as whoever runs it in one call is given it.

    slots, rows, transforms: the sequences, `[B]`; what judges them; and what is done to logits first, or None
    given:  `[B, k]` and `[B]` int32, drafts and how many there are; None where a model draws them, and for k = 0
    k, draft_positions: see the `plan_round` op
    forced_acceptance:  see the `match_draws` op
    """

    state: StateTensors
    slots: Tensor
    rows: SamplingRows
    transforms: Transforms | None
    given: tuple[Tensor, Tensor] | None
    k: int
    draft_positions: int
    forced_acceptance: float | None


class BoundRound(Protocol):
    """A round in one call, on tensors that it was bound to: it runs again and again on what is in them."""

    def run(
        self, max_rounds: int, max_seconds: float, stop_ids: list[int]
    ) -> list[tuple[list[list[int]], tuple[float, float, float]]]:
        """One round or more, until so many are done, that time is over, or a sequence has ended: by one of these
        tokens, its length or an error.

        Of each the rows of `commit_round`'s record, behind its columns the emitted tokens alone; and the seconds that
        drafts, verification and commit took.
        """

    def drafts(self) -> list[list[int]]:
        """What the latest run judged of each sequence, and then anything."""
