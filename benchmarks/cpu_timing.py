"""Time on the CPU: calls in turns, memory in no cache, threads awake.

The bandwidth is that of `specengine._C.Ops.read_all` on as many threads, measured beside each op: on shared machines it
moves within minutes.
"""

from __future__ import annotations

import itertools
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timing import Call, Measured

from specengine import _C
from specengine.ops.threads import default_num_threads

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROTATED_BYTES = 256 << 20
BANDWIDTH_BYTES = 1 << 30
BANDWIDTH_PASSES = 3
OUR_SECONDS, RIVAL_SECONDS = 0.3, 0.4  # a benchmark's budgets; a round is one call
OUR_ROUNDS, RIVAL_ROUNDS = (5, 41), (3, 15)  # at least, at most
LONG_SECONDS = 0.01  # a call that needs no other before it to wake the threads
# OpenMP's threads spin for milliseconds after PyTorch's op and would take a core from ours.
PAUSE_SECONDS = 0.008


def num_copies(num_bytes: int) -> int:
    """Copies of `num_bytes` to rotate over."""
    return max(2, -(-ROTATED_BYTES // num_bytes))


class Cpu:
    """The timer of the native ops."""

    bandwidth_name = "read"

    def __init__(self, num_threads: int | None = None) -> None:
        num_threads = num_threads or default_num_threads()
        torch.set_num_threads(num_threads)
        self._ops = _C.Ops(num_threads)
        self.bandwidths: list[float] = []
        self._buffer: torch.Tensor | None = None

    def about(self) -> dict[str, str]:
        return {"machine": machine_name()}

    def bandwidth(self) -> float:
        """GB/s of reading memory that is in no cache, the best of some passes, now."""
        if self._buffer is None:
            self._buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
            self._ops.read_all(self._buffer)
        buffer = self._buffer
        seconds = min(timed(lambda _: self._ops.read_all(buffer), 0) for _ in range(BANDWIDTH_PASSES))
        self.bandwidths.append(BANDWIDTH_BYTES / seconds / 1e9)
        return self.bandwidths[-1]

    def measure(self, benchmark: BenchmarkFixture, ours: Call, rivals: dict[str, Call]) -> Measured:
        """Before each timed call an untimed one of the same op, as in a decode step, where ops follow each other: the
        threads are awake, the code is in cache, the data is not."""
        turns = itertools.count()
        for call in (ours, *rivals.values()):
            call(next(turns))
        cost = timed(ours, next(turns))
        costs = {name: timed(call, next(turns)) for name, call in rivals.items()}
        rounds = num_rounds(cost, OUR_SECONDS, OUR_ROUNDS)
        every = {name: -(-rounds // num_rounds(costs[name], RIVAL_SECONDS, RIVAL_ROUNDS)) for name in rivals}
        seconds: dict[str, list[float]] = {name: [] for name in rivals}
        done = itertools.count()

        def prepare() -> tuple[tuple[int], dict[str, Any]]:
            index = next(done)
            for name, call in rivals.items():
                if index % every[name] == 0:
                    wake(call, costs[name])
                    seconds[name].append(timed(call, next(turns)))
                    time.sleep(PAUSE_SECONDS)
            wake(ours, cost)
            return (next(turns),), {}

        def wake(call: Call, seconds: float) -> None:
            if seconds < LONG_SECONDS:
                call(next(turns))

        benchmark.pedantic(ours, setup=prepare, rounds=rounds)
        return Measured(list(benchmark.stats.stats.data), seconds)


def about_processor() -> dict[str, str]:
    """What every row of every benchmark names: the processor, and which of its instruction sets our ops use."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": (names or [platform.machine()])[0],
        "instruction_set": str(_C.build_info()["instruction_set"]),
    }


def machine_name(num_threads: int | None = None) -> str:
    """Processor, instruction set and threads, by default those of an engine that is given no number."""
    about = about_processor()
    return f"{about['processor']}, {about['instruction_set']}, {num_threads or default_num_threads()} threads"


def timed(call: Call, turn: int) -> float:
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def num_rounds(seconds: float, budget: float, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], int(budget / seconds)))
