"""What every measuring command shares: cases, and a run that measures them in a fair order.

A `Case` is one way to generate: an engine and one `SamplingParams` (`EngineCase`), or anything else that continues a
list of prompts. `measure` goes through cases, prompts and repeats:

    run = Run.start("latency")
    cases = [EngineCase(engine, replace(params, num_speculative_tokens=k)) for k in (0, 4)]
    for record in measure(run, cases, prompts, repeats=5):
        ...

Every case is warmed up once. Then every repeat goes through the prompts, and each prompt through all cases right after
one another, beginning with another one each time: what slows the machine for a while slows all of them. Times are the
engine's own metrics. Shares of draft, verify and other come from one further generation of each prompt and case before
they are measured, since watching a round takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from specengine import ranges
from specengine.config import EngineConfig, SamplingParams, field_names
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.measure.environment import collect_environment
from specengine.measure.profile import Peaks
from specengine.measure.records import Record, new_run
from specengine.measure.timeline import PartTimes
from specengine.metrics import merge
from specengine.outputs import GenerationMetrics, GenerationResult
from specengine.prompt import Prompt

PAIR_NAMES = ("model", "draft_model", "dtype", "weight_dtype", "draft_weight_dtype", "device", "backend")
Shares = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What all rows of one run have in common. kind: one of `records.KINDS`."""

    kind: str
    name: str
    environment: dict[str, Any]

    @classmethod
    def start(cls, kind: str) -> Run:
        return cls(kind, new_run(), collect_environment())


class Case(Protocol):
    """One way to generate.

    name:       for people; of one run's cases no two have the same
    pair:       what generates: a `Record`'s pair
    settings:   what is asked for: a `Record`'s settings
    batch_size: prompts that are continued at the same time
    """

    @property
    def name(self) -> str: ...
    @property
    def pair(self) -> dict[str, Any]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def batch_size(self) -> int: ...

    def warm_up(self, prompts: Sequence[Prompt]) -> Shares | None:
        """Generates once, unmeasured. Returns the shares of draft, verify and other, None where they are not known."""
        ...

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Generates once. Returns a `Record`'s measured, without the shares."""
        ...


@dataclass(frozen=True, eq=False)
class EngineCase:
    """An engine, and how it is asked to continue every prompt.

    label:        the case's name; by default its k
    keeps_tokens: rows have "token_ids", a list for each prompt (of its first sample)
    on_results:   called with what each measured generation gave, in the prompts' order
    """

    engine: Engine
    params: SamplingParams
    batch_size: int = 1
    label: str | None = None
    keeps_tokens: bool = False
    on_results: Callable[[list[GenerationResult]], object] | None = None

    @property
    def name(self) -> str:
        k = self.params.num_speculative_tokens
        return self.label or ("plain" if k == 0 else f"k = {k}")

    @property
    def pair(self) -> dict[str, Any]:
        return describe_pair(self.engine)

    @property
    def settings(self) -> dict[str, Any]:
        return describe_settings(self.engine, self.params, batch_size=self.batch_size)

    def warm_up(self, prompts: Sequence[Prompt]) -> Shares | None:
        return watch_shares(self.engine, prompts, self.params)

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        peaks = Peaks(self.engine.device)
        results = generate(self.engine, prompts, self.params)
        row = measured(results, peak_bytes=peaks.read()[0])
        if self.on_results is not None:
            self.on_results(results)
        if self.keeps_tokens:
            row["token_ids"] = [result.token_ids for result in results]
        return row


def measure(run: Run, cases: Sequence[Case], prompts: Sequence[Prompt], *, repeats: int) -> Iterator[Record]:
    """Yields a record for each generation, as it is made. Cases that are to be compared must have one batch size.

    A record's `prompt_index` is that of the first prompt of its batch.

    Raises `SpecEngineError` where a generation failed.
    """
    batches = batches_of(prompts, cases[0].batch_size)
    sizes = {case.batch_size for case in cases}
    assert len(sizes) == 1, f"cases of one rotation have one batch size, not {sizes}"
    for case in cases:
        case.warm_up(batches[0][1])
    shares: dict[tuple[int, int], Shares | None] = {}
    for repeat in range(repeats):
        for place, (index, batch) in enumerate(batches):
            turn = (repeat * len(batches) + place) % len(cases)
            order = [*range(turn, len(cases)), *range(turn)]
            if repeat == 0:
                for which in order:
                    shares[place, which] = cases[which].warm_up(batch)
            for which in order:
                case = cases[which]
                row = {**case.measure(batch), "shares": shares[place, which]}
                yield Record(
                    run.kind, run.name, run.environment, case.pair, case.settings, index, repeat, row
                )


def count_records(cases: Sequence[Case], prompts: Sequence[Prompt], *, repeats: int) -> int:
    """Records that `measure` yields."""
    return len(cases) * num_batches(len(prompts), cases[0].batch_size) * repeats


