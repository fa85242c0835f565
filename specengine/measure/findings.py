"""From measured rows to what the figures show. Every number is one of the engine's metrics, or made of them here.

Rows of the kinds `latency`, `sweep` and `report` that differ in k and temperature only belong together: they are one
`Findings`. Rows of the kind `trace` give what single generations tell: k round by round, and the text token by token.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from specengine.measure import theory
from specengine.measure.records import Record
from specengine.measure.summary import Summary, numbers, plain_of, seconds_a_token
from specengine.measure.theory import Costs

MEASURED = ("latency", "sweep", "report")
TRACED = "trace"
# Settings in which rows that are shown in one figure may differ.
_VARIED = ("num_speculative_tokens", "temperature", "acceptance", "seed")
# [temperature][k]: a number of each generation.
ByTemperature = dict[float, dict[int, list[float]]]
K = int | str


@dataclass(frozen=True)
class Row:
    """All measurements with one k at one temperature."""

    temperature: float
    k: K
    summary: Summary


@dataclass(frozen=True)
class Positions:
    """Counts by position in the round, of the rounds with one k at all temperatures; see `SpeculativeDecodingMetrics`.

    num_fully_accepted: rounds that drafted, and in which nothing was rejected
    """

    k: int
    num_drafted: list[int]
    num_accepted: list[int]
    rejected: list[int]
    num_fully_accepted: int


@dataclass(frozen=True)
class Theory:
    """A draft step's cost c and verification's v, in rounds of plain decoding, and measured points beside them.

    points: (α, k, speed-up of decoding): α is the equal acceptance that gives as many tokens a round
    """

    costs: Costs
    points: list[tuple[float, int, float]]


@dataclass(frozen=True)
class Findings:
    """What there is to be shown of one pair with one set of options.

    setup:      the pair, and the options that all its rows share
    rows:       a summary for each temperature and k, plain decoding (k = 0) first
    acceptance, speedups: of each generation with a constant k above 0, by temperature and k
    by_prompt:  "prompt i" to tokens a second of each repeat: (plain, speculative at best_k, at the lowest temperature)
    phases:     "plain" and "k = …" to mean seconds a round by phase, at the lowest temperature
    num_rounds: that were timed for this
    choices:    "prompt i" to the k of each round, where it was left to the engine
    similarity: of traced generations at temperature 1, how alike draft and target are, and the acceptance rates
    traces:     `measured` of the rows of the kind `trace`
    """

    setup: dict[str, Any]
    rows: list[Row]
    acceptance: ByTemperature
    speedups: ByTemperature
    best_k: int | None
    by_prompt: dict[str, tuple[list[float], list[float]]]
    phases: dict[str, dict[str, float]]
    num_rounds: int
    positions: Positions | None
    theory: Theory | None
    choices: dict[str, list[int]] = field(default_factory=dict)
    similarity: dict[float, list[float]] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the tokens of traces."""
        values = asdict(self)
        del values["traces"]
        return values


def find(records: Iterable[Record]) -> list[Findings]:
    """What the rows say, by what they have in common, in the order of the first of each."""
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    traces: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.kind in MEASURED:
            groups[_name(record.pair, _shared(record))].append(record)
        elif record.kind == TRACED:
            traces[_name(record.pair, record.settings["drafter"])].append(record)
    found = []
    for group in groups.values():
        # A pair's traces belong to all that was measured of it; they are shown with the first.
        of_pair = traces.pop(_name(group[0].pair, group[0].settings["drafter"]), [])
        found.append(_findings(group, of_pair))
    return found + [_findings([], rest) for rest in traces.values()]


def _name(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True)


def _shared(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.settings.items() if name not in _VARIED}


def _findings(records: Sequence[Record], traces: Sequence[Record]) -> Findings:
    first = [*records, *traces][0]
    by_case: defaultdict[tuple[float, K], list[Record]] = defaultdict(list)
    for record in records:
        by_case[record.settings["temperature"], record.settings["num_speculative_tokens"]].append(record)
    plain = {
        temperature: plain_of(each for (at, _), rows in by_case.items() if at == temperature for each in rows)
        for temperature, _ in by_case
    }
    cases = sorted(by_case, key=lambda case: (case[0], isinstance(case[1], str), case[1]))
    rows = [Row(at, k, Summary(**numbers(by_case[at, k], plain[at]))) for at, k in cases]
    acceptance: ByTemperature = {}
    speedups: ByTemperature = {}
    for at, k in cases:
        if isinstance(k, int) and k > 0:
            acceptance.setdefault(at, {})[k] = _acceptances(by_case[at, k])
            ratios = _speedups(by_case[at, k], plain[at])
            if ratios:
                speedups.setdefault(at, {})[k] = ratios
    lowest = min((at for at, _ in cases), default=0.0)
    constant = {k: by_case[at, k] for at, k in cases if at == lowest and isinstance(k, int)}
    best_k = max(speedups.get(lowest, {}), key=lambda k: median(speedups[lowest][k]), default=None)
    return Findings(
        setup={**first.pair, **(_shared(first) if records else {"drafter": first.settings["drafter"]})},
        rows=rows,
        acceptance=acceptance,
        speedups=speedups,
        best_k=best_k,
        by_prompt={} if best_k is None else _by_prompt(constant[0], constant[best_k]),
        phases={
            ("plain" if k == 0 else f"k = {k}"): parts
            for k, rows in constant.items()
            if (parts := _phases(rows))
        },
        num_rounds=sum(_speculation(each)["num_rounds"] for rows in constant.values() for each in rows),
        positions=_positions({case: by_case[case] for case in cases}),
        theory=_theory(constant),
        choices={
            f"prompt {each.prompt_index}": each.measured["drafted_by_round"]
            for each in traces
            if each.settings["num_speculative_tokens"] == "auto" and each.measured["drafted_by_round"]
        },
        similarity=_similarity(traces),
        traces=[each.measured for each in traces],
    )


