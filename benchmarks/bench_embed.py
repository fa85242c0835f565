"""embed: token and position embeddings of gpt2-medium."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

VOCAB_SIZE, MAX_POSITIONS, WIDTH = 50257, 1024, 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytorch_embed(
    token_ids: Tensor, positions: Tensor, token_table: Tensor, position_table: Tensor
) -> Tensor:
    return (F.embedding(token_ids, token_table) + F.embedding(positions, position_table)).float()


@pytest.mark.parametrize("rows", [1, 9, 64, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, dtype: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(6)
    # Every turn looks up other rows; between replays the cache is flushed.
    token_ids, positions = (
        torch.randint(size, (MAX_CALLS, rows), generator=generator, dtype=torch.int32).to(gpu.device)
        for size in (VOCAB_SIZE, MAX_POSITIONS)
    )
    tables = [
        torch.randn(size, WIDTH, generator=generator).to(gpu.device, DTYPES[dtype])
        for size in (VOCAB_SIZE, MAX_POSITIONS)
    ]

    def arguments(turn: int) -> tuple[Tensor, ...]:
        return token_ids[turn % MAX_CALLS], positions[turn % MAX_CALLS], *tables

    def ours(turn: int) -> Tensor:
        return gpu.ops.embed(*arguments(turn))

    assert torch.equal(ours(0), reference.embed(*arguments(0)))
    num_bytes = rows * WIDTH * (2 * tables[0].element_size() + 4)
    shape = f"{VOCAB_SIZE}x{WIDTH}"
    subject = Subject("embed", shape, dtype, rows, num_bytes, "F.embedding twice, +, float")
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch_embed, arguments), timer=gpu)
