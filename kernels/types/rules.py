"""How drafts are judged: one id a rule, one op a rule."""

from __future__ import annotations

from enum import IntEnum

from specengine.rng import STREAM_DRAFT, STREAM_TARGET


class Rule(IntEnum):
    """How a sequence's drafts are judged: a column of `SamplingRows`. A sequence without drafts is judged by MATCH.

    op:           the op that judges; all of them have one signature, see `specengine.kernels.reference`
    draft_stream: the stream of `specengine.rng` that a draft model draws with; drafts drawn with the target's own
                  noise are compared with its draws, the others are judged by the law they were drawn from
    """

    op: str
    draft_stream: int

    def __new__(cls, number: int, op: str, draft_stream: int) -> Rule:
        rule = int.__new__(cls, number)
        rule._value_ = number
        rule.op, rule.draft_stream = op, draft_stream
        return rule

    MATCH = 0, "match_verify", STREAM_TARGET
    REJECTION = 1, "rejection_verify", STREAM_DRAFT
    BLOCK = 2, "block_verify", STREAM_DRAFT
    THRESHOLD = 3, "threshold_verify", STREAM_DRAFT
    TYPICAL = 4, "typical_verify", STREAM_DRAFT

    @property
    def reads_law(self) -> bool:
        """Whether it judges by probabilities (if it is lossless, those of the law that a draft was drawn from, too)."""
        return self.draft_stream != STREAM_TARGET

    @property
    def judges_in_order(self) -> bool:
        """Whether what becomes of a draft depends on its own row and earlier ones only, not on rows behind it."""
        return self != Rule.BLOCK

    @property
    def is_lossless(self) -> bool:
        """Whether what it lets through is distributed as the target says."""
        return self not in (Rule.THRESHOLD, Rule.TYPICAL)
