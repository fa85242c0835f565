"""End to end: ours beside `transformers` and a compiled decode step; and ours with forced acceptance.

Every system lives in a process of its own, as in `bench_generate.py`, and they take turns. What comes before the turns
that count is a whole one that does not: it compiles, records graphs, and shows what everybody says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from generation import contest
from generation.contest import Contest, NotExactError
from generation.plan import OURS, spread
from generation.process import Worker
from generation.rows import Record

from gpu_parts.context import Context, FailedError
from gpu_parts.entrants import COMPILED, Builder, Enter, Entrant, System
from gpu_parts.machine import measure_bandwidth
from gpu_parts.models import Cost, build_models, read_prompts, workload
from gpu_parts.rows import Block, build_row, first_difference

# Of the part's limit: what a system may take to start, or for an answer; what a batch size is not begun without.
ANSWER_SHARE, BLOCK_SHARE = 0.4, 0.1
# Seconds at the end that nothing is planned for; seconds that make a turn a slow one.
RESERVE_SECONDS, SLOW_SECONDS = 20.0, 3.0
NO_TIME = "no time was left in this part"


def run(context: Context) -> None:
    """The rows of a pair: of as many of the part's batch sizes as there is time for."""
    sizes = (1, 2) if context.settings.is_rehearsal else tuple(context.arguments["batch_sizes"])
    measure(context, sizes, Builder.real)


def run_forced(context: Context) -> None:
    """Our plain decoding, and speculation in which each draft token is accepted with a given probability."""
    measure(context, (1,), Builder.forced)


@dataclass(frozen=True)
class Memory:
    """A bandwidth that was measured at the start: a GPU's does not move."""

    bandwidth: float

    def read_bandwidth(self) -> float:
        return self.bandwidth


class Exactness:
    """Ours says the same in every way: with and without drafts and graphs, alone and in a batch."""

    def __init__(self, systems: dict[str, System]) -> None:
        self._systems = systems
        self._expected: dict[tuple[int, ...], list[int]] = {}

    def check(self, records: list[Record]) -> None:
        """Of the last answers; raises `NotExactError`. Plain decoding says what is right, the first of ours."""
        for record in records:
            system = self._systems[record.entry.contestant]
            if not system.is_ours or system.forced is not None or not record.turns:
                continue
            prompts, answers = record.entry.task.prompts, record.turns[-1].answer.token_ids
            pairs = zip(map(tuple, prompts), answers, strict=True)
            expected = [self._expected.setdefault(prompt, tokens) for prompt, tokens in pairs]
            place = first_difference(expected, answers)
            if place is not None:
                raise NotExactError(
                    f"{system.name}, {record.entry.mode}: token {place} is not plain decoding's"
                )


