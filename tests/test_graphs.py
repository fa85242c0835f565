"""Recording rounds as CUDA graphs: what a capture leaves behind, also one that fails; and how the host waits.

Without a GPU against an imitation of `torch.cuda`; with one (`-m gpu`) against the device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import pytest
import torch
from fake_cuda import FakeCuda

from specengine.errors import GraphCaptureError
from specengine.runtime.graphs import CudaRecorder, Pending
from specengine.runtime.kv_cache import _DeviceTable

CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def break_in_capture(cuda: FakeCuda) -> Callable[[], None]:
    """A round that waits for the device, which only a capture forbids."""
    return cuda.check_not_capturing


def fail_in_capture(cuda: FakeCuda) -> Callable[[], None]:
    """A round whose Python fails in the capture: the capture itself ends in good order."""
    runs: list[int] = []

    def run() -> None:
        runs.append(0)
        if len(runs) == 2:
            raise ValueError("planted")

    return run


def assert_as_new(cuda: FakeCuda) -> None:
    assert cuda.stream is cuda.default_stream
    assert not cuda.pools_in_capture
    assert not cuda.is_capturing
    cuda.generator.draw()


def test_a_recording_is_replayed_and_leaves_everything_as_it_was(cuda: FakeCuda) -> None:
    recorder = CudaRecorder(CUDA)
    runs: list[bool] = []
    state = cuda.generator.state
    replay = recorder.record("one", lambda: runs.append(cuda.is_capturing) or "result")
    assert runs == [False, True]
    assert [replay(), replay()] == ["result", "result"]
    assert runs == [False, True]
    assert recorder.report.num_graphs == 1
    assert cuda.generator.state is state
    assert_as_new(cuda)


def test_another_threads_events_do_not_end_a_capture(cuda: FakeCuda) -> None:
    CudaRecorder(CUDA).record("one", lambda: None)
    assert cuda.modes == ["thread_local"]


@pytest.mark.parametrize("build_round", [break_in_capture, fail_in_capture])
def test_a_capture_that_fails_leaves_everything_as_it_was(
    cuda: FakeCuda, build_round: Callable[[FakeCuda], Callable[[], None]]
) -> None:
    recorder = CudaRecorder(CUDA)
    recorder.record("before", lambda: None)
    users = sum(cuda.pool_users.values())
    with pytest.raises(GraphCaptureError, match=r"the round of two cannot.*(planted|not permitted when)"):
        recorder.record("two", build_round(cuda))
    assert_as_new(cuda)
    assert cuda.default_stream.waited_for[-1] is recorder._stream
    # A graph that was captured to its end gives its pool back when it dies; the broken one's is given back for it.
    assert sum(cuda.pool_users.values()) == users + (build_round is fail_in_capture)
    assert recorder.record("after", lambda: "again")() == "again"
    assert recorder.report.num_graphs == 2


def test_an_interrupted_capture_leaves_everything_as_it_was(cuda: FakeCuda) -> None:
    def run() -> None:
        if cuda.is_capturing:
            raise KeyboardInterrupt

    recorder = CudaRecorder(CUDA)
    with pytest.raises(KeyboardInterrupt):
        recorder.record("one", run)
    assert_as_new(cuda)
    recorder.record("one", lambda: None)


def test_the_report_has_the_bytes_that_recordings_hold(cuda: FakeCuda) -> None:
    """Not what was cached before them, nor what their first runs leave in the cache."""

    def run() -> None:
        if cuda.is_capturing:
            cuda.allocate(1000)
        else:
            cuda.cache(70_000)

    recorder = CudaRecorder(CUDA)
    for _ in range(3):
        cuda.cache(50_000)
        recorder.record("one", run)
    assert recorder.report.num_bytes == 3000


def test_engines_of_two_threads_record_in_turn(cuda: FakeCuda) -> None:
    """PyTorch allows one capture at a time; `FakeGraph.capture_begin` does too."""
    at_once, failures = threading.Barrier(2), []

    def record() -> None:
        recorder = CudaRecorder(CUDA)
        at_once.wait()
        try:
            recorder.record("one", lambda: time.sleep(0.02))
        except GraphCaptureError as error:
            failures.append(error)

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(cuda.modes) == 2


class Event:
    """Is there at the third look. A blocking wait would go on for ever."""

    def __init__(self) -> None:
        self.num_looks = 0

    def query(self) -> bool:
        self.num_looks += 1
        return self.num_looks > 2

    def record(self) -> None:
        self.num_looks = 0

    def synchronize(self) -> None:
        raise AssertionError("the host waited by a blocking call")


def test_results_are_looked_for_until_they_are_there() -> None:
    event = Event()
    assert Pending(torch.tensor([[1, 2]]), event).read() == [[1, 2]]
    assert event.num_looks == 3


def test_a_changed_block_table_is_sent_without_a_blocking_wait() -> None:
    table = torch.zeros(2, 3, dtype=torch.int32)
    uploads = _DeviceTable(table, torch.device("cpu"))
    uploads._on_device = table.clone()
    events = [Event(), Event()]
    uploads._snapshots = deque((table.clone(), event) for event in events)
    for turn in range(1, 5):
        table[1, turn % 3] = turn
        assert torch.equal(uploads.current(), table)
        assert events[(turn - 1) % 2].num_looks == 0, "sent with the copy that is free the longest"
        assert uploads.current() is uploads.current(), "the same memory, nothing sent again"
    assert not torch.equal(uploads._snapshots[0][0], table), "what is under way is not written over"


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu() -> None:
    recorder = CudaRecorder(CUDA)
    x = torch.ones(8, device="cuda")
    caller = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(GraphCaptureError, match="the round of one cannot be recorded"):
            recorder.record("one", lambda: (x + 1).sum().item())
        assert torch.cuda.current_stream() == caller
        torch.rand(4, device="cuda")
        torch.cuda.manual_seed(1)
    replay = recorder.record("two", lambda: x + 1)
    x.fill_(4)
    assert replay().tolist() == [5.0] * 8
    big = recorder.record("three", lambda: x.repeat(1 << 23))
    assert big().numel() == 8 << 23
    assert recorder.report.num_bytes >= 4 * 8 << 23


@pytest.mark.gpu
def test_another_thread_looks_at_its_events_during_captures() -> None:
    is_over, failures = threading.Event(), []

    def look() -> None:
        event = torch.cuda.Event()
        try:
            while not is_over.is_set():
                event.record()
                event.query()
        except RuntimeError as error:
            failures.append(error)

    recorder = CudaRecorder(CUDA)
    x = torch.ones(1 << 20, device="cuda")
    looking = threading.Thread(target=look)
    looking.start()
    try:
        for turn in range(50):
            replay = recorder.record(f"{turn}", lambda: sum(x * i for i in range(20)))
            assert float(replay()[0]) == 190.0
    finally:
        is_over.set()
        looking.join()
    assert failures == []
