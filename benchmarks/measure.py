"""Check, then time, then divide: a native op and PyTorch's for the same thing, in turns, and what share of the
memory's read bandwidth the native one reaches.

Every call gets a turn number and works on other memory than the last ROTATED_BYTES of calls did, so that nothing
comes from a cache. The bandwidth is that of `specengine._C.read_all` on as many threads, measured beside each op:
on shared machines it moves within minutes.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import specengine
from specengine import _C

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).resolve().parent.parent
ROTATED_BYTES = 256 << 20
BANDWIDTH_BYTES = 1 << 30
BANDWIDTH_PASSES = 3
NATIVE_SECONDS, PYTORCH_SECONDS = 0.3, 0.4  # a benchmark's budgets; a round is one call
NATIVE_ROUNDS, PYTORCH_ROUNDS = (5, 41), (3, 15)  # at least, at most
LONG_SECONDS = 0.01  # a call that needs no other before it to wake the threads
# OpenMP's threads spin for milliseconds after PyTorch's op and would take a core from ours.
PAUSE_SECONDS = 0.008

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    rows:      rows of a linear, queries of a sequence (attention), draft tokens k (verification)
    num_bytes: what one call must read
    pytorch:   the op it is compared with
    """

    op: str
    shape: str
    dtype: str = ""
    rows: int = 1
    num_bytes: int = 0
    pytorch: str = ""


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
    us: Quantiles
    torch_us: Quantiles | None = None
    bandwidth: float | None = None  # GB/s of read_all beside this op

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.subject.num_bytes / self.us.median / 1e3 if self.subject.num_bytes else None

    @property
    def share(self) -> float | None:
        """Of the read bandwidth."""
        speed = self.gigabytes_per_second
        return speed / self.bandwidth if speed and self.bandwidth else None

    @property
    def speedup(self) -> float | None:
        return self.torch_us.median / self.us.median if self.torch_us else None


def num_copies(num_bytes: int) -> int:
    """Copies of `num_bytes` to rotate over."""
    return max(2, -(-ROTATED_BYTES // num_bytes))


def quantiles(seconds: list[float]) -> Quantiles:
    values = sorted(value * 1e6 for value in seconds)
    return Quantiles(
        minimum=round(values[0], 3),
        median=round(statistics.median(values), 3),
        p90=round(values[min(len(values) - 1, len(values) * 9 // 10)], 3),
    )


def num_rounds(seconds: float, budget: float, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], int(budget / seconds)))


def timed(call: Call, turn: int) -> float:
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_name() -> str:
    """Processor, instruction set and threads."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    info = _C.build_info()
    return f"{(names or [platform.machine()])[0]}, {info['instruction_set']}, {info['num_threads']} threads"


def append_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a row and line, each with what it was measured on."""
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    about = {
        "machine": machine_name(),
        "specengine": specengine.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]) + ("+changes" if changes else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


class Report:
    """The session's rows and its read bandwidth."""

    def __init__(self) -> None:
        torch.set_num_threads(_C.num_threads())
        self.rows: list[Row] = []
        self.bandwidths: list[float] = []
        self._buffer: torch.Tensor | None = None

    def read_bandwidth(self) -> float:
        """GB/s over memory that is in no cache, the best of some passes, now."""
        if self._buffer is None:
            self._buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
            _C.read_all(self._buffer)
        buffer = self._buffer
        seconds = min(timed(lambda _: _C.read_all(buffer), 0) for _ in range(BANDWIDTH_PASSES))
        self.bandwidths.append(BANDWIDTH_BYTES / seconds / 1e9)
        return self.bandwidths[-1]

    def compare(self, benchmark: BenchmarkFixture, subject: Subject, native: Call, pytorch: Call) -> None:
        """Time both in turns. Before each timed call an untimed one of the same op, as in a decode step, where
        ops follow each other: the threads are awake, the code is in cache, the data is not."""
        bandwidth = self.read_bandwidth()
        turns = itertools.count()
        for call in (native, pytorch):
            call(next(turns))
        cost, torch_cost = timed(native, next(turns)), timed(pytorch, next(turns))
        rounds = num_rounds(cost, NATIVE_SECONDS, NATIVE_ROUNDS)
        every = -(-rounds // num_rounds(torch_cost, PYTORCH_SECONDS, PYTORCH_ROUNDS))
        torch_seconds: list[float] = []
        done = itertools.count()

        def prepare() -> tuple[tuple[int], dict[str, Any]]:
            if next(done) % every == 0:
                wake(pytorch, torch_cost)
                torch_seconds.append(timed(pytorch, next(turns)))
                time.sleep(PAUSE_SECONDS)
            wake(native, cost)
            return (next(turns),), {}

        def wake(call: Call, seconds: float) -> None:
            if seconds < LONG_SECONDS:
                call(next(turns))

        benchmark.pedantic(native, setup=prepare, rounds=rounds)
        seconds = list(benchmark.stats.stats.data)
        self._add(benchmark, Row(subject, quantiles(seconds), quantiles(torch_seconds), bandwidth))

    def record(self, benchmark: BenchmarkFixture, subject: Subject, *, calls_per_round: int) -> None:
        """Add what `benchmark` has just timed, rounds of several calls."""
        seconds = [value / calls_per_round for value in benchmark.stats.stats.data]
        self._add(benchmark, Row(subject, quantiles(seconds)))

    def _add(self, benchmark: BenchmarkFixture, row: Row) -> None:
        benchmark.extra_info.update(as_json(row))
        self.rows.append(row)

    def lines(self) -> list[str]:
        """The table."""
        columns = (
            "op",
            "shape",
            "dtype",
            "rows",
            "us",
            "min",
            "p90",
            "GB/s",
            "share",
            "torch us",
            "min",
            "torch/ours",
        )
        cells = [columns, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        table = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        head = machine_name()
        if self.bandwidths:
            best, typical = max(self.bandwidths), statistics.median(self.bandwidths)
            head += f"; reads {best:.1f} GB/s at best, {typical:.1f} typically (share: of what it was beside the op)"
        comparisons = sorted(
            {f"{row.subject.op}: {row.subject.pytorch}" for row in self.rows if row.torch_us}
        )
        return [head, *table, *(f"torch us of {line}" for line in comparisons)]

    def append_to(self, path: Path) -> None:
        """One JSON object a row and line."""
        append_rows(map(as_json, self.rows), path)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    subject = row.subject
    return (
        subject.op,
        subject.shape,
        subject.dtype,
        str(subject.rows),
        *(
            number(us, ".3f" if row.us.median < 10 else ".0f")
            for us in (row.us.median, row.us.minimum, row.us.p90)
        ),
        number(row.gigabytes_per_second, ".1f"),
        number(row.share, ".2f"),
        number(row.torch_us.median if row.torch_us else None, ".0f"),
        number(row.torch_us.minimum if row.torch_us else None, ".0f"),
        number(row.speedup, ".2f"),
    )


def as_json(row: Row) -> dict[str, Any]:
    """Plain values, those that were not measured left out."""
    values = {
        **asdict(row.subject),
        "us": asdict(row.us),
        "torch_us": asdict(row.torch_us) if row.torch_us else None,
        "gigabytes_per_second": row.gigabytes_per_second,
        "read_bandwidth": row.bandwidth,
        "share": row.share,
    }
    return {
        name: round(x, 3) if isinstance(x, float) else x for name, x in values.items() if x not in (None, "")
    }
