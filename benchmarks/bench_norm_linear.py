"""norm_linear: the first half of gpt2-medium's MLP."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import GPU_ROWS, Layers, assert_near, layer_norm, linear, over_layers
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

ACTIVATION = "gelu_tanh"


@over_layers("gpu_layers", [(4096, 1024)])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, rows: int) -> None:
    layers = gpu_layers
    hidden = random_rows(rows, layers.plain.in_features).to(gpu.device)

    def ours(turn: int) -> Tensor:
        return gpu.ops.norm_linear(hidden, layers.norm, layers.packed_at(turn), ACTIVATION)

    actual = ours(0)
    exact = reference.norm_linear(hidden.double(), layers.norm, layers.plain, ACTIVATION)
    assert_near(actual, exact, layers.dtype)

    def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor, *layer: Tensor | None) -> Tensor:
        return F.gelu(linear(layer_norm(hidden, weight, bias), *layer), approximate="tanh")

    given = layers.to_model(hidden, layers.norm.weight, layers.norm.bias)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    num_bytes = layers.num_bytes + hidden.nbytes + actual.nbytes
    names = "F.layer_norm, F.linear, F.gelu"
    subject = Subject("norm_linear", layers.shape, layers.dtype, rows, num_bytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
