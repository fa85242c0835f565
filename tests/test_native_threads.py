"""The native backend under Python threads, after fork(), and with its switches set wrongly."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from kernel_cases import NATIVE, native_threads, random_layer, random_rows
from law_helpers import CheckpointFactory, EngineFactory
from torch import Tensor

from specengine import _C
from specengine.ops.native import NativeBackend


def compute(dtype: torch.dtype = torch.float32) -> Tensor:
    layer = random_layer(512, 640, dtype)
    return NATIVE.norm_linear(random_rows(9, 512), layer.norm, layer.packed, "gelu_tanh")


def _compute_in_child(queue: multiprocessing.Queue, dtype: torch.dtype) -> None:
    queue.put(compute(dtype).numpy().tobytes())


def test_calls_from_several_threads_give_the_same_bits() -> None:
    expected = compute()
    results: list[bool] = []

    def work() -> None:
        layer = random_layer(512, 640, torch.float32)
        for _ in range(30):
            actual = NATIVE.norm_linear(random_rows(9, 512), layer.norm, layer.packed, "gelu_tanh")
            results.append(torch.equal(actual, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 120
    assert all(results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("instruction_set")
def test_a_forked_child_computes_the_same_bits(dtype: torch.dtype) -> None:
    expected = compute(dtype).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_compute_in_child, args=(queue, dtype)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert answers == [expected, expected]
    assert compute(dtype).numpy().tobytes() == expected


def test_the_number_of_threads_changes_at_any_time() -> None:
    expected = compute()
    for count in (1, 4, 2, 3, 1):
        with native_threads(count):
            assert NATIVE.num_threads == count
            assert torch.equal(compute(), expected)


def num_tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_for_tasks(count: int) -> None:
    """A thread that was joined is listed a moment longer."""
    deadline = time.monotonic() + 10
    while num_tasks() != count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert num_tasks() == count


def test_each_backend_has_threads_of_its_own() -> None:
    expected = compute()
    layer, rows = random_layer(512, 640, torch.float32), random_rows(9, 512)
    backends = [NativeBackend(), NativeBackend(), NativeBackend()]
    for count, backend in enumerate(backends, start=1):
        backend.set_num_threads(count)
    before = num_tasks()
    for _ in range(3):
        for count, backend in enumerate(backends, start=1):
            assert backend.num_threads == count
            assert torch.equal(backend.norm_linear(rows, layer.norm, layer.packed, "gelu_tanh"), expected)
        # One, two and three threads, the caller included each time: 0 + 1 + 2, made once.
        wait_for_tasks(before + 3)
    del backends, backend
    wait_for_tasks(before)


def test_each_engine_has_a_number_of_its_own(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint("gpt2", seed=9)
    engines = [build_engine(path, backend="native", num_threads=count) for count in (1, 2)]

    def counts() -> list[int]:
        return [engine._target.decoder.backend.num_threads for engine in engines]

    expected = [engine.generate([3, 4, 5], max_new_tokens=8).token_ids for engine in engines]
    assert counts() == [1, 2]
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = engines[index].generate([3, 4, 5], max_new_tokens=8).token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [results[0], results[1]] == expected
    assert counts() == [1, 2]


FORK_WHILE_BUSY = """
import os, threading, time
import torch
from specengine import _C

memory = torch.ones(2**22, dtype=torch.int64)
ops, others = _C.Ops(2), _C.Ops(3)
expected = ops.read_all(memory)
is_running = threading.Event()
def work():
    while True:
        ops.read_all(memory)
        is_running.set()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
is_running.wait()
for turn in range(10):
    child = os.fork()
    if child == 0:
        tasks = len(os.listdir("/proc/self/task"))
        is_same = ops.read_all(memory) == others.read_all(memory) == expected
        os._exit(0 if is_same and len(os.listdir("/proc/self/task")) == tasks + 3 else 1)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise SystemExit("the child hangs")
        time.sleep(0.002)
    assert status[1] == 0, status
os._exit(0)
"""

END_WHILE_BUSY = """
import threading
import torch
from specengine import _C

memory = torch.ones(2**21, dtype=torch.int64)
ops = _C.Ops(2)
is_running = threading.Event()
def work():
    while True:
        ops.read_all(memory)
        is_running.set()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
is_running.wait()
"""


def test_a_child_of_a_busy_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK_WHILE_BUSY], timeout=120, check=True)


def test_a_process_ends_while_its_threads_compute() -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", END_WHILE_BUSY], timeout=60, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_switches_refuse_what_they_do_not_know() -> None:
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match=f"num_threads: {count}"):
            NATIVE.set_num_threads(count)
        with pytest.raises(ValueError, match=f"num_threads: {count}"):
            _C.Ops(count)
    with pytest.raises(ValueError, match="instruction set: 'sse9'"):
        _C.set_instruction_set("sse9")
    assert "portable" in _C.instruction_sets()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("portable", "portable"), (None, _C.instruction_sets()[0]), ("sse9", "ValueError")],
)
def test_the_environment_chooses_the_instruction_set(wanted: str | None, expected: str) -> None:
    program = """
import torch
from specengine import _C
from specengine.ops.native import NativeBackend
from specengine.ops import native
try:
    native.NativeBackend()
    print(_C.build_info()["instruction_set"])
except ValueError as error:
    assert "SPECENGINE_INSTRUCTION_SET='sse9'" in str(error)
    print("ValueError")
"""
    environment = {**os.environ, "SPECENGINE_INSTRUCTION_SET": wanted or ""}
    if wanted is None:
        del environment["SPECENGINE_INSTRUCTION_SET"]
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == [expected]


def test_the_binary_has_the_processors_tiles() -> None:
    """Where no test can run them: what multiplies with bf16 and int8 is there, and what loads is."""
    objdump = shutil.which("objdump")
    if objdump is None or platform.machine() != "x86_64":
        pytest.skip("needs objdump on x86-64")
    command = [objdump, "-d", "--no-show-raw-insn", "-w", _C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"\t(ldtilecfg|t(?:ile|dp)\w+)", code))
    assert found >= {
        "tdpbf16ps",
        "tdpbsud",
        "tileloadd",
        "tilestored",
        "tilezero",
        "ldtilecfg",
        "tilerelease",
    }
