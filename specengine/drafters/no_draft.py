"""No drafting: every round has k = 0, which is plain decoding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from specengine.drafters.base import DraftProposal, DraftSource, RowResult
from specengine.runtime.sequence import Sequence as HostSequence
from specengine.runtime.state import BatchState, RunningBatch


class NoDrafter:
    """Proposes nothing."""

    name = "none"
    draft_positions = 2**31 - 1
    may_run_ahead = True

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """Nothing to do."""
        return self.name

    def source(self, batch: RunningBatch, state: BatchState) -> DraftSource:
        """There are none."""
        return DraftSource()

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """Empty proposals: `[B, 0]`."""
        return DraftProposal(batch.slots.new_empty(batch.slots.numel(), 0), batch.planned.num_draft)

    def observe(self, batch: RunningBatch, results: Sequence[RowResult | None]) -> None:
        """Nothing to do."""

    def hear(self, sequence: HostSequence) -> None:
        """Nothing to do."""

    def release(self, sequence_id: int) -> None:
        """Nothing to do."""

    def first_written(self, sequence: HostSequence) -> int | None:
        """It has no keys and values."""
        return None