def num_batches(num_prompts: int, batch_size: int) -> int:
    return -(-num_prompts // batch_size)


def batches_of(prompts: Sequence[Prompt], batch_size: int) -> list[tuple[int, list[Prompt]]]:
    """All prompts in batches, each with its first prompt's index. The last one is filled up from the beginning, so that
    all have one size."""
    starts = range(0, len(prompts), batch_size)
    return [(at, [prompts[(at + i) % len(prompts)] for i in range(batch_size)]) for at in starts]


# What a row says


def describe_pair(engine: Engine) -> dict[str, Any]:
    """What generates: the values of `PAIR_NAMES`. dtype: of what `weight_dtype` does not say."""
    weights: Any = engine.weights["target"]
    values = (
        engine.target_name,
        engine.draft_name,
        str(weights.token_table.dtype).removeprefix("torch."),
        engine.config.weight_dtype,
        engine.config.draft_weight_dtype,
        str(engine.device),
        engine.backend_name,
    )
    return dict(zip(PAIR_NAMES, values, strict=True))


def describe_settings(engine: Engine, params: SamplingParams, *, batch_size: int) -> dict[str, Any]:
    """What is asked for: every option of the request and of the engine that is not the pair's, as JSON has it."""
    config = {
        name: getattr(engine.config, name) for name in field_names(EngineConfig) if name not in PAIR_NAMES
    }
    asked = {item.name: getattr(params, item.name) for item in fields(params)}
    return {
        **{name: _plain(value) for name, value in {**asked, **config}.items()},
        "batch_size": batch_size,
        "drafter": engine.draft_name,
    }


def _plain(value: Any) -> Any:
    """Of numbers, strings and lists; an object is named."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "__qualname__", None) or (
        str(value) if hasattr(value, "__fspath__") else type(value).__name__
    )


def measured(results: Sequence[GenerationResult], *, peak_bytes: int | None) -> dict[str, Any]:
    """The numbers of one generation: of one prompt, or of a batch as a whole (`overall`)."""
    metrics = overall([result.metrics for result in results])
    return {
        "seconds": metrics.total_time,
        "time_to_first_token": metrics.time_to_first_token,
        "tokens": metrics.num_generated_tokens,
        "tokens_per_second": metrics.tokens_per_second,
        "target_forwards": metrics.num_target_forwards,
        "lossless": all(result.lossless for result in results),
        "metrics": metrics.to_dict(),
        "peak_bytes": peak_bytes,
    }


def overall(parts: Sequence[GenerationMetrics]) -> GenerationMetrics:
    """Of requests that were queued together: counts are sums, times those of the whole batch.

    queue_time ends with the first forward of any, prompt_time when every request has its first token, decode_time with
    the last token of all; num_target_forwards is the most that a request took part in.
    """
    if len(parts) == 1:
        return parts[0]
    began = min(part.queue_time for part in parts)
    first_tokens = max(part.time_to_first_token for part in parts)
    ended = max(part.total_time for part in parts)
    return GenerationMetrics(
        num_prompt_tokens=sum(part.num_prompt_tokens for part in parts),
        num_generated_tokens=sum(part.num_generated_tokens for part in parts),
        num_cached_tokens=sum(part.num_cached_tokens for part in parts),
        num_target_forwards=max(part.num_target_forwards for part in parts),
        num_preemptions=sum(part.num_preemptions for part in parts),
        queue_time=began,
        prompt_time=first_tokens - began,
        decode_time=ended - first_tokens,
        total_time=ended,
        speculative_decoding=merge(part.speculative_decoding for part in parts),
    )


# Generating


def generate(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams | list[SamplingParams]
) -> list[GenerationResult]:
    """Continues prompts as one batch; params: of all, or one a prompt. Raises `SpecEngineError` where one failed."""
    results = engine.generate(list(prompts), params, progress=False)
    assert isinstance(results, list), "a list of prompts gives a list"
    for result in results:
        failed = next((output for output in result.outputs if output.finish_reason == "error"), None)
        if failed is not None:
            raise SpecEngineError(f"{result.prompt!r:.80} cannot be measured: {failed.error}")
    return results


def watch_shares(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> Shares | None:
    """Generates once. Returns what draft, verify and other took of the rounds' time, by the host's clock; None on CUDA,
    where that only tells when work was queued, and where there was no round."""
    if engine.device.type == "cuda":
        generate(engine, prompts, params)
        return None
    times = PartTimes()
    with ranges.record(times):
        results = generate(engine, prompts, params)
    metrics = [result.metrics for result in results]
    began = min(each.time_to_first_token for each in metrics)  # the first token of any
    seconds = {
        part.name: part.seconds for part in times.parts(max(each.total_time for each in metrics) - began)
    }
    total = sum(seconds.values())
    if total <= 0.0:
        return None  # the prompts' forwards gave the only tokens
    draft, verify = seconds["draft"] / total, seconds["verify"] / total
    return {"draft": draft, "verify": verify, "other": 1.0 - draft - verify}
