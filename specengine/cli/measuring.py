"""What measuring commands share: prompts, repeats and files as options, a live table, and keeping what was measured."""

from __future__ import annotations

import csv
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED, complain
from specengine.config import (
    MAX_NUM_SPECULATIVE_TOKENS,
    EngineConfig,
    ModelOptions,
    SamplingParams,
    declaration,
    field_names,
)
from specengine.errors import SpecEngineError
from specengine.kinds import IntegerOrAuto, Kind

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.console import RenderableType

    from specengine.call import Call
    from specengine.measure.records import Record

Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=".jsonl, or a text file with a prompt a line; by default bundled ones"),
]
NumPrompts = Annotated[
    int | None, typer.Option(metavar="INT", min=1, help="of them; by default all of a file, 3 bundled ones")
]
Repeats = Annotated[int, typer.Option(metavar="INT", min=1, help="times that each is measured")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="append every measurement to it, a JSON object a line")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="the table on stdout as CSV, in seconds and bytes")]
Lookaheads = Annotated[
    str,
    typer.Option(
        "--num-speculative-tokens",
        "-k",
        metavar="LIST",
        help="draft tokens a round, with commas; auto too",
    ),
]

_GROUPS: tuple[Any, ...] = (ModelOptions, SamplingParams, EngineConfig)
_OPTIONS = [name for group in _GROUPS for name in field_names(group)]
# Seconds between two looks at the table: what it shows is computed anew each time, between two measurements.
_SECONDS_A_LOOK = 0.5


def all_options_but(*names: str) -> list[str]:
    """The library's options without those that a command asks for in its own way."""
    return [name for name in _OPTIONS if name not in names]


def read_lookaheads(text: str) -> list[int | str]:
    """Numbers of draft tokens, each once."""
    return read_list("num_speculative_tokens", text, IntegerOrAuto(1, MAX_NUM_SPECULATIVE_TOKENS))


def read_list(name: str, text: str, kind: Kind | None = None) -> list[Any]:
    """Values of an option, written with commas, each once; of the kind that the option is declared to be unless another
    is given."""
    if kind is None:
        item = next(item for group in _GROUPS for item in fields(group) if item.name == name)
        kind = declaration(item).kind
    return list(dict.fromkeys(kind.check(name, kind.parse(part.strip())) for part in text.split(",")))


def prepare_drafted_call(
    command: str, options: Mapping[str, Any], k: int | str, prompts: Path | None, num_prompts: int | None
) -> Call:
    """The call whose engine is measured: with the prompts of a file or bundled ones, and with something that drafts."""
    from specengine.call import prepare_call
    from specengine.measure.bench_prompts import read_prompts

    call = prepare_call(read_prompts(prompts, num_prompts), {**options, "num_speculative_tokens": k})
    if call.draft_model is None:
        raise ValueError(f"{command} needs a draft_model: without one there is only plain decoding")
    return call


def check_outputs(*, as_json: bool, as_csv: bool) -> None:
    """Before anything is done."""
    if as_json and as_csv:
        raise ValueError("--json and --csv both write on stdout: give one of them")


def check_out(out: Path | None) -> None:
    """What cannot be written is known before anything is measured."""
    from specengine.measure.records import append_records

    if out is not None:
        append_records(out, [])


@dataclass
class Measurements:
    """What was measured of `total` records (None: nobody knows), all of it in `out`, and what ended it early."""

    total: int | None
    out: Path | None
    records: list[Record] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        return self.failure is None

    def to_json(self, **found: Any) -> dict[str, Any]:
        """What a command writes with --json: whether it is all, what was found, and every record."""
        records = [record.to_dict() for record in self.records]
        return {"is_complete": self.is_complete, **found, "records": records}

    def finish(self) -> None:
        """Says what was kept where it is not all, and ends the command as what ended it early asks."""
        if self.failure is None:
            return
        sys.stdout.flush()
        of_all = "" if self.total is None else f" of {self.total}"
        kept = f"{len(self.records)}{of_all} measurements were made"
        kept += "" if self.out is None else f"; they are in {self.out}"
        if isinstance(self.failure, KeyboardInterrupt):
            complain(f"interrupted: {kept}")
            raise typer.Exit(EXIT_INTERRUPTED)
        complain(kept)
        raise self.failure


def collect(
    records: Generator[Record, None, None],
    *,
    total: int | None,
    out: Path | None,
    draw: Callable[[Sequence[Record]], RenderableType],
) -> Measurements:
    """Takes all records, and writes each to `out` as it comes. An interruption or a failure ends it, and what came
    before is kept.

    draw: the table of what there is, shown on a terminal while measuring
    """
    from specengine.measure.records import append_records

    kept = Measurements(total, out)
    try:
        with closing(records), _live(total, draw) as show:
            for record in records:
                with _uninterrupted():
                    if out is not None:
                        append_records(out, [record])
                    kept.records.append(record)
                show(kept.records)
    except (KeyboardInterrupt, SpecEngineError, ValueError, OSError) as error:
        if not kept.records and not isinstance(error, KeyboardInterrupt):
            raise
        kept.failure = error
    return kept


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this: what is in the file and what is counted stay the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            raise KeyboardInterrupt


@contextmanager
def _live(total: int | None, draw: Callable[[Sequence[Record]], RenderableType]) -> Iterator[Any]:
    """Yields what shows the measurements so far: a table, how many there are and the time left. On a terminal only."""
    if not sys.stderr.isatty():
        yield lambda records: None
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from specengine.cli.terminal import stderr_console

    bar = Progress(
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
    )
    task = bar.add_task("measuring", total=total)
    last_look = float("-inf")
    with Live(bar, console=stderr_console(), transient=True) as live:

        def show(records: Sequence[Record]) -> None:
            nonlocal last_look
            bar.update(task, completed=len(records))
            if (now := time.monotonic()) - last_look >= _SECONDS_A_LOOK:
                last_look = now
                live.update(Group(draw(records), bar))

        yield show


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """On stdout; what is None is empty."""
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
