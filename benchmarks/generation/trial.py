"""A contestant counts when it has shown that it runs: loaded, a few tokens after a prompt and one after a long one, all
in the process, with the threads and in the format that will be timed. One that is built here has several builds to
try, and shows too that it speculates, if it will be asked to: its draft may be in another format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from generation import llama_builds
from generation.process import TIMEOUT_SECONDS, Worker
from generation.protocol import Setup, Task, UnavailableError

# Of loading, and of each answer; the largest model's longest prompt takes the slowest a tenth of it.
TRIAL_SECONDS = 300.0
NUM_TOKENS = 8
DRAFT_LENGTH = 4


def tasks(short: list[int], long: list[int]) -> list[Task]:
    """The path of one row and that of many."""
    return [Task([short], NUM_TOKENS), Task([long], 1)]


def load(
    setup: Setup, tasks: Sequence[Task], say: Callable[[str], None], *, timeout: float = TIMEOUT_SECONDS
) -> Worker:
    """A worker that has answered the tasks, of llama.cpp with the first build that could.

    Raises `UnavailableError` with what became of each.
    """
    if setup.contestant != "llama.cpp":
        return try_out(setup, tasks, timeout=timeout)
    if setup.speculates:
        tasks = [*tasks, Task(tasks[0].prompts, NUM_TOKENS, DRAFT_LENGTH)]
    failures: list[str] = []
    for build in llama_builds.ladder():
        built = replace(setup, build=build.name)
        try:
            path = llama_builds.find_or_make(build, say)
            worker = try_out(replace(built, path=str(path)), tasks, timeout=timeout)
        except UnavailableError as error:
            failures.append(f"{build.name} build: {error}")
            say(f"  {setup.contestant}, {failures[-1]}")
        else:
            worker.about["settings"] += "".join(f"; {failure}" for failure in failures)
            return worker
    raise UnavailableError("; ".join(failures))


def try_out(setup: Setup, tasks: Sequence[Task], *, timeout: float) -> Worker:
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