@dataclass(frozen=True)
class Race:
    """The systems of a part that could be started.

    block: what all rows have in common
    """

    context: Context
    entrants: list[Entrant]
    workers: dict[str, Worker]
    reasons: dict[str, str]
    exactness: Exactness
    block: Block

    @property
    def systems(self) -> dict[str, System]:
        return {entrant.system.name: entrant.system for entrant in self.entrants}

    def run(self, batch_size: int, prompts: list[list[int]], seconds: float) -> list[str]:
        """Adds the rows of a batch size, in about so many seconds. What ours could not do is returned."""
        records = self._build_records(batch_size, prompts)
        block = replace(self.block, batch_size=batch_size)
        if seconds < BLOCK_SHARE * self.context.settings.limit:
            for record in records:
                record.reason = record.reason or NO_TIME
        else:
            self.context.say(f"{block.pair}, {batch_size} at a time")
            self._take_turns(records, seconds)
        block = replace(block, plain=find(records, OURS), compiled=find(records, COMPILED))
        rows = [build_row(record, self.systems[record.entry.contestant], block) for record in records]
        for row in rows:
            self.context.add(row.to_json())
        is_ours = {name for name, system in self.systems.items() if system.is_ours}
        return [
            f"{row.system}, {row.mode}: {row.reason}" for row in rows if row.reason and row.system in is_ours
        ]

    def _build_records(self, batch_size: int, prompts: list[list[int]]) -> list[Record]:
        length = self.block.workload.max_new_tokens
        return [
            contest.build_record(
                entry,
                entrant.setup,
                self.workers.get(entrant.system.name),
                self.reasons.get(entrant.system.name),
            )
            for entrant in self.entrants
            for entry in entrant.entries(prompts, length, is_batch=batch_size > 1)
        ]

    def _take_turns(self, records: list[Record], seconds: float) -> None:
        end = time.monotonic() + seconds
        memory = Memory(self.block.bandwidth)
        load, check = self.block.workload, self.exactness.check
        race = Contest(self.workers, records, memory, self.context.say, check, load.pause)
        race.take_turns(1)
        self._compare(records)
        quick = [record for record in records if record.turns and seconds_of(record) < SLOW_SECONDS]
        for record in records:
            record.turns.clear()
        num_together = min(load.slow_repetitions, load.repetitions)
        race.take_turns(num_together, is_late=before_the_last(end))
        if time.monotonic() < end and num_together < load.repetitions:
            race = replace(race, records=quick)
            race.take_turns(load.repetitions - num_together, is_late=before_the_last(end))

    def _compare(self, records: list[Record]) -> None:
        """In fp32 everybody must say what ours says; in 16 bits rows tell where the tokens part."""
        plain = find(records, OURS)
        if self.block.dtype != "float32" or plain is None:
            return
        for record in records:
            if record.turns and self.systems[record.entry.contestant].forced is None:
                ours, theirs = plain.turns[0].answer.token_ids, record.turns[0].answer.token_ids
                place = first_difference(ours, theirs)
                if place is not None:
                    record.reason = f"in fp32, token {place} is not ours"


def seconds_of(record: Record) -> float:
    """Of its last turn."""
    answer = record.turns[-1].answer
    prompts = max if record.entry.task.is_batch else sum
    return prompts(answer.prompt_seconds) + answer.decode_seconds


def before_the_last(end: float) -> Callable[[], bool]:
    """Whether another repetition, as long as those before it were, would go on beyond `end`."""
    began, num_done = time.monotonic(), 0

    def is_late() -> bool:
        nonlocal num_done
        num_done += 1
        now = time.monotonic()
        return now + (now - began) / num_done > end

    return is_late


def find(records: list[Record], contestant: str) -> Record | None:
    """Its plain decoding, where it was measured."""
    found = (each for each in records if each.entry.contestant == contestant and each.entry.is_plain)
    return next((record for record in found if record.turns and record.reason is None), None)


def measure(context: Context, batch_sizes: tuple[int, ...], enter: Enter) -> None:
    """Raises `FailedError` where ours is not exact, or could not do something."""
    load, settings = workload(context), context.settings
    pair, target, draft = build_models(context)
    _, bandwidth = measure_bandwidth(settings.device)
    costs = Cost.read(target, settings.dtype), Cost.read(draft, settings.dtype)
    block = Block(pair, settings.dtype, load, 0, *costs, bandwidth)
    entrants = enter(Builder(settings, load, target, draft, max(batch_sizes)))
    counts = {size: load.num_prompts if size == 1 else size for size in batch_sizes}
    prompts = read_prompts(max(counts.values()), load.prompt_length)
    failures: list[str] = []
    with ExitStack() as stack:
        setups, timeout = [entrant.setup for entrant in entrants], ANSWER_SHARE * settings.limit
        workers, reasons = contest.start(setups, stack, context.say, steps=(), timeout=timeout)
        exactness = Exactness({entrant.system.name: entrant.system for entrant in entrants})
        race = Race(context, entrants, workers, reasons, exactness, block)
        for place, (size, count) in enumerate(counts.items()):
            seconds = (context.remaining() - RESERVE_SECONDS) / (len(counts) - place)
            try:
                failures += race.run(size, spread(prompts, count), seconds)
            except NotExactError as error:
                raise FailedError(f"ours is not exact: {error}") from None
    if failures:
        raise FailedError("; ".join(failures))
