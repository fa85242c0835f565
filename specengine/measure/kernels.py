"""The microbenchmarks of a checkout, one op after the other: `specengine bench kernels`.

They lie in the repository, not in the package: each is a file benchmarks/bench_<op>.py for pytest-benchmark, which
checks its op, times it beside rivals in turns, and appends what it found to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import specengine
from specengine.errors import SpecEngineError
from specengine.measure.records import Record
from specengine.measure.runs import Run

# What a round spends its time in; all others by name. Some are timed on a GPU only.
DEFAULT_OPS = ("norm_qkv", "paged_attention", "linear_residual", "norm_linear", "head", "match_verify")
_SUBJECT = ("op", "shape", "dtype", "rows")


def find_benchmarks() -> Path:
    """The directory of the checkout that this package runs from. Raises `SpecEngineError` where it is none."""
    directory = Path(specengine.__file__).resolve().parents[1] / "benchmarks"
    if not (directory / "conftest.py").is_file():
        raise SpecEngineError(
            "bench kernels runs the benchmarks of a checkout, and this package is installed without one: clone the "
            "repository and run it there"
        )
    return directory


def known_ops(benchmarks: Path) -> list[str]:
    """The ops that have a benchmark."""
    found = (path.stem.removeprefix("bench_") for path in benchmarks.glob("bench_*.py"))
    return sorted(name for name in found if "def test_" in (benchmarks / f"bench_{name}.py").read_text())


def measure_kernels(benchmarks: Path, ops: Sequence[str], only: str | None) -> Generator[Record, None, None]:
    """Yields a row of the kind `kernels` for each shape, type and number of rows that was timed; op by op.

    only: of the benchmarks' names, as pytest's `-k` takes it

    Raises `SpecEngineError` where a benchmark failed, with what it said, and where there was none to run.
    """
    run, num_rows = Run.start("kernels"), 0
    for op in ops:
        for row in _run(benchmarks, op, only):
            num_rows += 1
            settings = {name: row.pop(name) for name in _SUBJECT if name in row}
            pair = {"device": row.get("machine"), "backend": row.get("backend")}
            yield Record(run.kind, run.name, run.environment, pair, settings, -1, 0, row)
    if not num_rows:
        chosen = "" if only is None else f" of {only!r}"
        raise SpecEngineError(
            f"no benchmark of {', '.join(ops)}{chosen} runs on this machine; some need a GPU"
        )


def _run(benchmarks: Path, op: str, only: str | None) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-only",
            "-n",
            "0",
        ]
        command += ["--results", str(rows), str(benchmarks / f"bench_{op}.py")]
        command += [] if only is None else ["-k", only]
        # What a pytest that this runs in has set is not for this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        found = subprocess.run(
            command, cwd=benchmarks.parent, capture_output=True, text=True, check=False, env=environment
        )
        nothing_chosen = 5
        if found.returncode not in (0, nothing_chosen):
            raise SpecEngineError(
                f"the benchmark of {op} failed:\n{found.stdout[-2000:]}{found.stderr[-1000:]}"
            )
        if not rows.exists():
            return []
        return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def cells(record: Record) -> dict[str, str]:
    """A row of the table, by title; what is not known is empty."""
    row, settings = record.measured, record.settings
    ours = row["us"]["median"]
    found = {"op": f"{settings.get('op', '')} {settings.get('dtype', '')}".strip()}
    found |= {name: str(settings.get(name, "")) for name in ("shape", "rows")}
    found["µs"] = f"{ours:.3g}" if ours < 100 else f"{ours:.0f}"
    speed = row.get("gigabytes_per_second")
    found["GB/s"] = "" if speed is None else f"{speed:.1f}"
    found["of memory"] = "" if row.get("share") is None else f"{row['share']:.0%}"
    for name, value in row.items():
        if name.endswith("_us") and name != "target_us":
            found[f"{name.removesuffix('_us')}/ours"] = f"{value['median'] / ours:.2f}"
    return found