def _speculation(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = record.measured["metrics"]["speculative_decoding"]
    return values


def _acceptances(records: Sequence[Record]) -> list[float]:
    """Of the generations in which something was drafted."""
    found = [_speculation(record) for record in records]
    return [each["draft_acceptance_rate"] for each in found if each["num_draft_tokens"]]


def _speedups(records: Sequence[Record], plain: dict[tuple[int, int], Record]) -> list[float]:
    """By pairs of the same prompt and repeat, that were measured one right after the other."""
    pairs = [(plain.get((record.prompt_index, record.repeat)), record) for record in records]
    return [seconds_a_token(theirs) / seconds_a_token(ours) for theirs, ours in pairs if theirs is not None]


def _by_prompt(
    plain: Sequence[Record], speculative: Sequence[Record]
) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for index, records in enumerate((plain, speculative)):
        for record in records:
            label = f"prompt {record.prompt_index}"
            found.setdefault(label, ([], []))[index].append(record.measured["tokens_per_second"])
    return {label: pair for label, pair in found.items() if pair[0] and pair[1]}


def _seconds_a_round(records: Sequence[Record]) -> float | None:
    """Median over the generations that had a round."""
    found = [
        record.measured["metrics"]["decode_time"] / _speculation(record)["num_rounds"]
        for record in records
        if _speculation(record)["num_rounds"]
    ]
    return median(found) if found else None


def _phases(records: Sequence[Record]) -> dict[str, float]:
    """Empty where rounds were not watched (on CUDA)."""
    shares = [record.measured["shares"] for record in records if record.measured["shares"] is not None]
    seconds = _seconds_a_round(records)
    if not shares or seconds is None:
        return {}
    return {phase: seconds * fmean(each[phase] for each in shares) for phase in shares[0]}


def _positions(by_case: dict[tuple[float, K], list[Record]]) -> Positions | None:
    """Of the largest k."""
    ks = [k for _, k in by_case if isinstance(k, int) and k > 0]
    if not ks:
        return None
    k = max(ks)
    total = Positions(k, [0] * k, [0] * k, [0] * k, 0)
    num_rounds = 0
    for (_, number), records in by_case.items():
        for each in map(_speculation, records if number == k else []):
            num_rounds += each["num_spec_steps"]
            for name, counts in (
                ("num_drafted_by_position", total.num_drafted),
                ("num_accepted_by_position", total.num_accepted),
                ("rejection_positions", total.rejected),
            ):
                for place, count in enumerate(each[name]):
                    counts[place] += count
    if not num_rounds:
        return None
    return Positions(
        k, total.num_drafted, total.num_accepted, total.rejected, num_rounds - sum(total.rejected)
    )


def _theory(constant: dict[int, list[Record]]) -> Theory | None:
    """c and v by least squares of the rounds' times over k, so that what the forward takes longer with every row is
    part of c. None without plain decoding and two other ks."""
    seconds = {k: value for k, rows in constant.items() if (value := _seconds_a_round(rows)) is not None}
    ks = [k for k in seconds if k > 0]
    if 0 not in seconds or len(ks) < 2:
        return None
    times = [seconds[k] / seconds[0] for k in ks]
    middle, level = fmean(ks), fmean(times)
    slope = sum((k - middle) * (time - level) for k, time in zip(ks, times, strict=True))
    slope /= sum((k - middle) ** 2 for k in ks)
    cost = max(0.0, slope)
    costs = Costs(cost, max(level - cost * middle, 1e-6))
    points = []
    for k in ks:
        found = [_speculation(record) for record in constant[k]]
        num_rounds = sum(each["num_rounds"] for each in found)
        tokens = 1 + sum(each["num_accepted_draft_tokens"] for each in found) / num_rounds
        points.append((theory.equal_acceptance(tokens, k), k, tokens * seconds[0] / seconds[k]))
    return Theory(costs, points)


def _similarity(traces: Sequence[Record]) -> dict[float, list[float]]:
    found: defaultdict[float, list[float]] = defaultdict(list)
    for record in traces:
        similarity, drafted = record.measured["similarity"], _speculation(record)["num_draft_tokens"]
        if record.settings["temperature"] == 1.0 and similarity is not None and drafted:
            found[similarity].append(_speculation(record)["draft_acceptance_rate"])
    return dict(sorted(found.items()))
