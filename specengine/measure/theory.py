"""What speculation should gain: tokens a round, speed-up, and the best number of drafts.

A round drafts k tokens and keeps the accepted ones up to the first that is rejected, and one token of the target's own.
With a_m the chance that draft m is accepted if all before it were, draft j is kept with the chance a_1 · … · a_j, so

    E[tokens a round] = 1 + Σ_{j = 1 … k} Π_{m ≤ j} a_m          (all a_m = α: (1 - α^(k + 1)) / (1 - α))
    speed-up          = E / (k c + v)

where times count in plain target forwards: c is a draft step, v the forward that verifies (1 if k + 1 rows cost what
one costs). With equal a_m and v = 1 it is theorem 3.8 of Leviathan et al. 2023 (arXiv 2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What parts of a round take, in units of a plain round (one target forward over one row, and its overhead).

    draft:  c, one step of the draft
    verify: v, all of a round that is not drafting: the target's forward over k + 1 rows, judging, overhead

    Raises `ValueError` where draft is negative or verify not positive, or one of them not finite.
    """

    draft: float
    verify: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.draft) and self.draft >= 0):
            raise ValueError(f"draft must be a finite number of at least 0, not {self.draft}")
        if not (math.isfinite(self.verify) and self.verify > 0):
            raise ValueError(f"verify must be a finite number above 0, not {self.verify}")

    def round(self, num_drafts: int) -> float:
        """Time of a round with `num_drafts` drafts: k c + v, and 1 without drafts."""
        return num_drafts * self.draft + self.verify if num_drafts else 1.0


def expected_tokens(acceptances: Sequence[float]) -> float:
    """Tokens that a round gives on average: 1 + Σ_j Π_{m ≤ j} a_m.

    acceptances: [k], a_m = P(draft m is accepted | all before it were); for one α, `[alpha] * k`

    Raises `ValueError` for what is no probability.
    """
    total = kept = 1.0
    for acceptance in acceptances:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"an acceptance is a probability, from 0 to 1, not {acceptance}")
        kept *= acceptance
        total += kept
    return total


def speed_up(acceptances: Sequence[float], costs: Costs) -> float:
    """Speed beside plain decoding, with as many drafts as `acceptances` has entries: E / (k c + v); 1 with none."""
    return expected_tokens(acceptances) / costs.round(len(acceptances))


def best_num_drafts(acceptances: Sequence[float], costs: Costs) -> tuple[int, float]:
    """The k, from 0 to `len(acceptances)`, of the highest speed-up, and that speed-up; of equals, the smallest k."""
    speeds = [speed_up(acceptances[:k], costs) for k in range(len(acceptances) + 1)]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    return best, speeds[best]


def break_even_acceptance(num_drafts: int, costs: Costs) -> float | None:
    """The α from which `num_drafts` drafts a round are no slower than plain decoding; None if not even α = 1 is enough.

    The speed-up grows with α, so it is found by halving.
    """
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    if speed_up([1.0] * num_drafts, costs) < 1:
        return None
    low, high = 0.0, 1.0
    if speed_up([low] * num_drafts, costs) >= 1:
        return low
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if speed_up([middle] * num_drafts, costs) >= 1 else (middle, high)
    return high


def popular_formula(acceptance: float, num_drafts: int) -> float:
    """γ / (1 + (1 - α) γ), which circulates as the speed-up of γ drafts. It is wrong, and here to be compared with.

    It reads as γ tokens for one verification and one more forward for each of the (1 - α) γ drafts that are rejected.
    But a round ends at its first rejection and takes one forward whatever is rejected; its last token is the target's
    own, so at α = 1 it gives γ + 1 tokens, at α = 0 one; and drafting costs time, here none, so that more drafts always
    look better.
    """
    return num_drafts / (1 + (1 - acceptance) * num_drafts)


def conditional_acceptances(
    num_accepted_by_position: Sequence[int], rejection_positions: Sequence[int]
) -> list[float]:
    """[k], a_m of `expected_tokens`, from a run's `SpeculativeDecodingMetrics`; it ends before the first position that
    no round came to.

    A round comes to position m if it drafted so far and accepted everything before: it then accepts there or has its
    first rejection there. So a_m = accepted_m / (accepted_m + rejected_m), also where rounds drafted unequally.
    """
    result: list[float] = []
    for accepted, rejected in zip(num_accepted_by_position, rejection_positions, strict=True):
        if not accepted + rejected:
            break
        result.append(accepted / (accepted + rejected))
    return result


def equal_acceptance(mean_tokens: float, num_drafts: int) -> float:
    """The one α with which rounds of `num_drafts` drafts give `mean_tokens` tokens on average.

    Where a measured run lies on the curves of equal acceptances; the inverse of `expected_tokens([alpha] * k)`.
    Raises `ValueError` if `mean_tokens` is not within 1 … k + 1, or k is not at least 1.
    """
    if num_drafts < 1:
        raise ValueError(f"num_drafts must be at least 1, not {num_drafts}")
    if not 1 <= mean_tokens <= num_drafts + 1:
        raise ValueError(f"{num_drafts} drafts give 1 to {num_drafts + 1} tokens a round, not {mean_tokens}")
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens([middle] * num_drafts) < mean_tokens else (low, middle)
    return high if mean_tokens > 1 else 0.0
