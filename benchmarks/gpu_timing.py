"""Time on a GPU: CUDA graphs of calls, each on its own copy of the inputs, in turns, from a cold second-level cache.

A replay runs up to MAX_CALLS calls; before it the cache is flushed, and within it no copy comes back before twice the
cache's size has been read. So no call finds its inputs in the cache, and the host's time, and what starting a graph
costs, do not count. The bandwidth is that of a big copy on the device, bytes read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

import torch
from timing import Call, Measured

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from specengine.ops.backend import Backend

REPLAYS, WARM_UP_REPLAYS = 31, 3
WARM_UP_CALLS = 3  # of an op before it is captured: they compile it and allocate what it keeps
MIN_CALLS, MAX_CALLS = 8, 64  # in a graph: as many as fit into
REPLAY_SECONDS = 0.01
FLUSH_BYTES = 1 << 30  # takes the device longer than the host needs to queue a graph
COPY_BYTES = 1 << 30
OURS = "ours"


class Device(Protocol):
    """What the timer needs of a GPU."""

    name: str
    device: torch.device
    l2_bytes: int

    def cost(self, call: Call) -> float:
        """Seconds of a call on its own, the host's included, once it is warm."""

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        """The kernels of `calls`, replayed whenever the result is called."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """The device's time for a replay, from a cold cache."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name, self.l2_bytes = properties.name, properties.L2_cache_size
        # Ops that keep memory for a stream allocate it in `cost`, before it would be a graph's own.
        self._stream = torch.cuda.Stream(self.device)
        self._buffer = torch.empty(max(FLUSH_BYTES, 2 * self.l2_bytes), dtype=torch.int8, device=self.device)

    def cost(self, call: Call) -> float:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for turn in range(WARM_UP_CALLS):
                call(turn)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(WARM_UP_CALLS)
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of the two contexts, the outer one gives the stream back even where a capture fails.
            with torch.cuda.stream(self._stream):
                calls()  # whatever is compiled for the arguments of some turn only, is compiled now
                with torch.cuda.graph(graph, stream=self._stream):
                    calls()
        except Exception:
            # A failed capture leaves the generator's state in capture, where nobody else can draw.
            state = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[self.device.index].graphsafe_set_state(state)
            raise
        return graph.replay

    def seconds(self, replay: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.zero_()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class DeviceClock:
    """A clock that only moves by what a device worked: the timer of pytest-benchmark for what runs on a GPU."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gpu:
    """The timer of ops on a GPU. `ops` is the backend that is measured."""

    bandwidth_name = "copy"

    def __init__(self, device: Device, ops: Backend, clock: DeviceClock) -> None:
        self.device = device.device
        self.ops = ops
        self.bandwidths: list[float] = []
        self._gpu = device
        self._clock = clock

    def about(self) -> dict[str, str]:
        return {
            "machine": self._gpu.name,
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
            "flashinfer-python": _version("flashinfer-python"),
        }

    def num_copies(self, num_bytes: int) -> int:
        """Copies of `num_bytes` to rotate over: twice the cache, or one for every call of a graph."""
        return max(2, min(MAX_CALLS, 2 * self._gpu.l2_bytes // num_bytes + 1))

    def bandwidth(self) -> float:
        """GB/s of a copy, read and written; measured once."""
        if not self.bandwidths:
            source, target = torch.zeros(2, COPY_BYTES, dtype=torch.int8, device=self.device)
            replay = self._gpu.capture(lambda: target.copy_(source))
            seconds = [self._gpu.seconds(replay) for _ in range(REPLAYS)]
            self.bandwidths.append(2 * COPY_BYTES / min(seconds) / 1e9)
        return self.bandwidths[0]

    def measure(self, benchmark: BenchmarkFixture, ours: Call, rivals: dict[str, Call]) -> Measured:
        """A rival that cannot be captured, or is not installed, is left out with a note."""
        graphs, notes = {OURS: self._capture(ours)}, []
        for name, call in rivals.items():
            with _noting(name, notes):
                graphs[name] = self._capture(call)
        seconds: dict[str, list[float]] = {name: [] for name in graphs}

        def replay(name: str) -> float:
            graph, num_calls = graphs[name]
            seconds[name].append(self._gpu.seconds(graph) / num_calls)
            return seconds[name][-1]

        def replay_rivals() -> None:
            for name in graphs:
                if name != OURS:
                    replay(name)

        def replay_ours() -> None:
            self._clock.now += replay(OURS)

        benchmark.pedantic(replay_ours, setup=replay_rivals, rounds=REPLAYS, warmup_rounds=WARM_UP_REPLAYS)
        counted = {name: values[WARM_UP_REPLAYS:] for name, values in seconds.items()}
        return Measured(counted.pop(OURS), counted, count_launches(ours), tuple(notes))

    def _capture(self, call: Call) -> tuple[Callable[[], None], int]:
        """A graph, and the number of its calls."""
        num_calls = max(MIN_CALLS, min(MAX_CALLS, int(REPLAY_SECONDS / self._gpu.cost(call))))

        def calls() -> None:
            for turn in range(num_calls):
                call(turn)

        return self._gpu.capture(calls), num_calls


@contextmanager
def _noting(name: str, notes: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        notes.append(f"{name}: {type(error).__name__}: {first_line}")


def count_launches(call: Call) -> int:
    """Kernels of ours that a call launches."""
    from specengine.kernels.device.launch import record

    with record() as launches:
        call(0)
    return len(launches)


def deferred(build: Callable[[], Call]) -> Call:
    """A call that is built in its first turn: what cannot be built is then a rival that is left out."""
    built: list[Call] = []

    def call(turn: int) -> Any:
        if not built:
            built.append(build())
        return built[0](turn)

    return call


def compiled(function: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]]) -> Call:
    """A function as `torch.compile` makes it, on the arguments of each turn."""

    def build() -> Call:
        torch.compiler.reset()  # a function is only compiled a few times in a process, whatever its shapes
        fast = torch.compile(function, dynamic=False)
        return lambda turn: fast(*arguments(turn))

    return deferred(build)


def pytorch_rivals(
    function: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]]
) -> dict[str, Call]:
    """A function as it is, "torch", and "compile"."""
    return {"torch": lambda turn: function(*arguments(turn)), "compile": compiled(function, arguments)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
