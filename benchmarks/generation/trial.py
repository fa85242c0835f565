"""A contestant counts when it has shown that it runs: loaded, a few tokens after a prompt and one after a long one, all
in the process, with the threads and in the format that will be timed."""

from __future__ import annotations

from collections.abc import Sequence

from generation.process import TIMEOUT_SECONDS, Worker
from generation.protocol import Setup, Task

# Of loading, and of each answer; the largest model's longest prompt takes the slowest a tenth of it.
TRIAL_SECONDS = 300.0
NUM_TOKENS = 8


def tasks(short: list[int], long: list[int]) -> list[Task]:
    """The path of one row and that of many."""
    return [Task([short], NUM_TOKENS), Task([long], 1)]


def load(setup: Setup, tasks: Sequence[Task] = (), *, timeout: float = TIMEOUT_SECONDS) -> Worker:
    """A worker that has answered the tasks.

    timeout: seconds that its answers may take once it has

    Raises `UnavailableError` where it could not: it is no more then, whatever it did.
    """
    worker = Worker(setup, timeout=min(timeout, TRIAL_SECONDS))
    try:
        for task in tasks:
            worker.generate(task)
    except BaseException:
        worker.close()
        raise
    worker.timeout = timeout
    return worker
