"""What makes rounds replayable: recorded once, with results that the host reads later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from specengine.errors import GraphCaptureError

T = TypeVar("T")

# Powers of two, then steps of 16: a round of n sequences runs in the smallest size that holds them.
_SIZES = (1, 2, 4, 8, 16)
# The numbers of drafts that rounds are recorded for: sequences may draft less in a round of more.
_DRAFT_COUNTS = (*range(9), 10, 12, 16, 24, 32, 48, 64)


def sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that rounds are recorded for, the largest last."""
    small = [size for size in _SIZES if size < max_batch_size]
    return [*small, *range(32, max_batch_size, 16), max_batch_size]


def bucket(count: int, buckets: list[int] | tuple[int, ...]) -> int:
    """The smallest of ascending buckets that holds `count`."""
    return next(size for size in buckets if size >= count)


def draft_bucket(k: int) -> int:
    """The number of drafts that a round of up to `k` is recorded for."""
    return bucket(k, _DRAFT_COUNTS)


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


class CudaRecorder:
    """Recordings are CUDA graphs. They share one memory pool: only one of an engine's rounds runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.report = GraphReport()
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, name: str, run: Callable[[], T]) -> Callable[[], T]:
        """See `Recorder`. The first run compiles kernels and gets workspaces, which a capture cannot."""
        began, free = time.perf_counter(), torch.cuda.mem_get_info(self._device)[0]
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                run()
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = run()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        except Exception as error:
            raise GraphCaptureError(
                f"the round of {name} cannot be recorded as a CUDA graph: {error}"
            ) from error
        self.report.num_graphs += 1
        self.report.seconds += time.perf_counter() - began
        self.report.num_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])

        def replay() -> T:
            graph.replay()
            return result

        return replay


class Pending:
    """Numbers on their way to the host."""

    def __init__(self, values: Tensor, is_there: torch.cuda.Event | None) -> None:
        self._values = values
        self._is_there = is_there

    def read(self) -> list[list[int]]:
        """The rows, once they are there. Looks again and again: a blocking wait costs the driver's own time."""
        while self._is_there is not None and not self._is_there.query():
            time.sleep(0)
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
        """Sends `[B, n]` int32 to the next entry. Whoever pushed there before has read it."""
        memory, event = self._entries[0]
        self._entries.rotate(-1)
        values = memory[: record.numel()].view(record.shape)
        values.copy_(record, non_blocking=True)
        if event is not None:
            event.record()
        return Pending(values, event)
