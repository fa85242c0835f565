"""A peer of the benchmarks is tried before it counts: whatever it does, its row has a reason and the others go on."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from generation import contest, process, trial
from generation.protocol import Setup, Task, UnavailableError

# A peer that does what its target is called, when it is asked for several tokens.
FAKE = """
import os, signal, sys, time
from generation.protocol import Answer

DISTRIBUTIONS = ()

def prepare(setup):
    pass

class Fake:
    settings = "fake"

    def __init__(self, setup):
        self.setup = setup

    def generate(self, task):
        does = self.setup.target if task.max_new_tokens > 1 else "works"
        if does == "dies":
            print("tile load", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGILL)
        if does == "raises":
            raise RuntimeError("no such kernel")
        if does == "hangs":
            time.sleep(1000)
        return Answer([[0] * task.max_new_tokens] * len(task.prompts), [0.1] * len(task.prompts), 0.0, 0)

def load(setup):
    if setup.target == "cannot load":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Fake(setup)
"""
TASKS = [Task([[1, 2]], 1), Task([[1, 2]], 4)]


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_peer.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def setup(does: str, contestant: str = "fake") -> Setup:
    return Setup(contestant, does, "", "float32", "float32", False, 1, 16, "", module="fake_peer")


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("dies", "its process was ended by SIGILL: tile load"),
        ("raises", "no such kernel"),
        ("hangs", "no answer in 2 s"),
        ("cannot load", "its process was ended by SIGSEGV"),
    ],
)
def test_who_fails_the_trial_has_a_reason_and_the_others_go_on(
    does: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 2.0)
    lines: list[str] = []
    started = time.monotonic()
    with ExitStack() as stack:
        setups = [setup(does, "first"), setup("works", "second")]
        workers, reasons = contest.start(setups, stack, lines.append, tasks=TASKS)
        assert reasons == {"first": reason}
        assert lines == [f"  first: {reason}"]
        assert list(workers) == ["second"]
        assert workers["second"].timeout == process.TIMEOUT_SECONDS, "the trial's limit ends with it"
        assert workers["second"].generate(TASKS[1]).token_ids == [[0] * 4]
    assert time.monotonic() - started < 60


def test_who_failed_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[process.Worker] = []
    really_close = process.Worker.close
    monkeypatch.setattr(process.Worker, "close", lambda self: (workers.append(self), really_close(self)))
    with pytest.raises(UnavailableError, match="no such kernel"):
        trial.load(setup("raises"), TASKS)
    [worker] = workers
    assert not Path(f"/proc/{worker._process.pid}").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (-4, "was ended by SIGILL"),
        (-99, "was ended by signal 99"),
    ],
)
def test_an_ending_has_the_name_of_its_signal(status: int, words: str) -> None:
    assert process.ending(status) == words
