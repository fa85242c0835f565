"""plan_round: what a round's forwards feed, from the state of its sequences."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.round import RoundPlan

NUM_SLOTS, MAX_SEQ_LEN = 64, 1024


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (MAX_CALLS, NUM_SLOTS)
    seq_len = torch.randint(2, MAX_SEQ_LEN - k, shape, generator=generator, dtype=torch.int32).to(gpu.device)
    length_limit, num_speculative = torch.full_like(seq_len, MAX_SEQ_LEN), torch.full_like(seq_len, k)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:batch].int().to(gpu.device)

    def arguments(turn: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
        index = turn % MAX_CALLS
        state = (seq_len[index], length_limit[index], num_speculative[index])
        return slots, *state, k, MAX_SEQ_LEN

    def ours(turn: int) -> RoundPlan:
        return gpu.ops.plan_round(*arguments(turn))

    for actual, expected in zip(ours(0), reference.plan_round(*arguments(0)), strict=True):
        assert torch.equal(actual, expected.int())

    num_bytes = 4 * batch * (4 + 4 + 3 * k)
    subject = Subject("plan_round", f"batch {batch}", "", k, num_bytes, "gather, minimum, clamp, where, ...")
    report.compare(benchmark, subject, ours, pytorch_rivals(reference.plan_round, arguments), timer=gpu)
