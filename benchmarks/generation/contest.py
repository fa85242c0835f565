"""One pair in one dtype: start the contestants, let them take turns, compare what they said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from measure import Report
from pairs import build_pair

from generation import process, trial
from generation.plan import OURS, Entry, Options, Pair, Prompts, build_entries, weight_bytes
from generation.process import Worker
from generation.protocol import Setup, Task, UnavailableError
from generation.rows import Record, Row, Turn, build_row

# Threads of whoever had the last turn have gone to sleep by then.
PAUSE_SECONDS = 0.25
WARM_UP_TOKENS = 8
# A worker that waits for its turn should use nothing; more than this is told.
IDLE_SHARE = 0.02
SOURCE_DTYPES = {"float32": torch.float32}  # of the checkpoint that is written; else bf16

Say = Callable[[str], None]


class NotExactError(Exception):
    """Our speculative or batched tokens are not our plain ones: nothing that was timed is worth reporting."""


class Memory(Protocol):
    """Whose bandwidth stands beside a turn."""

    def read_bandwidth(self) -> float:
        """GB/s, now."""


@dataclass
class Contest:
    """The contestants of a pair and dtype that could be started, and everybody's records.

    check: what must be true of the records after each repetition
    pause: seconds before a turn
    """

    workers: dict[str, Worker]
    records: list[Record]
    report: Memory
    say: Say
    check: Callable[[list[Record]], None] = field(default_factory=lambda: check_exact)
    pause: float = field(default_factory=lambda: PAUSE_SECONDS)

    def take_turns(self, repetitions: int, *, is_late: Callable[[], bool] = lambda: False) -> None:
        """Every entry once a repetition, to and fro, so that nobody always follows the same one.

        is_late: whether there is no time for another repetition
        """
        for repetition in range(repetitions):
            started = time.perf_counter()
            for record in self.records if repetition % 2 == 0 else reversed(self.records):
                self._take_turn(record)
            self.check(self.records)
            self.say(f"  repetition {repetition + 1} of {repetitions}: {time.perf_counter() - started:.0f} s")
            if is_late():
                return

    def warm_up(self) -> None:
        for record in self._able():
            task = record.entry.task
            short = replace(task, max_new_tokens=min(task.max_new_tokens, WARM_UP_TOKENS))
            with noting(record):
                self.workers[record.entry.contestant].generate(
                    short if task.is_batch else replace(short, prompts=task.prompts[:1])
                )

    def _able(self) -> Iterator[Record]:
        return (record for record in self.records if record.reason is None)

    def _take_turn(self, record: Record) -> None:
        if record.reason is not None:
            return
        bandwidth = self.report.read_bandwidth()
        time.sleep(self.pause)
        before, started = self._others_cpu_seconds(record.entry), time.perf_counter()
        with noting(record):
            answer = self.workers[record.entry.contestant].generate(record.entry.task)
            record.turns.append(Turn(answer, bandwidth))
        share = (self._others_cpu_seconds(record.entry) - before) / (time.perf_counter() - started)
        if share > IDLE_SHARE:
            self.say(f"  waiting contestants used {share:.0%} of a core while {record.entry.contestant} ran")

    def _others_cpu_seconds(self, entry: Entry) -> float:
        return sum(worker.cpu_seconds() for name, worker in self.workers.items() if name != entry.contestant)


@contextmanager
def noting(record: Record) -> Iterator[None]:
    """Whatever makes the contestant unable becomes the record's reason."""
    try:
        yield
    except UnavailableError as error:
        record.reason = str(error)


def check_exact(records: list[Record]) -> None:
    """Every answer of ours has, for each prompt, the tokens of our plain decoding."""
    ours = [record for record in records if record.entry.contestant == OURS and record.turns]
    plain = next((record for record in ours if record.entry.is_baseline), None)
    if plain is None:
        return
    expected = dict(zip(map(tuple, plain.entry.task.prompts), plain.turns[0].answer.token_ids, strict=True))
    for record in ours:
        if record.entry.kind == "prefill":
            continue
        answer = record.turns[-1].answer
        for prompt, tokens in zip(record.entry.task.prompts, answer.token_ids, strict=True):
            if tokens != expected.get(tuple(prompt), tokens):
                raise NotExactError(f"{record.entry.mode} gave {tokens}, plain {expected[tuple(prompt)]}")


