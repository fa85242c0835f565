"""Plain decoding against speculative, prompt by prompt: `specengine bench latency`. How it measures: `runs`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from specengine.call import Call
from specengine.engine import Engine
from specengine.measure import summary
from specengine.measure.records import Record
from specengine.measure.runs import EngineCase, Run, measure
from specengine.measure.summary import numbers, plain_of

K = int | str


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """All measurements with one k, of one prompt or, where prompt_index is None, of all."""

    k: K
    prompt_index: int | None


def measure_latency(call: Call, engine: Engine, ks: Sequence[K], *, repeats: int) -> Iterator[Record]:
    """Yields a record for each generation, as it is made.

    ks: settings of `num_speculative_tokens`; plain decoding, 0, is measured besides

    Raises `SpecEngineError` where a generation failed.
    """
    cases = [EngineCase(engine, replace(call.params, num_speculative_tokens=k)) for k in with_plain(ks)]
    return measure(Run.start("latency"), cases, call.prompts, repeats=repeats)


def count_measurements(call: Call, ks: Sequence[K], *, repeats: int) -> int:
    """Records that `measure_latency` yields."""
    return len(with_plain(ks)) * len(call.prompts) * repeats


def with_plain(ks: Sequence[K]) -> list[K]:
    """The settings of `num_speculative_tokens` that are measured, each once, plain decoding first."""
    return list(dict.fromkeys([0, *ks]))


def summarize(records: Sequence[Record]) -> list[Summary]:
    """Of one run: for each k all prompts together, then each prompt, in the order of the first measurements."""
    groups: defaultdict[tuple[K, int | None], list[Record]] = defaultdict(list)
    for record in records:
        k = record.settings["num_speculative_tokens"]
        groups[k, None].append(record)
        groups[k, record.prompt_index].append(record)
    ks = sorted({k for k, _ in groups}, key=by_size)
    indices = [None, *sorted({record.prompt_index for record in records})]
    plain = plain_of(records)
    return [
        Summary(k=k, prompt_index=index, **numbers(groups[k, index], plain))
        for index in indices
        for k in ks
        if groups[k, index]
    ]


def by_size(k: K) -> tuple[bool, K]:
    """Sorts numbers, and "auto" behind them."""
    return isinstance(k, str), k
