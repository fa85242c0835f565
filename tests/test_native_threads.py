"""The native backend under Python threads, after fork(), and with its switches set wrongly."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cases import NATIVE, random_layer, random_rows
from torch import Tensor

from specengine import _C


def compute() -> Tensor:
    layer = random_layer(512, 640, torch.float32)
    return NATIVE.norm_linear(random_rows(9, 512), layer.norm, layer.packed, "gelu_tanh")


def _compute_in_child(queue: multiprocessing.Queue) -> None:
    queue.put(compute().numpy().tobytes())


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
def test_a_forked_child_computes_the_same_bits() -> None:
    expected = compute().numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_compute_in_child, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert answers == [expected, expected]
    assert compute().numpy().tobytes() == expected


def test_the_number_of_threads_changes_at_any_time() -> None:
    expected, before = compute(), _C.num_threads()
    for count in (1, 4, 2, 3, 1, before):
        _C.set_num_threads(count)
        assert _C.num_threads() == count
        assert torch.equal(compute(), expected)


def test_switches_refuse_what_they_do_not_know() -> None:
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_threads: {count}"):
            _C.set_num_threads(count)
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
