"""parallel_linear_residual: the output of a layer of pythia-1.4b, attention and MLP side by side."""

from __future__ import annotations

import pytest
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import DTYPES, GPU_ROWS, Layers, assert_near, build_gpu_layers, linear
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

OUT, CONTRACT = (2048, 2048), (2048, 8192)


@pytest.fixture(scope="module", params=DTYPES)
def pair(request: pytest.FixtureRequest, gpu: Gpu) -> tuple[Layers, Layers]:
    return build_gpu_layers(OUT, request.param, gpu), build_gpu_layers(CONTRACT, request.param, gpu)


@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, pair: tuple[Layers, Layers], rows: int
) -> None:
    out, mlp = pair
    attended = random_rows(rows, OUT[1]).to(gpu.device)
    expanded = random_rows(rows, CONTRACT[1], seed=2).to(gpu.device)
    residual = random_rows(rows, OUT[0], seed=3).to(gpu.device)

    def ours(turn: int) -> Tensor:
        return gpu.ops.parallel_linear_residual(
            attended, out.packed_at(turn), expanded, mlp.packed_at(turn), residual
        )

    exact = reference.parallel_linear_residual(
        attended.double(), out.plain, expanded.double(), mlp.plain, residual.double()
    )
    assert_near(ours(0), exact, out.dtype)

    def pytorch(attended: Tensor, expanded: Tensor, residual: Tensor, *layers: Tensor | None) -> Tensor:
        return residual + linear(attended, *layers[:3]) + linear(expanded, *layers[3:])

    given = out.to_model(attended, expanded, residual)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *out.pytorch_at(turn), *mlp.pytorch_at(turn)))
    num_bytes = out.num_bytes + mlp.num_bytes + attended.nbytes + expanded.nbytes + 2 * residual.nbytes
    shape = f"{out.shape} + {mlp.shape}"
    subject = Subject("parallel_linear_residual", shape, out.dtype, rows, num_bytes, "F.linear, +")
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
