"""Every combination of settings, each with plain decoding beside it: `specengine bench sweep`.

A *setup* is an engine: what drafts, in which dtypes, with or without the prefix cache. A *cell* is a setup with one
batch size, temperature, top-k, top-p and way to judge drafts; it has plain decoding and every k, measured in one
rotation (`runs`). Engines are loaded one at a time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specengine.call import Call, prepare_call
from specengine.config import EngineConfig, SamplingParams
from specengine.drafters import registry
from specengine.engine import Engine, assembly
from specengine.measure import summary
from specengine.measure.latency import K, by_size, with_plain
from specengine.measure.records import Record
from specengine.measure.runs import EngineCase, Run, measure, num_batches
from specengine.measure.summary import numbers, plain_of
from specengine.prompt import Prompt

# What a cell is known by, in the order of loops: the last one changes first.
SETUP_NAMES = ("draft_model", "dtype", "weight_dtype", "draft_weight_dtype", "enable_prefix_cache")
REQUEST_NAMES = ("batch_size", "acceptance", "top_k", "top_p", "temperature")
CELL_NAMES = (*SETUP_NAMES, *REQUEST_NAMES)
_PAIR_NAMES = SETUP_NAMES[:4]
# What changes nothing where the likeliest token is taken.
_AT_TEMPERATURE_0 = {"top_k": 0, "top_p": 1.0, "acceptance": "auto"}


@dataclass(frozen=True, kw_only=True)
class Cell(summary.Summary):
    """All measurements of one cell with one k. cell: the values of `CELL_NAMES`."""

    cell: dict[str, Any]
    k: K

    def flat(self) -> dict[str, Any]:
        columns = super().flat()
        return {**columns.pop("cell"), "num_speculative_tokens": columns.pop("k"), **columns}


@dataclass(frozen=True)
class Setup:
    """What an engine is built of."""

    model: Any
    draft_model: Any
    config: EngineConfig

    def check(self) -> None:
        """Raises what building it would as far as configs tell: no weight is read."""
        assembly.resolve_device(self.config.device)
        drafters = assembly.list_drafters(self.draft_model)
        target = assembly.open_model(self.model, self.config)
        for drafter in drafters:
            registry.check(drafter, target.spec)
            assembly.open_draft(drafter, self.config)

    def load(self) -> Engine:
        config = assembly.config_for(self.config, self.draft_model)
        return Engine(self.model, self.draft_model, config=config, progress=False)


@dataclass(frozen=True)
class Plan:
    """What is measured: every request in every setup, with plain decoding and every k.

    requests: parameters and batch size
    ks:       plain decoding, 0, first
    """

    setups: tuple[Setup, ...]
    requests: tuple[tuple[SamplingParams, int], ...]
    ks: tuple[K, ...]

    def count(self, num_prompts: int, *, repeats: int) -> int:
        """Records that `sweep` yields."""
        generations = sum(num_batches(num_prompts, batch_size) for _, batch_size in self.requests)
        return len(self.setups) * generations * len(self.ks) * repeats


def build_plan(options: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> Plan:
    """Checks all combinations; loads nothing.

    options: what all of them share, by the library's names; "model" is among them
    axes:    values of `CELL_NAMES` and "num_speculative_tokens"

    At temperature 0 `top_k`, `top_p` and `acceptance` change nothing, and are measured once.

    Raises `ValueError`, `TypeError` or `ModelLoadError` for what cannot be.
    """
    if len(axes["dtype"]) > 1 and "auto" in axes["dtype"]:
        raise ValueError("dtype='auto' is one of the others: a list of several names each")
    ks = with_plain(axes["num_speculative_tokens"])
    setups: list[Setup] = []
    requests: dict[tuple[SamplingParams, int], None] = {}
    for values in itertools.product(*(axes[name] for name in SETUP_NAMES)):
        asked = {**options, **dict(zip(SETUP_NAMES, values, strict=True))}
        call = _prepare(asked, ks[-1])
        setups.append(Setup(call.model, call.draft_model, call.config))
        setups[-1].check()
    for values in itertools.product(*(axes[name] for name in REQUEST_NAMES)):
        asked = dict(zip(REQUEST_NAMES, values, strict=True))
        batch_size = asked.pop("batch_size")
        if asked["temperature"] == 0:
            asked.update(_AT_TEMPERATURE_0)
        if batch_size > (limit := setups[0].config.max_batch_size):
            raise ValueError(f"batch_size={batch_size} is more than max_batch_size={limit}")
        requests[_prepare({**options, **asked}, 0).params, batch_size] = None
    return Plan(tuple(setups), tuple(requests), tuple(ks))


def _prepare(options: Mapping[str, Any], k: K) -> Call:
    return prepare_call("any", {**options, "num_speculative_tokens": k})


def sweep(plan: Plan, prompts: Sequence[Prompt], *, repeats: int) -> Generator[Record, None, None]:
    """Yields a record for each generation, as it is made. Raises `SpecEngineError` where one failed."""
    run = Run.start("sweep")
    for setup in plan.setups:
        with setup.load() as engine:
            for params, batch_size in plan.requests:
                yield from measure(run, _cases(engine, params, batch_size, plan.ks), prompts, repeats=repeats)


def _cases(engine: Engine, params: SamplingParams, batch_size: int, ks: Sequence[K]) -> list[EngineCase]:
    return [EngineCase(engine, replace(params, num_speculative_tokens=k), batch_size) for k in ks]


# What comes of it


def cell_of(record: Record) -> dict[str, Any]:
    """The values of `CELL_NAMES`."""
    return {name: (record.pair if name in _PAIR_NAMES else record.settings)[name] for name in CELL_NAMES}


def summarize(records: Sequence[Record]) -> list[Cell]:
    """Of one run: its cells in the order of their first measurements, plain decoding before every k."""
    cells: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        cells[tuple(cell_of(record).values())].append(record)
    return [each for measured in cells.values() for each in _summarize_cell(measured)]


def _summarize_cell(records: Sequence[Record]) -> Iterator[Cell]:
    cell, plain = cell_of(records[0]), plain_of(records)
    ks: defaultdict[K, list[Record]] = defaultdict(list)
    for record in records:
        ks[record.settings["num_speculative_tokens"]].append(record)
    for k in sorted(ks, key=by_size):
        yield Cell(cell=cell, k=k, **numbers(ks[k], plain))
