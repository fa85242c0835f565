"""What a way to draft should gain with any number of drafts, from a few that were measured: `specengine tune`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from specengine.measure.records import Record
from specengine.measure.summary import seconds_a_token
from specengine.measure.theory import (
    Costs,
    break_even_acceptance,
    conditional_acceptances,
    equal_acceptance,
    expected_tokens,
)

# Drafts a round that are considered.
MOST_DRAFTS = 16
_UNSURE = ": that would pay a little, and measured in turns it did not"


@dataclass(frozen=True)
class Survey:
    """One way to draft, measured with a few numbers of drafts.

    plain:      seconds of a round without drafts
    rounds:     by drafts a round, seconds of one: the medians; of a lookup what its tokens took, over its rounds
    acceptance: [m], as in `theory.expected_tokens`
    num_judged: rounds in which the first draft was accepted or not
    draft:      seconds of one draft; None where rounds are one part
    speeds:     by drafts a round, measured plain seconds a token / seconds a token
    tokens:     by drafts a round, measured tokens a round
    is_lookup:  whether rounds have as many drafts as were found, not as many as were asked for
    """

    plain: float
    rounds: dict[int, float]
    acceptance: list[float]
    num_judged: int
    draft: float | None
    speeds: dict[int, float]
    tokens: dict[int, float]
    is_lookup: bool

    @property
    def num_drafts(self) -> list[int]:
        """The numbers of drafts that can be predicted: of a lookup those that were measured."""
        return sorted(self.rounds) if self.is_lookup else list(range(1, MOST_DRAFTS + 1))

    def round_seconds(self, k: int) -> float:
        """Of a round with k drafts: on the line through the two measured ones that are nearest."""
        places = sorted(self.rounds)
        if k in self.rounds or len(places) == 1:
            return self.rounds[k if k in self.rounds else places[0]]
        above = next((at for at, place in enumerate(places) if place > k), len(places) - 1)
        low, high = places[max(0, above - 1)], places[max(1, above)]
        slope = (self.rounds[high] - self.rounds[low]) / (high - low)
        return max(self.rounds[low] + slope * (k - low), 1e-9)

    def acceptances(self, k: int) -> list[float]:
        """[k]; of positions that were never come to, the last one's."""
        known = self.acceptance[:k]
        return known + [known[-1] if known else 0.0] * (k - len(known))

    def predict(self, k: int) -> float:
        """Speed beside plain rounds of this engine: tokens a round, over what it takes in plain rounds; of a lookup as
        it was measured."""
        if self.is_lookup:
            return self.speeds[k]
        return expected_tokens(self.acceptances(k)) * self.plain / self.round_seconds(k)

    def costs(self, k: int) -> Costs:
        """In plain rounds: a draft, and all else of a round with k drafts."""
        whole = self.round_seconds(k) / self.plain
        if self.draft is None:
            return Costs(draft=max(0.0, whole - 1.0) / k, verify=min(1.0, whole))
        draft = min(self.draft / self.plain, 0.999 * whole / k)
        return Costs(draft=draft, verify=whole - k * draft)

    def explain(self, k: int, *, pays: bool) -> str:
        """What k drafts cost and give; where they do not pay, which of both is why."""
        taken = self.round_seconds(k) / self.plain
        if self.is_lookup:
            text = f"a round with what it finds takes {taken:.2f} plain rounds and gives {self.tokens[k]:.2f} tokens"
            if not pays:
                text += _UNSURE if self.tokens[k] > taken else ": the text repeats itself too little"
            return text
        costs, found = self.costs(k), self.acceptances(k)
        text = (
            f"a draft costs {costs.draft:.2f} of a plain round, checking {k} of them {costs.verify:.2f}; "
            f"{expected_tokens(found):.2f} tokens for {taken:.2f} plain rounds' time"
        )
        needed, mean = break_even_acceptance(k, costs), _equal(found)
        if needed is None:
            return text if pays else f"{text}: too dear, it would not pay if every draft were accepted"
        if needed < mean and not pays:
            return text + _UNSURE
        if pays:
            return f"{text}; {mean:.0%} of the drafts that are judged are accepted, {needed:.0%} would break even"
        return f"{text}: too few are accepted, {mean:.0%} where {needed:.0%} are needed to break even"


