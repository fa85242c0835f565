"""linear_residual: the linear layers of gpt2-medium that end in the residual stream; on the CPU its other ones too."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import NATIVE, random_rows
from linear_cases import CPU_ROWS, GPU_ROWS, Layers, assert_near, check_native, linear, over_layers
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

# [out_features, in_features]: the two of the MLP, query-key-value, the attention's output
EXPAND, CONTRACT, QKV, OUT = (4096, 1024), (1024, 4096), (3072, 1024), (1024, 1024)


@over_layers("native_layers", [EXPAND, CONTRACT, QKV])
@pytest.mark.parametrize("rows", CPU_ROWS)
def test_native(benchmark: BenchmarkFixture, report: Report, native_layers: Layers, rows: int) -> None:
    layers = native_layers
    x = random_rows(rows, layers.plain.in_features)
    residual = torch.zeros(rows, layers.plain.out_features)

    def ours(turn: int) -> Tensor:
        return NATIVE.linear_residual(x, layers.packed_at(turn), residual)

    check_native(layers, ours(0), "linear_residual", lambda op, x, weight: op(x, weight, residual), x)
    name = "F.linear" if layers.dtype != "int8" else "quantized.linear_dynamic"
    subject = Subject(
        "linear_residual",
        layers.shape,
        layers.dtype,
        rows,
        layers.num_bytes,
        f"{name} (without the residual)",
    )
    report.compare(benchmark, subject, ours, {"torch": lambda turn: layers.pytorch_at(turn)(x)})


@over_layers("gpu_layers", [CONTRACT, OUT])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, rows: int) -> None:
    layers = gpu_layers
    x = random_rows(rows, layers.plain.in_features).to(gpu.device)
    residual = random_rows(rows, layers.plain.out_features, seed=2).to(gpu.device)

    def ours(turn: int) -> Tensor:
        return gpu.ops.linear_residual(x, layers.packed_at(turn), residual)

    exact = reference.linear_residual(x.double(), layers.plain, residual.double())
    assert_near(ours(0), exact, layers.dtype)

    def pytorch(x: Tensor, residual: Tensor, *layer: Tensor | None) -> Tensor:
        return residual + linear(x, *layer)

    given = layers.to_model(x, residual)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    num_bytes = layers.num_bytes + x.nbytes + 2 * residual.nbytes
    subject = Subject("linear_residual", layers.shape, layers.dtype, rows, num_bytes, "F.linear, +")
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
