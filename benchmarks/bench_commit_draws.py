"""commit_draws: k drafts judged by what the target has drawn, and what they emit committed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import VOCAB_SIZE

from specengine.kernels import reference
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows

ACCEPTANCE = 0.7
NUM_SLOTS, MAX_SEQ_LEN = 65, 1024


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    drawn = integers(VOCAB_SIZE, MAX_CALLS, batch * (k + 1))
    is_wrong = torch.rand(MAX_CALLS, batch, k, generator=generator) > ACCEPTANCE
    drafts = (drawn.view(MAX_CALLS, batch, k + 1)[:, :, :k] + is_wrong).int().to(gpu.device)
    drawn, tokens = (
        drawn.to(gpu.device),
        integers(VOCAB_SIZE, MAX_CALLS, NUM_SLOTS, MAX_SEQ_LEN).to(gpu.device),
    )
    seq_len = (2 + integers(MAX_SEQ_LEN - k - 3, MAX_CALLS, NUM_SLOTS)).to(gpu.device)
    slots = torch.randperm(NUM_SLOTS - 1, generator=generator)[:batch].int().to(gpu.device)
    start = seq_len[
        :, slots.long()
    ]  # a round's plan holds them: what a call commits, the next one does not see
    length_limit, no_error = torch.full_like(seq_len, MAX_SEQ_LEN), torch.zeros_like(drawn[0])
    row_start = torch.arange(0, batch * (k + 1), k + 1, dtype=torch.int32, device=gpu.device)
    num_draft, is_running = torch.full_like(row_start, k), torch.ones_like(row_start)
    shapes = ((batch, k + 1), (batch,), (batch,))
    verdict = Verdict(*(torch.zeros(shape, dtype=torch.int32, device=gpu.device) for shape in shapes))
    rows = SamplingRows.empty(batch, gpu.device)

    def arguments(turn: int) -> Any:
        index = turn % MAX_CALLS
        judged = Drafts(row_start, start[index], num_draft, drafts[index])
        state = (tokens[index], seq_len[index], length_limit[index], slots)
        return drawn[index], no_error, judged, rows, is_running, verdict, *state

    def ours(turn: int) -> Tensor:
        return gpu.ops.commit_draws(*arguments(turn))

    def apart(turn: int) -> Tensor:
        *judged, own_tokens, own_seq_len, limit, own_slots = arguments(turn)
        gpu.ops.match_draws(*judged)
        state = (own_tokens, own_seq_len, limit, own_slots, judged[2].seq_len, is_running)
        return gpu.ops.commit_round(*state, verdict.tokens, verdict.num_accepted, num_draft, verdict.error)

    results = []
    for op in (lambda turn: reference.commit_draws(*arguments(turn)), ours, apart):
        record = op(0)
        is_emitted = torch.arange(k + 1, device=gpu.device) < record[:, :1]
        results.append(
            [record[:, :3], torch.where(is_emitted, record[:, 3:], 0), tokens[0].clone(), seq_len[0].clone()]
        )
    for actual in results[1:]:
        assert all(map(torch.equal, actual, results[0]))

    num_bytes = 4 * batch * (7 * (k + 1) + 12)
    subject = Subject("commit_draws", f"batch {batch}", "", k, num_bytes, "")
    report.compare(benchmark, subject, ours, {"two launches": apart}, timer=gpu)
