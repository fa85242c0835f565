"""What recording a CUDA graph needs of `torch.cuda`, imitated: streams, captures, pools, memory, the random generator.

`torch.cuda.graph` itself is PyTorch's own. What a broken capture leaves behind is as in PyTorch 2.11 and 2.13 (their
CUDAGraph.cpp, CUDAGeneratorImpl.cpp and CUDACachingAllocator.cpp): `capture_end` raises before it ends the pool's
allocations and before it unmarks the generator, and `torch.cuda.graph` then does not give the stream back.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeGenerator:
    """A generator is a pointer to a state, and a state is marked while a capture that began with it goes on."""

    def __init__(self, state: SimpleNamespace | None = None) -> None:
        self.state = state or SimpleNamespace(is_captured=False)

    def graphsafe_get_state(self) -> FakeGenerator:
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.state = other.state

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator(SimpleNamespace(**vars(self.state)))

    def draw(self) -> None:
        if self.state.is_captured:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cuda", 0)
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


class OnStream:
    """As `torch.cuda.StreamContext`."""

    def __init__(self, cuda: FakeCuda, stream: FakeStream) -> None:
        self.cuda, self.stream = cuda, stream

    def __enter__(self) -> None:
        self.before, self.cuda.stream = self.cuda.stream, self.stream

    def __exit__(self, *_: object) -> None:
        self.cuda.stream = self.before


class FakeCuda:
    """One device. `allocate` gives memory that nobody frees, `cache` what `empty_cache` gives back."""

    def __init__(self) -> None:
        self.free = 1 << 30
        self.cached = 0
        self.default_stream = FakeStream()
        self._current = threading.local()
        self.generator = FakeGenerator()
        self.pool_users: dict[tuple[int, int], int] = {}
        self.pools_in_capture: list[tuple[int, int]] = []
        self.modes: list[str] = []
        self.is_capturing = self.is_broken = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fakes = {
            "graph_pool_handle": self.new_pool,
            "Stream": FakeStream,
            "stream": lambda stream: OnStream(self, stream),
            "current_stream": lambda device=None: self.stream,
            "CUDAGraph": lambda: FakeGraph(self),
            "synchronize": self.check_not_capturing,
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device=None: (self.free, 1 << 30),
            "default_generators": (self.generator,),
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        internals = {
            "_cuda_endAllocateToPool": self.end_allocate,
            "_cuda_releasePool": self.release_pool,
            "_host_emptyCache": lambda: None,
        }
        for name, fake in internals.items():
            patch.setattr(torch._C, name, fake, raising=False)

    def new_pool(self) -> tuple[int, int]:
        pool = (0, len(self.pool_users) + 1)
        self.pool_users[pool] = 0
        return pool

    @property
    def stream(self) -> FakeStream:
        """The thread's current one."""
        return getattr(self._current, "stream", self.default_stream)

    @stream.setter
    def stream(self, stream: FakeStream) -> None:
        self._current.stream = stream

    def allocate(self, count: int) -> None:
        self.free -= count

    def cache(self, count: int) -> None:
        self.free, self.cached = self.free - count, self.cached + count

    def empty_cache(self) -> None:
        self.free, self.cached = self.free + self.cached, 0

    def check_not_capturing(self) -> None:
        """What no capture may do breaks it, and raises."""
        if self.is_capturing:
            self.is_broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools_in_capture:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools_in_capture.remove(pool)

    def release_pool(self, device: int, pool: tuple[int, int]) -> None:
        assert self.pool_users[pool] > 0
        self.pool_users[pool] -= 1


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.num_replays = 0

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str, **_: Any) -> None:
        cuda = self.cuda
        assert not cuda.is_capturing, "one capture at a time"
        assert pool not in cuda.pools_in_capture, "already recording to this pool"
        assert cuda.stream is not cuda.default_stream
        self.pool, self.state = pool, cuda.generator.state
        self.state.is_captured = cuda.is_capturing = True
        cuda.is_broken = False
        cuda.modes.append(capture_error_mode)
        cuda.pools_in_capture.append(pool)
        cuda.pool_users[pool] += 1

    def capture_end(self) -> None:
        self.cuda.is_capturing = False
        if self.cuda.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.end_allocate(0, self.pool)
        self.state.is_captured = False

    def replay(self) -> None:
        self.num_replays += 1
