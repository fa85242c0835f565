"""Fixtures `report`, which collects what the benchmarks measured, prints it at the end and appends it to `--results`,
and `gpu`, the timer of a CUDA device."""

from __future__ import annotations

from pathlib import Path

import gpu_timing
import pytest
import torch
from linear_cases import Layers, build_gpu_layers, build_native_layers
from measure import Report
from verify_cases import Logits, build_logits

from specengine.ops.load import load_backend

REPORT = pytest.StashKey[Report]()
CLOCK = gpu_timing.DeviceClock()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    pytestconfig.stash[REPORT] = Report()
    return pytestconfig.stash[REPORT]


@pytest.fixture(scope="session")
def gpu() -> gpu_timing.Gpu:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = gpu_timing.Cuda()
    return gpu_timing.Gpu(device, load_backend("triton", device.device), CLOCK)


@pytest.fixture(scope="module")
def native_layers(request: pytest.FixtureRequest) -> Layers:
    return build_native_layers(*request.param)


@pytest.fixture(scope="module")
def gpu_layers(request: pytest.FixtureRequest, gpu: gpu_timing.Gpu) -> Layers:
    return build_gpu_layers(*request.param, gpu)


@pytest.fixture(scope="module")
def logits() -> Logits:
    return build_logits(torch.device("cpu"))


@pytest.fixture(scope="module")
def gpu_logits(gpu: gpu_timing.Gpu) -> Logits:
    return build_logits(gpu.device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash.get(REPORT, None)
    if report is None or not report.rows:
        return
    terminalreporter.section("measured")
    for line in report.lines():
        terminalreporter.write_line(line)
    path = config.getoption("--results")
    if path is not None:
        report.append_to(Path(path))
        terminalreporter.write_line(f"{len(report.rows)} rows appended to {path}")
