"""parallel_norm_linear: what a layer of pythia-1.4b reads from its input, attention and MLP side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import (
    DTYPES,
    GPU_ROWS,
    Layers,
    assert_near,
    build_gpu_layers,
    build_places,
    layer_norm,
    linear,
    split_heads,
)
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

QKV, EXPAND = (6144, 2048), (8192, 2048)
NUM_HEADS, HEAD_DIM, ROTARY_DIM, MAX_POSITIONS = 16, 128, 32, 2048
ACTIVATION = "gelu"


@pytest.fixture(scope="module", params=DTYPES)
def pair(request: pytest.FixtureRequest, gpu: Gpu) -> tuple[Layers, Layers]:
    return build_gpu_layers(QKV, request.param, gpu), build_gpu_layers(EXPAND, request.param, gpu)


def rotary_table(device: torch.device) -> Tensor:
    """`[P, 2, rotary_dim / 2]` cosines and sines."""
    frequencies = 10000.0 ** (-torch.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
    angles = torch.arange(MAX_POSITIONS)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, pair: tuple[Layers, Layers], rows: int
) -> None:
    qkv, mlp = pair
    hidden = random_rows(rows, QKV[1]).to(gpu.device)
    places = build_places(rows, NUM_HEADS, HEAD_DIM, qkv.dtype, gpu.device)
    exact_cache, rotary = places.kv_cache.double(), rotary_table(gpu.device)
    where = (ACTIVATION, places.positions, places.kv_slots)

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        layers = (qkv.norm, qkv.packed_at(turn), mlp.norm, mlp.packed_at(turn))
        return gpu.ops.parallel_norm_linear(hidden, *layers, *where, places.kv_cache, rotary)

    plain = (qkv.norm, qkv.plain, mlp.norm, mlp.plain)
    exact = reference.parallel_norm_linear(hidden.double(), *plain, *where, exact_cache, rotary)
    for actual, expected in zip(ours(0), exact, strict=True):
        assert_near(actual, expected, qkv.dtype)
    assert_near(places.kv_cache, exact_cache, qkv.dtype)

    norms = (qkv.norm.weight, qkv.norm.bias, mlp.norm.weight, mlp.norm.bias)
    given = qkv.to_model(hidden, rotary, *norms)

    def pytorch(hidden: Tensor, rotary: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        norm, mlp_norm, layer, mlp_layer = rest[:2], rest[2:4], rest[4:7], rest[7:]
        query = split_heads(linear(layer_norm(hidden, *norm), *layer), places, rotary)
        return query, F.gelu(linear(layer_norm(hidden, *mlp_norm), *mlp_layer))

    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *qkv.pytorch_at(turn), *mlp.pytorch_at(turn)))
    written = sum(4 * out.numel() for out in exact) + 2 * exact[0].numel() * places.kv_cache.element_size()
    num_bytes = qkv.num_bytes + mlp.num_bytes + hidden.nbytes + written
    names = "F.layer_norm, F.linear, rotary, index_put_, F.gelu"
    subject = Subject("parallel_norm_linear", f"{qkv.shape} + {mlp.shape}", qkv.dtype, rows, num_bytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
