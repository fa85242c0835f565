"""What comes of the records of one case: medians with intervals, speed-up by pairs, counts over all rounds together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from specengine.measure.records import Record
from specengine.measure.statistics import median_interval, ratio_interval


@dataclass(frozen=True)
class Interval:
    """A median, and the ends of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


class HasInterval(Protocol):
    """A median, and the ends of its interval."""

    @property
    def median(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def ratio_text(value: HasInterval) -> str:
    """For people."""
    digits = 2 if value.high < 10 else 1 if value.high < 100 else 0
    return f"{value.median:.{digits}f}× ({value.low:.{digits}f}–{value.high:.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All measurements of one case.

    num_measured:         generations
    seconds:              from the request to its last token
    time_to_first_token:  seconds
    prompt_tokens_per_second: prompt tokens that were computed over the time from the first forward to the first token
    tokens_per_second:    generated tokens over the time from the first forward to the last token
    speedup:              plain seconds a token / seconds a token, by pairs of the same prompt and repeat; None where no
                          pair is complete
    latency_reduction:    1 - 1 / speedup
    target_forwards:      median; mean_acceptance_length and acceptance_rate: over all rounds together
    acceptance_deviation: standard deviation of the acceptance rates of single generations; None with fewer than two
                          that drafted
    shares:               of the rounds' time: draft, verify, other; None where rounds were not timed (on CUDA)
    peak_bytes:           the most memory in use at any time of it; None where the system does not tell
    """

    num_measured: int
    seconds: Interval
    time_to_first_token: Interval
    prompt_tokens_per_second: Interval
    tokens_per_second: Interval
    speedup: Interval | None
    latency_reduction: Interval | None
    target_forwards: float
    mean_acceptance_length: float
    acceptance_rate: float
    acceptance_deviation: float | None
    shares: dict[str, float] | None
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """One level, for CSV: an interval's ends are columns of their own; what is not known is None."""
        columns: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in _INTERVALS:
                ends = (None,) * 3 if value is None else (value.median, value.low, value.high)
                columns.update(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            elif name == "shares":
                columns.update({f"{part}_share": (value or {}).get(part) for part in SHARES})
            else:
                columns[name] = value
        return columns


SHARES = ("draft", "verify", "other")
_INTERVALS = (
    "seconds",
    "time_to_first_token",
    "prompt_tokens_per_second",
    "tokens_per_second",
    "speedup",
    "latency_reduction",
)


def plain_of(records: Iterable[Record]) -> dict[tuple[int, int], Record]:
    """The records of plain decoding by prompt and repeat: what others of the same rotation are compared with.

    Raises `ValueError` where there are two of one prompt and repeat: then these are records of several rotations.
    """
    plain: dict[tuple[int, int], Record] = {}
    for record in records:
        if record.settings["num_speculative_tokens"] == 0:
            key = (record.prompt_index, record.repeat)
            if key in plain:
                raise ValueError(
                    f"plain decoding of prompt {key[0]} was measured twice as repeat {key[1]}: records of several runs "
                    "or settings must be summarized one by one"
                )
            plain[key] = record
    return plain


def numbers(records: Sequence[Record], plain: Mapping[tuple[int, int], Record]) -> dict[str, Any]:
    """The fields of a `Summary` of one case's records. plain: see `plain_of`."""
    rows = [record.measured for record in records]
    pairs = [
        (seconds_a_token(plain[record.prompt_index, record.repeat]), seconds_a_token(record))
        for record in records
        if (record.prompt_index, record.repeat) in plain
    ]
    speedup = Interval(*ratio_interval(*zip(*pairs, strict=True))) if pairs else None
    speculation = [row["metrics"]["speculative_decoding"] for row in rows]
    drafted = sum(each["num_draft_tokens"] for each in speculation)
    accepted = sum(each["num_accepted_draft_tokens"] for each in speculation)
    rounds = sum(each["num_rounds"] for each in speculation)
    rates = [each["draft_acceptance_rate"] for each in speculation if each["num_draft_tokens"]]
    shares = [row["shares"] for row in rows if row["shares"] is not None]
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return {
        "num_measured": len(rows),
        "seconds": _interval(rows, "seconds"),
        "time_to_first_token": _interval(rows, "time_to_first_token"),
        "prompt_tokens_per_second": Interval(*median_interval(list(map(_prompt_tokens_per_second, rows)))),
        "tokens_per_second": _interval(rows, "tokens_per_second"),
        "speedup": speedup,
        "latency_reduction": None
        if speedup is None
        else Interval(1 - 1 / speedup.median, 1 - 1 / speedup.low, 1 - 1 / speedup.high),
        "target_forwards": statistics.median(row["target_forwards"] for row in rows),
        "mean_acceptance_length": 1.0 + (accepted / rounds if rounds else 0.0),
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_deviation": statistics.stdev(rates) if len(rates) > 1 else None,
        "shares": {name: sum(each[name] for each in shares) / len(shares) for name in SHARES}
        if shares
        else None,
        "peak_bytes": max(peaks, default=None),
    }


def seconds_a_token(record: Record) -> float:
    return float(record.measured["seconds"] / record.measured["tokens"])


def _interval(rows: Sequence[Mapping[str, Any]], name: str) -> Interval:
    return Interval(*median_interval([row[name] for row in rows]))


def _prompt_tokens_per_second(row: Mapping[str, Any]) -> float:
    """From what rows of every version have."""
    metrics = row["metrics"]
    computed = metrics["num_prompt_tokens"] - metrics["num_cached_tokens"]
    return computed / metrics["prompt_time"] if metrics["prompt_time"] > 0 else 0.0
