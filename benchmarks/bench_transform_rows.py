"""transform_rows: what sequences ask to be done to a verification's logits, beside a copy with index_put."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms

VOCAB = 50304


@pytest.mark.parametrize("asked", ["1 entries", "300 entries", "300 after prefixes", "penalties"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, asked: str) -> None:
    k, num_entries = 4, 300 if asked.startswith("300") else 1
    generator = torch.Generator().manual_seed(7)
    num_rows = batch * (k + 1)
    logits = torch.randn(MAX_CALLS, num_rows, VOCAB, generator=generator).to(gpu.device)
    token = torch.randint(VOCAB, (batch, num_entries), generator=generator, dtype=torch.int32)
    token = token.sort(dim=1).values.to(gpu.device)
    zeros = torch.zeros(batch, num_entries, dtype=torch.int32, device=gpu.device)
    tables = Transforms(
        history=torch.randint(VOCAB, (batch, 1024), generator=generator, dtype=torch.int32).to(gpu.device),
        num_entries=torch.full((batch,), num_entries, dtype=torch.int32, device=gpu.device),
        token=token,
        value=torch.randn(batch, num_entries, generator=generator).to(gpu.device),
        first=zeros,
        end=zeros + 2**31 - 1,
        prefix_start=zeros,
        prefix_length=zeros + (2 if asked.endswith("prefixes") else 0),
        prefix=torch.zeros(batch, 2, dtype=torch.int32, device=gpu.device),
    )
    positions = torch.arange(num_rows, dtype=torch.int32, device=gpu.device) % (k + 1) + 500
    q_start = torch.arange(0, num_rows + 1, k + 1, dtype=torch.int32, device=gpu.device)
    slots = torch.arange(batch, dtype=torch.int32, device=gpu.device)
    where = (slots, q_start, positions, torch.arange(num_rows, device=gpu.device), tables)
    rows = SamplingRows.empty(batch, gpu.device)
    if asked == "penalties":
        rows.repetition_penalty.fill_(1.3)
        rows.presence_penalty.fill_(0.5)
        rows.frequency_penalty.fill_(0.3)
        rows.prompt_length.fill_(100)

    def arguments(turn: int) -> tuple[Tensor | SamplingRows | Transforms, ...]:
        return logits[turn % MAX_CALLS], rows, *where

    def ours(turn: int) -> Tensor:
        transformed: Tensor = gpu.ops.transform_rows(*arguments(turn))
        return transformed

    assert torch.equal(ours(0), reference.transform_rows(*arguments(0)))

    num_bytes = 8 * num_rows * VOCAB + 16 * batch * num_entries
    shape, pytorch = f"batch {batch}, {asked}", "clone, gather, scatter"
    subject = Subject("transform_rows", shape, "", k + 1, num_bytes, pytorch)
    report.compare(benchmark, subject, ours, pytorch_rivals(reference.transform_rows, arguments), timer=gpu)
