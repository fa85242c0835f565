"""head: the logits of gpt2-medium."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import NATIVE, random_rows
from linear_cases import (
    CPU_ROWS,
    GPU_ROWS,
    HEAD_SHAPE,
    VOCAB_SIZE,
    Layers,
    assert_near,
    check_native,
    layer_norm,
    linear,
    over_layers,
)
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.packed import PackedLinear


@over_layers("native_layers", [HEAD_SHAPE])
@pytest.mark.parametrize("rows", CPU_ROWS)
def test_native(benchmark: BenchmarkFixture, report: Report, native_layers: Layers, rows: int) -> None:
    layers, norm = native_layers, native_layers.norm
    x = random_rows(rows, layers.plain.in_features)

    def ours(turn: int) -> Tensor:
        return NATIVE.head(x, norm, layers.packed_at(turn), VOCAB_SIZE)

    def pytorch(turn: int) -> Tensor:
        return layers.pytorch_at(turn)(F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps))

    def without_padding(op: Callable[..., Tensor], x: Tensor, weight: PackedLinear) -> Tensor:
        return op(x, norm, weight, VOCAB_SIZE)[:, :VOCAB_SIZE]

    check_native(layers, ours(0)[:, :VOCAB_SIZE], "head", without_padding, x)
    name = "F.layer_norm, " + ("F.linear" if layers.dtype != "int8" else "quantized.linear_dynamic")
    subject = Subject("head", layers.shape, layers.dtype, rows, layers.num_bytes, name)
    report.compare(benchmark, subject, ours, {"torch": pytorch})


@over_layers("gpu_layers", [HEAD_SHAPE])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, rows: int) -> None:
    layers = gpu_layers
    hidden = random_rows(rows, layers.plain.in_features).to(gpu.device)

    def ours(turn: int) -> Tensor:
        return gpu.ops.head(hidden, layers.norm, layers.packed_at(turn), VOCAB_SIZE)

    actual = ours(0)
    exact = reference.head(hidden.double(), layers.norm, layers.plain, VOCAB_SIZE)
    assert_near(actual[:, :VOCAB_SIZE], exact[:, :VOCAB_SIZE], layers.dtype)

    def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor, *layer: Tensor | None) -> Tensor:
        return linear(layer_norm(hidden, weight, bias), *layer).float()

    given = layers.to_model(hidden, layers.norm.weight, layers.norm.bias)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    num_bytes = layers.num_bytes + hidden.nbytes + actual.nbytes
    names = "F.layer_norm, F.linear, float"
    subject = Subject("head", layers.shape, layers.dtype, rows, num_bytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
