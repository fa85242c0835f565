"""Parts that are other commands: the tests, compute-sanitizer, the microbenchmarks, tune_tiles."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT

from gpu_parts.context import Context, FailedError, SkippedError

# Before the part's own end the command is interrupted, so that pytest still says how far it got.
RESERVE_SECONDS, SUMMARY_SECONDS = 45.0, 25.0
# Not `-m pytest`: that would put the repository on the path, where a folder is called `kernels`.
PYTEST = (
    sys.executable,
    "-c",
    "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.console_main())",
    *("-q", "-p", "no:cacheprovider"),
)
NUM_WORKERS = 8
SANITIZER_ERROR = 86
NO_TESTS = 5
COUNTED = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.]+s")


@dataclass(frozen=True)
class Ended:
    """How a command ended. `summary` is the last thing it said."""

    returncode: int
    is_interrupted: bool
    summary: str

    def check(self) -> None:
        """Raises `FailedError` unless it was successful to its end."""
        if self.is_interrupted:
            raise FailedError(f"not done in time: {self.summary}")
        if self.returncode != 0:
            raise FailedError(f"status {self.returncode}: {self.summary}")


def _heed_interrupts() -> None:
    """A shell's background job starts with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(context: Context, command: Sequence[str], *, label: str = "", **variables: str) -> Ended:
    """Runs a command in the repository; its output goes to a file of the part's. Adds a row of kind "suite".

    variables: of the environment, beside what is there
    """
    log = context.path(f"{label}.out")
    seconds = max(1.0, context.remaining() - min(RESERVE_SECONDS, context.settings.limit / 4))
    shown = shlex.join(command).replace(shlex.join(PYTEST), "pytest")
    context.say(f"{shown}  > {log}")
    is_interrupted = False
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            preexec_fn=_heed_interrupts,
            start_new_session=True,  # what is interrupted is the command and all it started, not the part
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_interrupted = True
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(SUMMARY_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ended = Ended(process.returncode, is_interrupted, summary(log))
    context.add(
        {
            "kind": "suite",
            "command": shown,
            "returncode": ended.returncode,
            "is_complete": not ended.is_interrupted,
            "summary": ended.summary,
            "log": str(log),
        }
    )
    return ended


def summary(log: Path) -> str:
    """What pytest counted, and the last line where that is another's."""
    lines = [line.strip("= \n") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line]
    counted = [line for line in said if COUNTED.search(line)]
    found = dict.fromkeys([*counted[-1:], *said[-1:]])
    return "; ".join(found)[:300] or "it said nothing"


def run_tests(context: Context) -> None:
    """`pytest -m gpu`: with a GPU, every test of Triton kernels is one of it. Long versions have their own command.

    Several processes share the GPU: most of the time goes into compiling.
    """
    marks = ("-n", str(NUM_WORKERS), "--dist", "loadgroup", "-m", "gpu and not slow")
    ended = execute(context, [*PYTEST, *marks, *context.arguments["arguments"]])
    if ended.returncode == NO_TESTS:
        raise FailedError("no test was found")
    ended.check()


def run_sanitizer(context: Context) -> None:
    """The same tests under compute-sanitizer, with allocations of their own: in PyTorch's pools nothing is out of
    bounds. It slows kernels down many times: what was not reached in time is no failure, and the row says so."""
    program = find_sanitizer()
    if program is None:
        raise SkippedError("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    command = [
        program,
        *("--tool", context.arguments["tool"], "--error-exitcode", str(SANITIZER_ERROR)),
        *("--target-processes", "all"),
        *PYTEST,
        *("-m", "gpu and not slow"),
        *context.arguments["arguments"],
    ]
    ended = execute(context, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if ended.returncode == SANITIZER_ERROR or not ended.is_interrupted:
        ended.check()


def find_sanitizer() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def run_microbenchmarks(context: Context) -> None:
    """`pytest --benchmark-only --results`; the rows are pytest's."""
    results = context.path(".results.jsonl")
    results.unlink(missing_ok=True)
    command = [*PYTEST, "--benchmark-only", "--results", str(results), *context.arguments["arguments"]]
    ended = execute(context, command)
    rows = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for line in rows:
        context.add({"kind": "micro", **json.loads(line)})
    ended.check()
    if not rows:
        raise FailedError(f"nothing was measured: {ended.summary}")


def run_tuning(context: Context) -> None:
    """`tune_tiles.py` for one width: it writes the table after every layer, so nothing is lost."""
    command = [
        *(sys.executable, "benchmarks/tune_tiles.py"),
        *("--widths", str(context.arguments["width"]), "--dtypes", context.settings.dtype),
    ]
    execute(context, command).check()