def _equal(acceptances: Sequence[float]) -> float:
    """The one acceptance that gives as many tokens a round."""
    return equal_acceptance(max(1.0, expected_tokens(acceptances)), len(acceptances))


def survey(plain: Sequence[Record], drafted: Iterable[Record], *, is_lookup: bool) -> Survey:
    """From the records of one engine, each with `measured["rounds"]`, what its rounds took (`summarize_rounds`)."""
    by_k: defaultdict[int, list[Record]] = defaultdict(list)
    for record in drafted:
        by_k[record.settings["num_speculative_tokens"]].append(record)
    before = {(record.prompt_index, record.repeat): seconds_a_token(record) for record in plain}
    plain_rounds = [each for record in plain for each in record.measured["rounds"]]
    # Where texts of a batch all end early there is no round of the whole batch.
    plain_seconds = _median(plain_rounds) if plain_rounds else statistics.median(before.values())
    rounds: dict[int, float] = {}
    tokens: dict[int, float] = {}
    speeds: dict[int, float] = {}
    steps: list[float] = []
    for k, records in by_k.items():
        tokens[k] = _mean_tokens(records)
        speeds[k] = statistics.median(
            before[record.prompt_index, record.repeat] / seconds_a_token(record) for record in records
        )
        # The last rounds of a text have fewer drafts: those with all k count.
        full = [each for record in records for each in record.measured["rounds"] if each["k"] == k]
        is_known = full and not is_lookup
        rounds[k] = _median(full) if is_known else tokens[k] * plain_seconds / speeds[k]
        steps += [each["draft"] / k for each in full if each["draft"] is not None]
    accepted, rejected = _positions(record for records in by_k.values() for record in records)
    return Survey(
        plain=plain_seconds,
        rounds=rounds,
        acceptance=conditional_acceptances(accepted, rejected),
        num_judged=accepted[0] + rejected[0] if accepted else 0,
        draft=statistics.median(steps) if steps else None,
        speeds=speeds,
        tokens=tokens,
        is_lookup=is_lookup,
    )


def _median(rounds: Sequence[dict[str, Any]]) -> float:
    return float(statistics.median(each["seconds"] for each in rounds for _ in range(each["count"])))


def _mean_tokens(records: Iterable[Record]) -> float:
    counts = [record.measured["metrics"]["speculative_decoding"] for record in records]
    num_rounds = sum(each["num_rounds"] for each in counts)
    return 1.0 + float(sum(each["num_accepted_draft_tokens"] for each in counts) / max(1, num_rounds))


def _positions(records: Iterable[Record]) -> tuple[list[int], list[int]]:
    """Of all records together, by position: drafts that were accepted, first rejections."""
    accepted: list[int] = []
    rejected: list[int] = []
    for record in records:
        counts = record.measured["metrics"]["speculative_decoding"]
        accepted = _sum(accepted, counts["num_accepted_by_position"])
        rejected = _sum(rejected, counts["rejection_positions"])
    width = max(len(accepted), len(rejected))
    return _sum(accepted, [0] * width), _sum(rejected, [0] * width)


def _sum(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]


def summarize_rounds(
    rounds: Iterable[tuple[int, int, int, float, float | None, float | None]],
) -> list[dict[str, Any]]:
    """Rounds of a kind as one: medians of the seconds, and how many there were.

    rounds: batch size, drafts of each sequence, rows of the target's forward, seconds, and of these drafting and
            verifying, None where they are not known
    """
    kinds: defaultdict[tuple[int, int, int], list[tuple[float, float | None, float | None]]] = defaultdict(
        list
    )
    for size, k, rows, *seconds in rounds:
        kinds[size, k, rows].append(tuple(seconds))  # type: ignore[arg-type]
    result = []
    for (size, k, rows), each in sorted(kinds.items()):
        whole, draft, verify = zip(*each, strict=True)
        result.append(
            {
                "batch_size": size,
                "k": k,
                "rows": rows,
                "count": len(each),
                "seconds": statistics.median(whole),
                "draft": None if None in draft else statistics.median(draft),
                "verify": None if None in verify else statistics.median(verify),
            }
        )
    return result


def merge_rounds(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The same over records."""
    return summarize_rounds(
        (each["batch_size"], each["k"], each["rows"], each["seconds"], each["draft"], each["verify"])
        for record in records
        for each in record.measured["rounds"]
        for _ in range(each["count"])
    )