def build_setup(
    contestant: str, target: Path, draft: Path, dtype: str, options: Options, cache: Path
) -> Setup:
    can_choose = contestant != "transformers"
    return Setup(
        contestant=contestant,
        target=str(target),
        draft=str(draft),
        dtype=dtype,
        draft_dtype=(options.draft_dtype if can_choose else None) or dtype,
        speculates=bool(options.k if contestant == OURS else options.peer_k),
        num_threads=options.num_threads,
        max_seq_len=options.max_seq_len,
        max_batch_size=max(options.batch_sizes),
        cache=str(cache),
    )


def build_record(entry: Entry, setup: Setup, worker: Worker | None, reason: str | None) -> Record:
    return Record(
        entry,
        settings=worker.about["settings"] if worker else "",
        instruction_set=worker.about["instruction_set"] if worker else "",
        versions=worker.about["versions"] if worker else {},
        target_bytes=weight_bytes(Path(setup.target), setup.dtype, setup.contestant),
        draft_bytes=weight_bytes(Path(setup.draft), setup.draft_dtype, setup.contestant),
        reason=reason,
    )


def start(
    setups: list[Setup],
    stack: ExitStack,
    say: Say,
    *,
    steps: tuple[Callable[[Setup], None], ...] = (process.prepare,),
    tasks: Sequence[Task] = (),
    timeout: float = process.TIMEOUT_SECONDS,
) -> tuple[dict[str, Worker], dict[str, str]]:
    """(workers, reasons of those that could not be started), by contestant; everybody's files are written first.

    steps:   what comes before loading
    tasks:   what a contestant is tried with; whoever fails does not count
    timeout: seconds that each answer may take
    """
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}

    def load(setup: Setup) -> None:
        say(f"  {setup.contestant}: loading" + (" and trying" if tasks else ""))
        workers[setup.contestant] = trial.load(setup, tasks, say, timeout=timeout)
        stack.callback(workers[setup.contestant].close)

    for step in (*steps, load):
        for setup in setups:
            if setup.contestant in reasons:
                continue
            try:
                step(setup)
            except UnavailableError as error:
                reasons[setup.contestant] = str(error)
                say(f"  {setup.contestant}: {error}")
    return workers, reasons


def run(
    pair: Pair, dtype: str, options: Options, prompts: Prompts, *, report: Report, cache: Path, say: Say
) -> list[Row]:
    """The rows of one pair in one dtype. Raises `NotExactError`; leaves no process behind, whatever happens."""
    say(f"{pair}, {dtype}: writing and loading models")
    target, draft = build_pair(pair.target, pair.draft, cache, SOURCE_DTYPES.get(dtype, torch.bfloat16))
    setups = {name: build_setup(name, target, draft, dtype, options, cache) for name in options.contestants}
    with ExitStack() as stack:
        workers, reasons = start(
            list(setups.values()), stack, say, tasks=trial.tasks(prompts.short[0], prompts.long[-1])
        )
        records = [
            build_record(
                entry, setups[entry.contestant], workers.get(entry.contestant), reasons.get(entry.contestant)
            )
            for entry in build_entries(options, prompts)
            # whoever could not be started has one row, that says why
            if entry.contestant in workers or (entry.kind == "generate" and entry.is_plain)
        ]
        contest = Contest(workers, records, report, say)
        contest.warm_up()
        contest.take_turns(options.repetitions)
    return build_rows(records, str(pair), dtype, options)


def build_rows(records: list[Record], pair: str, dtype: str, options: Options) -> list[Row]:
    """A row an entry, by contestant, prefill last; each contestant's fastest speculative one is marked."""
    plain = next((record for record in records if record.entry.is_baseline and record.turns), None)
    prefills = {
        record.entry.mode: record
        for record in records
        if record.entry.contestant == OURS and record.entry.kind == "prefill" and record.turns
    }
    rows = [
        build_row(record, pair, dtype, options, plain, prefills.get(record.entry.mode)) for record in records
    ]
    place = options.contestants.index
    return mark_best(sorted(rows, key=lambda row: (row.kind == "prefill", place(row.contestant))))


def mark_best(rows: list[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in rows:
        if row.kind == "generate" and row.num_speculative_tokens != 0 and row.tokens_per_second is not None:
            leader = best.get(row.contestant)
            if leader is None or (leader.tokens_per_second or 0.0) < row.tokens_per_second:
                best[row.contestant] = row
    return [replace(row, is_best=row is best.get(row.contestant)) for row in rows]
