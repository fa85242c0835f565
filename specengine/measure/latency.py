"""Plain decoding against speculative, prompt by prompt: `specengine bench latency`. How it measures: `runs`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from specengine.call import Call
from specengine.engine import Engine
from specengine.measure.records import Record
from specengine.measure.runs import EngineCase, Run, measure
from specengine.measure.statistics import median_interval, ratio_interval

K = int | str


@dataclass(frozen=True)
class Interval:
    """A median, and the ends of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """All measurements with one k, of one prompt or of all.

    prompt_index:         None: of all prompts
    num_measured:         generations
    seconds:              from the request to its last token
    time_to_first_token:  seconds
    tokens_per_second:    generated tokens over the time from the first forward to the last token
    speedup:              plain seconds a token / seconds a token, by pairs of the same prompt and repeat; None where no
                          pair is complete
    latency_reduction:    1 - 1 / speedup
    target_forwards:      median; mean_acceptance_length and acceptance_rate: over all rounds together
    shares:               of the rounds' time: draft, verify, other; None where rounds were not timed (on CUDA)
    peak_bytes:           the most memory in use at any time of it; None where the system does not tell
    """

    k: K
    prompt_index: int | None
    num_measured: int
    seconds: Interval
    time_to_first_token: Interval
    tokens_per_second: Interval
    speedup: Interval | None
    latency_reduction: Interval | None
    target_forwards: float
    mean_acceptance_length: float
    acceptance_rate: float
    shares: dict[str, float] | None
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_latency(call: Call, engine: Engine, ks: Sequence[K], *, repeats: int) -> Iterator[Record]:
    """Yields a record for each generation, as it is made.

    ks: settings of `num_speculative_tokens`; plain decoding, 0, is measured besides

    Raises `SpecEngineError` where a generation failed.
    """
    return measure(Run.start("latency"), _cases(call, engine, ks), call.prompts, repeats=repeats)


def count_measurements(call: Call, ks: Sequence[K], *, repeats: int) -> int:
    """Records that `measure_latency` yields."""
    return len(with_plain(ks)) * len(call.prompts) * repeats


def with_plain(ks: Sequence[K]) -> list[K]:
    """The settings of `num_speculative_tokens` that are measured, each once, plain decoding first."""
    return list(dict.fromkeys([0, *ks]))


def _cases(call: Call, engine: Engine, ks: Sequence[K]) -> list[EngineCase]:
    return [EngineCase(engine, replace(call.params, num_speculative_tokens=k)) for k in with_plain(ks)]


# What comes of it


def summarize(records: Sequence[Record]) -> list[Summary]:
    """Of one run: for each k all prompts together, then each prompt, in the order of the first measurements."""
    groups: defaultdict[tuple[K, int | None], list[Record]] = defaultdict(list)
    ks = list(dict.fromkeys(record.settings["num_speculative_tokens"] for record in records))
    ks.sort(key=lambda k: (isinstance(k, str), k))
    for record in records:
        k = record.settings["num_speculative_tokens"]
        groups[k, None].append(record)
        groups[k, record.prompt_index].append(record)
    indices = [None, *sorted({record.prompt_index for record in records})]
    plain = {(record.prompt_index, record.repeat): record for record in groups[0, None]}
    return [_summary(k, index, groups[k, index], plain) for index in indices for k in ks if groups[k, index]]


def _summary(k: K, index: int | None, records: list[Record], plain: dict[tuple[int, int], Record]) -> Summary:
    rows = [record.measured for record in records]
    pairs = [
        (_seconds_a_token(plain[record.prompt_index, record.repeat]), _seconds_a_token(record))
        for record in records
        if (record.prompt_index, record.repeat) in plain
    ]
    speedup = Interval(*ratio_interval(*zip(*pairs, strict=True))) if pairs else None
    speculation = [row["metrics"]["speculative_decoding"] for row in rows]
    drafted = sum(each["num_draft_tokens"] for each in speculation)
    accepted = sum(each["num_accepted_draft_tokens"] for each in speculation)
    rounds = sum(each["num_rounds"] for each in speculation)
    shares = [row["shares"] for row in rows if row["shares"] is not None]
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return Summary(
        k=k,
        prompt_index=index,
        num_measured=len(rows),
        seconds=_interval(rows, "seconds"),
        time_to_first_token=_interval(rows, "time_to_first_token"),
        tokens_per_second=_interval(rows, "tokens_per_second"),
        speedup=speedup,
        latency_reduction=None
        if speedup is None
        else Interval(1 - 1 / speedup.median, 1 - 1 / speedup.low, 1 - 1 / speedup.high),
        target_forwards=_interval(rows, "target_forwards").median,
        mean_acceptance_length=1.0 + (accepted / rounds if rounds else 0.0),
        acceptance_rate=accepted / drafted if drafted else 0.0,
        shares={name: sum(each[name] for each in shares) / len(shares) for name in shares[0]}
        if shares
        else None,
        peak_bytes=max(peaks, default=None),
    )


def _seconds_a_token(record: Record) -> float:
    return float(record.measured["seconds"] / record.measured["tokens"])


def _interval(rows: Sequence[dict[str, Any]], name: str) -> Interval:
    return Interval(*median_interval([row[name] for row in rows]))
