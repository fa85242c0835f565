"""head_stats: the logits of gpt2-medium and their rows' statistics."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import (
    GPU_ROWS,
    HEAD_SHAPE,
    VOCAB_SIZE,
    Layers,
    assert_near,
    layer_norm,
    linear,
    over_layers,
)
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import Draws

from specengine.kernels import reference


@over_layers("gpu_layers", [HEAD_SHAPE])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, rows: int) -> None:
    layers = gpu_layers
    hidden = random_rows(rows, layers.plain.in_features).to(gpu.device)
    law = Draws.build(rows, 1.0, gpu.device).rows

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        return gpu.ops.head_stats(hidden, layers.norm, layers.packed_at(turn), VOCAB_SIZE, law)

    logits, stats = ours(0)
    exact = reference.head(hidden.double(), layers.norm, layers.plain, VOCAB_SIZE)
    assert_near(logits[:, :VOCAB_SIZE], exact[:, :VOCAB_SIZE], layers.dtype)
    torch.testing.assert_close(stats, reference.filter_rows(logits, law), rtol=1e-6, atol=0.0)

    def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor, *layer: Tensor | None) -> tuple[Tensor, ...]:
        logits = linear(layer_norm(hidden, weight, bias), *layer).float()
        return logits, logits.amax(dim=-1), logits.logsumexp(dim=-1)

    given = layers.to_model(hidden, layers.norm.weight, layers.norm.bias)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    num_bytes = layers.num_bytes + hidden.nbytes + logits.nbytes + stats.nbytes
    names = "F.layer_norm, F.linear, float, amax, logsumexp"
    subject = Subject("head_stats", layers.shape, layers.dtype, rows, num_bytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
