"""Plain decoding against speculative, prompt by prompt: `specengine bench latency`.

Every setting is warmed up once. Then every repeat goes through the prompts, and each prompt through all settings right
after one another, beginning with another one each time: what slows the machine for a while slows all of them. Times
are the engine's own metrics. Shares of draft, verify and other come from one further generation of each prompt and
setting, since watching a round takes time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from specengine import ranges
from specengine.call import Call
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.measure.environment import collect_environment
from specengine.measure.profile import Peaks
from specengine.measure.records import Record, new_run
from specengine.measure.statistics import median_interval, ratio_interval
from specengine.measure.timeline import PartTimes
from specengine.outputs import GenerationResult

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
    settings: list[K] = [0, *(k for k in ks if k != 0)]
    run, environment, pair = new_run(), collect_environment(), describe_pair(call, engine)
    for k in settings:
        _generate(call, engine, 0, k)
    shares: dict[tuple[int, K], dict[str, float] | None] = {}
    for repeat in range(repeats):
        for index in range(len(call.prompts)):
            turn = (repeat * len(call.prompts) + index) % len(settings)
            order = settings[turn:] + settings[:turn]
            for k in order:
                if repeat == 0:
                    shares[index, k] = _shares(call, engine, index, k)
            for k in order:
                peaks = Peaks(engine.device)
                result = _generate(call, engine, index, k)
                measured = _measured(result, peaks.read()[0], shares[index, k])
                yield Record(
                    "latency",
                    run,
                    environment,
                    pair,
                    describe_settings(call, engine, k),
                    index,
                    repeat,
                    measured,
                )


def count_measurements(call: Call, ks: Sequence[K], *, repeats: int) -> int:
    """Records that `measure_latency` yields."""
    return (1 + sum(k != 0 for k in ks)) * len(call.prompts) * repeats


def describe_pair(call: Call, engine: Engine) -> dict[str, Any]:
    """What generated."""
    return {
        "model": engine.target_name,
        "draft_model": engine.draft_name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "weight_dtype": call.config.weight_dtype,
        "draft_weight_dtype": call.config.draft_weight_dtype,
        "device": str(engine.device),
        "backend": engine.backend_name,
    }


def describe_settings(call: Call, engine: Engine, k: K) -> dict[str, Any]:
    """What was asked for."""
    params = call.params
    return {
        "num_speculative_tokens": k,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
        "batch_size": 1,
        "acceptance": params.acceptance,
        "seed": params.seed,
        "drafter": engine.draft_name,
        "enable_prefix_cache": call.config.enable_prefix_cache,
    }


def _generate(call: Call, engine: Engine, index: int, k: K) -> GenerationResult:
    params = replace(call.params, num_speculative_tokens=k)
    result = engine.generate(call.prompts[index], params, progress=False)
    assert isinstance(result, GenerationResult), "one prompt gives one result"
    if result.finish_reason == "error":
        raise SpecEngineError(f"prompt {index} cannot be measured: {result.outputs[0].error}")
    return result


def _shares(call: Call, engine: Engine, index: int, k: K) -> dict[str, float] | None:
    """Of the time that rounds took, by the host's clock. On CUDA that only tells when work was queued."""
    if engine.device.type == "cuda":
        return None
    times = PartTimes()
    with ranges.record(times):
        result = _generate(call, engine, index, k)
    seconds = {part.name: part.seconds for part in times.parts(result.metrics.decode_time)}
    total = sum(seconds.values())
    if total <= 0.0:
        return None  # the prompt's forward gave the only token
    draft, verify = seconds["draft"] / total, seconds["verify"] / total
    return {"draft": draft, "verify": verify, "other": 1.0 - draft - verify}


def _measured(result: GenerationResult, peak: int | None, shares: dict[str, float] | None) -> dict[str, Any]:
    metrics = result.metrics
    return {
        "seconds": metrics.total_time,
        "time_to_first_token": metrics.queue_time + metrics.prompt_time,
        "tokens": metrics.num_generated_tokens,
        "tokens_per_second": metrics.tokens_per_second,
        "target_forwards": metrics.num_target_forwards,
        "lossless": result.lossless,
        "metrics": metrics.to_dict(),
        "peak_bytes": peak,
        "shares": shares,
    }


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
