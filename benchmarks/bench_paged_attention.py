"""paged_attention: decode, verification and prefill chunks; gpt2-medium's heads, and on a GPU wider ones too."""

from __future__ import annotations

from functools import partial

import cpu_timing
import flashinfer_rivals
import pytest
import torch
from attention_cases import MAX_CONTEXT, build_case, shape_name
from gpu_timing import Gpu, compiled
from kernel_cases import NATIVE, assert_earned
from linear_cases import assert_near
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPT2_MEDIUM = (16, 64)  # heads, head_dim
GPU_HEADS = [
    *((GPT2_MEDIUM, dtype) for dtype in ("fp16", "bf16", "fp32")),
    *((heads, "fp16") for heads in ((32, 80), (16, 128))),
]
GATHERED = "F.scaled_dot_product_attention, gathered beforehand"
# (sequences, queries of each, context)
PREFILL = [(1, 512, 512), (1, 256, 1024)]
CPU_CASES = [
    *((1, q_len, context) for context in (128, 512, 1024) for q_len in (1, 2, 4, 6, 9, 17)),
    *((8, q_len, context) for context in (512, 1024) for q_len in (1, 6)),
    *PREFILL,
]
GPU_CASES = [
    *((1, q_len, context) for context in (128, 512, 1024) for q_len in (1, 2, 5, 9, 17)),
    *PREFILL,
    *((8, q_len, context) for context in (128, 512, 1024) for q_len in (1, 2, 5, 9, 17)),
]
# Of a lone query's time: what a verification of 8 draft tokens may take.
TARGET_OF_9 = 1.15


@pytest.mark.parametrize(("batch", "q_len", "context"), CPU_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native(
    benchmark: BenchmarkFixture, report: Report, dtype: str, batch: int, q_len: int, context: int
) -> None:
    sizes = (batch, q_len, context)
    case = build_case(GPT2_MEDIUM, DTYPES[dtype], sizes, cpu_timing.num_copies, torch.device("cpu"))
    honest = case.run(reference.paged_attention, case.query, 0)
    exact = case.run(reference.paged_attention, case.query.double(), 0)
    assert_earned(case.run(NATIVE.paged_attention, case.query, 0), honest, exact)

    query, gathered = case.model_query(), [case.gather(cache) for cache in case.caches]

    def pytorch(turn: int) -> Tensor:
        return case.attend(query, gathered[turn % len(gathered)])

    torch.testing.assert_close(pytorch(0).double(), exact, rtol=0.03, atol=0.03)
    shape = shape_name(GPT2_MEDIUM, batch, context)
    subject = Subject("paged_attention", shape, dtype, q_len, case.num_bytes, GATHERED)
    ours = partial(case.run, NATIVE.paged_attention, case.query)
    report.compare(benchmark, subject, ours, {"torch": pytorch})


@pytest.fixture(scope="module")
def lone_us() -> dict[tuple[str, str], float]:
    """What a lone query took, by shape and dtype."""
    return {}


@pytest.mark.parametrize(("batch", "q_len", "context"), GPU_CASES)
@pytest.mark.parametrize(
    ("heads", "dtype"), GPU_HEADS, ids=[f"{heads[0]}x{heads[1]}-{dtype}" for heads, dtype in GPU_HEADS]
)
def test_gpu(
    benchmark: BenchmarkFixture,
    report: Report,
    gpu: Gpu,
    lone_us: dict[tuple[str, str], float],
    heads: tuple[int, int],
    dtype: str,
    batch: int,
    q_len: int,
    context: int,
) -> None:
    case = build_case(heads, DTYPES[dtype], (batch, q_len, context), gpu.num_copies, gpu.device)
    exact = case.run(reference.paged_attention, case.query.double(), 0)
    assert_near(case.run(gpu.ops.paged_attention, case.query, 0), exact, dtype)

    query, gathered = case.model_query(), [case.gather(cache) for cache in case.caches]

    def pytorch(turn: int) -> Tensor:
        return case.attend(query, gathered[turn % len(gathered)])

    def from_blocks(query: Tensor, cache: Tensor) -> Tensor:
        return case.attend(query, case.gather(cache))

    torch.testing.assert_close(pytorch(0).double(), exact, rtol=0.03, atol=0.03)
    rivals = {"torch": pytorch, "compile": compiled(from_blocks, lambda turn: (query, case.cache_at(turn)))}
    rivals |= flashinfer_rivals.attention(
        case.query.to(case.caches.dtype), case.cache_at, case.blocks.contiguous(), exact
    )
    shape = shape_name(heads, batch, context)
    lone = lone_us.get((shape, dtype)) if q_len == 9 and context == MAX_CONTEXT else None
    subject = Subject(
        "paged_attention",
        shape,
        dtype,
        q_len,
        case.num_bytes + case.query.nbytes + exact.nbytes // 2,
        f"{GATHERED}; compile gathers itself",
        "BatchDecodeWithPagedKVCacheWrapper, with several queries BatchPrefillWithPagedKVCacheWrapper",
        None if lone is None else round(TARGET_OF_9 * lone, 2),
    )
    ours = partial(case.run, gpu.ops.paged_attention, case.query)
    row = report.compare(benchmark, subject, ours, rivals, timer=gpu)
    if q_len == 1:
        lone_us[shape, dtype] = row.us.median
