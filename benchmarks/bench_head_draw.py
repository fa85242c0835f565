"""head_draw: gpt2-medium's next tokens without their logits."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import GPU_ROWS, HEAD_SHAPE, VOCAB_SIZE, Layers, layer_norm, linear, over_layers
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import Draws, assert_wins, exponential_race

from specengine.kernels import reference

MODES = {"greedy": 0.0, "sampled": 1.0}
# Of the largest logits, which rounded weights and activations may exchange.
GAP = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02, "int8": 0.2}


@over_layers("gpu_layers", [HEAD_SHAPE])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, mode: str, rows: int
) -> None:
    layers = gpu_layers
    hidden = random_rows(rows, layers.plain.in_features).to(gpu.device)
    draws = Draws.build(rows, MODES[mode], gpu.device)

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        layer = (layers.norm, layers.packed_at(turn), VOCAB_SIZE)
        return gpu.ops.head_draw(hidden, *layer, draws.rows, draws.positions, has_filters=False)

    tokens, error = ours(0)
    assert not error.any()
    logits = reference.head(hidden.double(), layers.norm, layers.plain, VOCAB_SIZE)
    assert_wins(tokens, logits, draws, GAP[layers.dtype])

    def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor, *layer: Tensor | None) -> Tensor:
        logits = linear(layer_norm(hidden, weight, bias), *layer)[:, :VOCAB_SIZE].float()
        return logits.argmax(dim=-1) if mode == "greedy" else exponential_race(torch.softmax(logits, dim=-1))

    given = layers.to_model(hidden, layers.norm.weight, layers.norm.bias)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    names = "F.layer_norm, F.linear, float, argmax; softmax and exponential_ before argmax where sampled"
    shape = f"{layers.shape} {mode}"
    subject = Subject("head_draw", shape, layers.dtype, rows, layers.num_bytes + hidden.nbytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
