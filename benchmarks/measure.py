"""Check, then time, then divide: what was measured, beside what, and as which share of the memory's bandwidth.

A timer (`cpu_timing.Cpu`, `gpu_timing.Gpu`) times calls of an op and of its rivals in turns. Every call gets a turn
number and works on other memory than the calls before it did, so that nothing comes from a cache.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cpu_timing import Cpu, about_processor, machine_name
from timing import Call, Timer

import specengine

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Subject:
    """What is measured.

    rows:       rows of a linear or of logits, queries of a sequence (attention), draft tokens k (verification)
    num_bytes:  what one call must read, and on a GPU write
    pytorch:    the ops it is compared with
    flashinfer: the kernels it is compared with
    target_us:  what docs/gpu.md wants of it on an H200
    """

    op: str
    shape: str
    dtype: str = ""
    rows: int = 1
    num_bytes: int = 0
    pytorch: str = ""
    flashinfer: str = ""
    target_us: float | None = None


@dataclass(frozen=True)
class Quantiles:
    """Microseconds a call."""

    minimum: float
    median: float
    p90: float


@dataclass(frozen=True)
class Row:
    """One line of the report, and of the results file."""

    subject: Subject
    timer: Timer
    us: Quantiles
    rivals_us: dict[str, Quantiles] = field(default_factory=dict)
    bandwidth: float | None = None  # GB/s, the timer's, beside this op
    launches: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.subject.num_bytes / self.us.median / 1e3 if self.subject.num_bytes else None

    @property
    def share(self) -> float | None:
        """Of the bandwidth."""
        speed = self.gigabytes_per_second
        return speed / self.bandwidth if speed and self.bandwidth else None

    def cells(self) -> dict[str, str]:
        """What the table shows, by column."""
        subject = self.subject
        form = ".3f" if self.us.median < 10 else ".1f" if self.us.median < 100 else ".0f"
        cells = {
            "op": subject.op,
            "shape": subject.shape,
            "dtype": subject.dtype,
            "rows": str(subject.rows),
            "launches": _number(self.launches, "d"),
            "target": _number(subject.target_us, ".1f"),
            "us": _number(self.us.median, form),
            "min": _number(self.us.minimum, form),
            "p90": _number(self.us.p90, form),
            "GB/s": _number(self.gigabytes_per_second, ".1f"),
            "share": _number(self.share, ".2f"),
        }
        for name, us in self.rivals_us.items():
            cells[f"{name} us"] = _number(us.median, form)
            cells[f"{name}/ours"] = _number(us.median / self.us.median, ".2f")
        return cells


class Report:
    """The session's rows."""

    def __init__(self, num_threads: int | None = None) -> None:
        self.rows: list[Row] = []
        self._cpu = Cpu(num_threads)

    def read_bandwidth(self) -> float:
        """GB/s of the CPU's memory, now."""
        return self._cpu.bandwidth()

    def compare(
        self,
        benchmark: BenchmarkFixture,
        subject: Subject,
        ours: Call,
        rivals: dict[str, Call],
        *,
        timer: Timer | None = None,
    ) -> Row:
        """Time ours and its rivals, on the CPU unless there is a timer."""
        timer = timer or self._cpu
        bandwidth = timer.bandwidth()
        measured = timer.measure(benchmark, ours, rivals)
        row = Row(
            subject,
            timer,
            quantiles(measured.seconds),
            {name: quantiles(seconds) for name, seconds in measured.rivals.items()},
            bandwidth,
            measured.launches,
            measured.notes,
        )
        return self._add(benchmark, row)

    def record(self, benchmark: BenchmarkFixture, subject: Subject, *, calls_per_round: int) -> None:
        """Add what `benchmark` has just timed, rounds of several calls."""
        seconds = [value / calls_per_round for value in benchmark.stats.stats.data]
        self._add(benchmark, Row(subject, self._cpu, quantiles(seconds)))

    def _add(self, benchmark: BenchmarkFixture, row: Row) -> Row:
        benchmark.extra_info.update(as_json(row))
        self.rows.append(row)
        return row

    def lines(self) -> list[str]:
        """A table for each machine."""
        timers = {id(row.timer): row.timer for row in self.rows}
        return [
            line
            for timer in timers.values()
            for line in _section(timer, [row for row in self.rows if row.timer is timer])
        ]

    def append_to(self, path: Path) -> None:
        """One JSON object a row and line."""
        append_rows(map(as_json, self.rows), path)


def quantiles(seconds: list[float]) -> Quantiles:
    values = sorted(value * 1e6 for value in seconds)
    return Quantiles(
        minimum=round(values[0], 3),
        median=round(statistics.median(values), 3),
        p90=round(values[min(len(values) - 1, len(values) * 9 // 10)], 3),
    )


def append_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a row and line, each with what it was measured on; what a row says itself stands."""
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    about = {
        "machine": machine_name(),
        **about_processor(),
        "specengine": specengine.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]) + ("+changes" if changes else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **about, **row}) + "\n" for row in rows)


def as_json(row: Row) -> dict[str, Any]:
    """Plain values, those that were not measured left out."""
    values = {
        **asdict(row.subject),
        "us": asdict(row.us),
        **{f"{name}_us": asdict(us) for name, us in row.rivals_us.items()},
        "launches": row.launches,
        "gigabytes_per_second": row.gigabytes_per_second,
        f"{row.timer.bandwidth_name}_bandwidth": row.bandwidth,
        "share": row.share,
        "notes": "; ".join(row.notes),
        **row.timer.about(),
        **about_processor(),
    }
    return {
        name: round(x, 3) if isinstance(x, float) else x for name, x in values.items() if x not in (None, "")
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _section(timer: Timer, rows: list[Row]) -> list[str]:
    about = timer.about()
    head = ", ".join([about.pop("machine"), *(f"{name} {value}" for name, value in about.items())])
    if timer.bandwidths:
        best, typical = max(timer.bandwidths), statistics.median(timer.bandwidths)
        head += (
            f"; {timer.bandwidth_name} bandwidth {best:.1f} GB/s at best, {typical:.1f} typically "
            f"(share: of what it was beside the op)"
        )
    subjects = {row.subject for row in rows if row.rivals_us}
    lines = {f"pytorch of {subject.op}: {subject.pytorch}" for subject in subjects if subject.pytorch}
    lines |= {
        f"flashinfer of {subject.op}: {subject.flashinfer}" for subject in subjects if subject.flashinfer
    }
    notes = {f"{row.subject.op}: {note}" for row in rows for note in row.notes}
    return [head, *_table([row.cells() for row in rows]), *sorted(lines), *sorted(notes)]


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Aligned columns, those that are empty in every row left out."""
    names = dict.fromkeys(name for cells in rows for name in cells)
    columns = [name for name in names if any(cells.get(name) for cells in rows)]
    lines = [columns, *([cells.get(name, "") for name in columns] for cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_text = [name in ("op", "shape", "dtype") for name in columns]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        )
        for line in lines
    ]
