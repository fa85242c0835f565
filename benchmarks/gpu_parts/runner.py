"""Runs a part in a process of its own, so that neither a crash nor a hang nor a CUDA error reaches the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts.context import Settings
from gpu_parts.parts import Part

BENCHMARKS = Path(__file__).resolve().parent.parent
# Whatever a part starts, in whatever session, inherits it: that is how nothing stays behind.
MARKER = "SPECENGINE_GPU_PART"
GRACE_SECONDS = 10.0
STDERR = 2

OK, FAILED, SKIPPED, TIMED_OUT, NEEDS_CUDA = "ok", "failed", "skipped", "timed out", "needs a CUDA device"


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and its rows; also those of a part that was ended before it was done."""

    part: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_failure(self) -> bool:
        return self.status in (FAILED, TIMED_OUT)


def build_order(part: Part, settings: Settings, rows: Path) -> str:
    """What the part's process is told."""
    return json.dumps(
        {
            "part": part.name,
            "entry": part.entry,
            "arguments": part.arguments,
            "settings": asdict(settings),
            "rows": str(rows),
        }
    )


def run(part: Part, settings: Settings) -> Outcome:
    """Runs the part to its end, or to the limit."""
    work = Path(settings.work)
    work.mkdir(parents=True, exist_ok=True)
    rows, log = work / f"{part.name}.rows.jsonl", work / f"{part.name}.log"
    rows.write_text("", encoding="utf-8")
    marker = f"{part.name}-{uuid.uuid4().hex}"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_parts.child", build_order(part, settings, rows)],
            cwd=BENCHMARKS,
            stdin=subprocess.DEVNULL,
            stdout=STDERR,  # its progress; the page has stdout to itself
            stderr=errors,
            env={**os.environ, MARKER: marker},
            start_new_session=True,  # Ctrl-C is for the command, which then ends its part
        )
        try:
            is_late = not _wait(process, settings.limit)
        finally:
            _end(process, marker)
    seconds = time.monotonic() - started
    lines = list(_read(rows))
    ends = [line["outcome"] for line in lines if "outcome" in line]
    found = [line for line in lines if "outcome" not in line]
    if is_late:
        status, reason = TIMED_OUT, f"ended after {settings.limit:.0f} s"
    elif ends:
        status, reason = ends[-1]["status"], ends[-1]["reason"]
    else:
        status, reason = (
            FAILED,
            f"its process ended with {_status_name(process.returncode)}: {_last_line(log)}",
        )
    return Outcome(part.name, status, seconds, reason, found)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes], marker: str) -> None:
    """Ends the process and whatever it started."""
    if process.poll() is None:
        process.terminate()
        _wait(process, GRACE_SECONDS)
    while found := list(_marked(marker)):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        process.poll()


def _marked(marker: str) -> Iterator[int]:
    """Processes that run with this marker; those that only wait to be noticed have no environment any more."""
    wanted = f"{MARKER}={marker}".encode()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with suppress(OSError):
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    yield int(directory.name)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # a line that was being written when its process ended
            yield json.loads(line)


def _status_name(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"


def _last_line(log: Path) -> str:
    """The last thing that was said."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")
