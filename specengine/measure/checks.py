"""What `specengine verify` is asked, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specengine.outputs import GenerationResult

K = int | str

# A right engine fails one run in so many, with all tests of a run: each has its share of it (Bonferroni).
FALSE_ALARM = 1e-5
BIT_MODES = ("greedy", "coupled")
LAW_MODES = ("rejection", "block")
LOSSLESS, NOT_LOSSLESS, NO_POWER = "lossless", "not lossless", "no power"


@dataclass(frozen=True)
class Plan:
    """What is verified.

    drafters:      what drafts, an engine for each
    modes:         how drafts are judged: `BIT_MODES`, `LAW_MODES`, or a lossy one
    ks:            settings of `num_speculative_tokens`; samples are drawn with each in turn
    num_samples:   for each drafter and mode, spread over the prompts
    num_positions: tokens of a sample
    """

    drafters: list[Any]
    modes: list[str]
    ks: list[K]
    num_samples: int
    num_positions: int

    @property
    def num_checks(self) -> int:
        return len(self.drafters) * len(self.modes)

    @property
    def num_tests(self) -> int:
        """Of laws: each position, and all but the first together."""
        num_laws = sum(mode not in BIT_MODES for mode in self.modes)
        return len(self.drafters) * num_laws * (self.num_positions + 1)

    @property
    def significance(self) -> float:
        """The p-value below which a test fails."""
        return FALSE_ALARM / max(1, self.num_tests)


@dataclass(frozen=True)
class DraftCounts:
    """What became of the drafts of some results. One a round is rejected at most; those behind it are not looked at."""

    num_drafted: int
    num_accepted: int
    num_rejected: int

    @classmethod
    def of(cls, results: Sequence[GenerationResult]) -> DraftCounts:
        parts = [result.metrics.speculative_decoding for result in results]
        return cls(
            sum(part.num_draft_tokens for part in parts),
            sum(part.num_accepted_draft_tokens for part in parts),
            sum(sum(part.rejection_positions) for part in parts),
        )

    @property
    def weakness(self) -> str:
        """Why nothing is shown, if so."""
        if not self.num_drafted:
            return "nothing was drafted"
        if not self.num_accepted:
            return "no draft was accepted"
        return "" if self.num_rejected else "no draft was rejected"


@dataclass(frozen=True)
class PlaceTest:
    """A chi-square test of the places of tokens. name: which tokens of a text"""

    name: str
    num_tokens: int
    statistic: float
    degrees: int
    p_value: float


@dataclass(frozen=True)
class Check:
    """One drafter, and one way to judge its drafts.

    outcome:     `LOSSLESS`, `NOT_LOSSLESS`, or `NO_POWER`: nothing is shown
    reason:      of another outcome than lossless
    num_texts:   that were compared or drawn, with
    drafts:      in these
    control:     what must fail, and did or did not
    tests:       of the law; none where bits are compared
    distance:    total variation between the places of tokens 2, 3, … and their law: the samples are not nearer to the
                 target's
    distance_by_chance: what a right engine stays below in 95 of 100 cases
    """

    drafter: str
    mode: str
    outcome: str
    reason: str
    num_texts: int
    drafts: DraftCounts
    control: str
    tests: list[PlaceTest] = field(default_factory=list)
    distance: float | None = None
    distance_by_chance: float | None = None

    @property
    def smallest_p(self) -> float | None:
        return min((test.p_value for test in self.tests), default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the statistic of what cannot be, which is infinite, is None."""
        found = {**asdict(self), "smallest_p": self.smallest_p}
        for test in found["tests"]:
            if test["statistic"] == float("inf"):
                test["statistic"] = None
        return found
