"""norm_qkv: gpt2-medium's queries, keys and values, the last two into the cache."""

from __future__ import annotations

import pytest
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import random_rows
from linear_cases import (
    GPU_ROWS,
    Layers,
    assert_near,
    build_places,
    layer_norm,
    linear,
    over_layers,
    split_heads,
)
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

NUM_HEADS, HEAD_DIM = 16, 64


@over_layers("gpu_layers", [(3072, 1024)])
@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_layers: Layers, rows: int) -> None:
    layers = gpu_layers
    hidden = random_rows(rows, layers.plain.in_features).to(gpu.device)
    places = build_places(rows, NUM_HEADS, HEAD_DIM, layers.dtype, gpu.device)
    exact_cache = places.kv_cache.double()
    where = (places.positions, places.kv_slots)

    def ours(turn: int) -> Tensor:
        return gpu.ops.norm_qkv(hidden, layers.norm, layers.packed_at(turn), *where, places.kv_cache, None)

    exact = reference.norm_qkv(hidden.double(), layers.norm, layers.plain, *where, exact_cache, None)
    assert_near(ours(0), exact, layers.dtype)
    assert_near(places.kv_cache, exact_cache, layers.dtype)

    def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor, *layer: Tensor | None) -> Tensor:
        return split_heads(linear(layer_norm(hidden, weight, bias), *layer), places, None)

    given = layers.to_model(hidden, layers.norm.weight, layers.norm.bias)
    rivals = pytorch_rivals(pytorch, lambda turn: (*given, *layers.pytorch_at(turn)))
    num_bytes = layers.num_bytes + hidden.nbytes + exact.numel() * (4 + 2 * places.kv_cache.element_size())
    names = "F.layer_norm, F.linear, split, index_put_"
    subject = Subject("norm_qkv", layers.shape, layers.dtype, rows, num_bytes, names)
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
