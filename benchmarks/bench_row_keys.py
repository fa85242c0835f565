"""row_keys: what the draws of a verification's rows depend on, from what their sequences have."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import COLUMNS, SamplingRows


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = batch * (k + 1)
    numbers = torch.rand(MAX_CALLS, 3, batch, generator=generator).to(gpu.device)
    top_k = torch.randint(50, (MAX_CALLS, batch), generator=generator, dtype=torch.int32).to(gpu.device)
    seeds = torch.randint(2**62, (MAX_CALLS, batch), generator=generator).to(gpu.device)
    positions = torch.randint(1024, (MAX_CALLS, rows), generator=generator, dtype=torch.int32).to(gpu.device)
    q_start = torch.arange(0, rows + 1, k + 1, dtype=torch.int32, device=gpu.device)
    logit_rows = torch.arange(rows, device=gpu.device)

    def arguments(turn: int) -> tuple[SamplingRows, Tensor, Tensor, Tensor]:
        index = turn % MAX_CALLS
        temperature, top_p, min_p = numbers[index]
        judged_by = SamplingRows.empty(batch, gpu.device)._replace(
            temperature=temperature, top_k=top_k[index], top_p=top_p, min_p=min_p, seeds=seeds[index]
        )
        return judged_by, q_start, positions[index], logit_rows

    def ours(turn: int) -> tuple[SamplingRows, Tensor]:
        return gpu.ops.row_keys(*arguments(turn))

    (judged_by, decided), (expected_rows, expected) = ours(0), reference.row_keys(*arguments(0))
    for actual, each in zip((*judged_by, decided), (*expected_rows, expected), strict=True):
        assert torch.equal(actual, each)

    row_bytes = sum(column.dtype.itemsize for column in COLUMNS.values())
    num_bytes = row_bytes * batch + rows * (12 + row_bytes)
    subject = Subject("row_keys", f"batch {batch}", "", k + 1, num_bytes, "searchsorted, gather, +")
    report.compare(benchmark, subject, ours, pytorch_rivals(reference.row_keys, arguments), timer=gpu)
