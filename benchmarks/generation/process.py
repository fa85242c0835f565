"""The benchmark's side of a worker process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from generation.protocol import Answer, Setup, Task, UnavailableError

BENCHMARKS = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1800.0  # an export of the largest model takes minutes; nothing takes this long
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Worker:
    """A process that holds one contestant. Close it: it then ends at once, whatever it is doing.

    timeout: seconds that an answer may take; a contestant that takes longer is ended

    Raises `UnavailableError` with the reason where the contestant cannot do what it is asked.
    """

    def __init__(self, setup: Setup, action: str = "load", *, timeout: float = TIMEOUT_SECONDS) -> None:
        self.setup = setup
        self.timeout = timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "generation.worker", action, json.dumps(asdict(setup))],
            cwd=BENCHMARKS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then closes its workers
        )
        try:
            self.about: dict[str, Any] = self._receive()["ready"]
        except BaseException:
            self.close()
            raise

    def generate(self, task: Task) -> Answer:
        assert self._process.stdin is not None, "stdin is a pipe"
        try:
            self._process.stdin.write(json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UnavailableError(self._last_words()) from None
        return Answer.from_json(self._receive()["answer"])

    def cpu_seconds(self) -> float:
        """Processor time that the process has used so far; 0 when it is no more."""
        try:
            status = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except FileNotFoundError:
            return 0.0
        user, system = status.rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / CLOCK_TICKS

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None, "all three are there"
            try:
                pipe.close()
            except BrokenPipeError:  # what was not sent yet cannot be
                continue

    def _receive(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None, "stdout is a pipe"
        if not select.select([stdout], [], [], self.timeout)[0]:
            self._process.kill()  # what it still had to say would be taken for the next answer
            raise UnavailableError(f"no answer in {self.timeout:.0f} s")
        line = stdout.readline()
        if not line:
            raise UnavailableError(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise UnavailableError(message["error"])
        return message

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process {ending(status)}{last and ': '}{last}"[:200]


def ending(status: int) -> str:
    """How a process ended, by what it returned."""
    if status >= 0:
        return f"ended with status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-status, f'signal {-status}')}"


def prepare(setup: Setup) -> None:
    """Let a contestant write the files it loads, in a process that leaves its memory with it."""
    Worker(setup, action="prepare").close()
