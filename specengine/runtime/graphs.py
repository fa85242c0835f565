"""What makes rounds replayable: recorded once, with results that the host reads later."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from specengine.errors import GraphCaptureError

T = TypeVar("T")

# Powers of two, then steps of 16: a round of n sequences runs in the smallest size that holds them.
_SIZES = (1, 2, 4, 8, 16)
# The numbers of drafts that rounds are recorded for: sequences may draft less in a round of more.
DRAFT_COUNTS = (*range(9), 10, 12, 16, 24, 32, 48, 64)


def sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that rounds are recorded for, the largest last."""
    small = [size for size in _SIZES if size < max_batch_size]
    return [*small, *range(32, max_batch_size, 16), max_batch_size]


def bucket(count: int, buckets: list[int] | tuple[int, ...]) -> int:
    """The smallest of ascending buckets that holds `count`."""
    return next(size for size in buckets if size >= count)


def draft_bucket(k: int) -> int:
    """The number of drafts that a round of up to `k` is recorded for."""
    return bucket(k, DRAFT_COUNTS)


@dataclass
class GraphReport:
    """What recording cost: rounds recorded, seconds, and device bytes that they hold."""

    num_graphs: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


class Recorder(Protocol):
    """Records what a function does on the device, so that it can be done again without the function."""

    report: GraphReport

    def record(self, name: str, run: Callable[[], T]) -> Callable[[], T]:
        """A function that repeats what `run` does and returns what it returned: the same tensors every time.

        `run` is called now, any number of times: it must leave nothing behind. Raises `GraphCaptureError` with `name`.
        """


# PyTorch allows one capture at a time in a process.
_one_capture = threading.Lock()


class CudaRecorder:
    """Recordings are CUDA graphs. They share one memory pool: only one of an engine's rounds runs at a time.

    A recording that fails changes nothing: the caller's stream, the random generator and memory are as before.
    """

    def __init__(self, device: torch.device) -> None:
        self.report = GraphReport()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, name: str, run: Callable[[], T]) -> Callable[[], T]:
        """See `Recorder`. The first run compiles kernels and gets workspaces, which a capture cannot."""
        began = time.perf_counter()
        callers = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(callers)
        try:
            # `torch.cuda.graph` does not give the caller's stream back where a capture fails.
            with torch.cuda.stream(self._stream):
                run()
                graph, result, num_bytes = self._capture(run)
        except Exception as error:
            # The end of a capture that broke says only that it did.
            first = f"{error.__context__}; then: " if error.__context__ is not None else ""
            raise GraphCaptureError(
                f"the round of {name} cannot be recorded as a CUDA graph: {first}{error}"
            ) from error
        finally:
            callers.wait_stream(self._stream)
        self.report.num_graphs += 1
        self.report.seconds += time.perf_counter() - began
        self.report.num_bytes += num_bytes

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def _capture(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T, int]:
        """The graph of `run`, what `run` returned, and the device bytes that both hold."""
        graph = torch.cuda.CUDAGraph()
        with _one_capture, _spare_random_state(self._stream.device):
            free = _free_bytes()
            try:
                # In the global mode an event that another thread asks for would end the capture.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    result = run()
            except BaseException:
                self._abandon_pool()
                raise
            return graph, result, max(0, free - _free_bytes())

    def _abandon_pool(self) -> None:
        """After a failure PyTorch may still take the pool for a running capture's: ends that, and takes another."""
        index = self._stream.device.index
        with suppress(RuntimeError):  # the capture has ended in good order, or never began
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()


@contextmanager
def _spare_random_state(device: torch.device) -> Iterator[None]:
    """Meanwhile the device's random generator has a copy of its state. A capture marks the state that it finds as
    captured, and where it fails that mark stays: nobody could draw from the generator again."""
    generator = torch.cuda.default_generators[device.index]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(state.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def _free_bytes() -> int:
    """What no tensor, graph or process holds on the current device: PyTorch's cache is given back first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def wait_for(event: torch.cuda.Event | None) -> None:
    """Returns when what came before the event is done. Looks again and again, and lets other threads run in between:
    a blocking wait costs the driver's own time, and is hardly ever needed."""
    while event is not None and not event.query():
        time.sleep(0)


class Pending:
    """Numbers on their way to the host."""

    def __init__(self, values: Tensor, is_there: torch.cuda.Event | None) -> None:
        self._values = values
        self._is_there = is_there

    def read(self) -> list[list[int]]:
        """The rows, once they are there."""
        wait_for(self._is_there)
        rows: list[list[int]] = self._values.tolist()
        return rows


class ResultRing:
    """Host memory, pinned with CUDA, where results of rounds arrive in turn.

    num_entries: results that may be under way at the same time
    """

    def __init__(self, *, num_entries: int, num_values: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._entries = deque(
            (
                torch.empty(num_values, dtype=torch.int32, pin_memory=is_cuda),
                torch.cuda.Event() if is_cuda else None,
            )
            for _ in range(num_entries)
        )

    def push(self, record: Tensor) -> Pending:
        """Sends `[B, n]` int32, dense, to the next entry. Whoever pushed there before has read it."""
        memory, event = self._entries[0]
        self._entries.rotate(-1)
        values = memory.as_strided(record.shape, record.stride())
        values.copy_(record, non_blocking=True)
        if event is not None:
            event.record()
        return Pending(values, event)
