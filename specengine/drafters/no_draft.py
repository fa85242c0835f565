"""No drafting: every round has k = 0, which is plain decoding."""

from __future__ import annotations

from torch import Tensor

from specengine.drafters.base import DraftProposal
from specengine.runtime.state import RunningBatch


class NoDrafter:
    """Proposes nothing."""

    name = "none"

    def propose(self, batch: RunningBatch) -> DraftProposal:
        """Empty proposals: `[B, 0]`."""
        tokens = batch.seq_len.new_zeros(batch.size, 0)
        return DraftProposal(tokens, batch.seq_len.new_zeros(batch.size))

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Nothing to do."""

    def release(self, sequence_id: int) -> None:
        """Nothing to do."""
