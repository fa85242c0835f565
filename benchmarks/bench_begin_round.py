"""begin_round: a round's plan, and what comes before gpt2-medium's layers in its first forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.round import RoundPlan
from specengine.kernels.types.rows import COLUMNS, SamplingRows

VOCAB_SIZE, MAX_POSITIONS, WIDTH = 50257, 1024, 1024
NUM_SLOTS, BLOCK_SIZE = 64, 16


def flat(begun: tuple[RoundPlan, ForwardStart]) -> list[Tensor]:
    plan, start = begun
    assert start.hidden is not None
    assert start.row_keys is not None
    return [*plan, *start.expanded, start.hidden, *start.row_keys[0], start.row_keys[1]]


@pytest.mark.parametrize(("k", "num_fed"), [(0, 1), (8, 2)])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int, num_fed: int) -> None:
    generator = torch.Generator().manual_seed(7)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(gpu.device)

    # Every turn looks up other rows; between replays the cache is flushed.
    num_blocks = MAX_POSITIONS // BLOCK_SIZE
    tokens = integers(0, VOCAB_SIZE, MAX_CALLS, NUM_SLOTS, MAX_POSITIONS)
    block_tables = integers(0, NUM_SLOTS * num_blocks, MAX_CALLS, NUM_SLOTS, num_blocks)
    seq_len = integers(2, MAX_POSITIONS - k, MAX_CALLS, NUM_SLOTS)
    length_limit, num_speculative = torch.full_like(seq_len, MAX_POSITIONS), torch.full_like(seq_len, k)
    tables = [
        torch.randn(size, WIDTH, generator=generator).to(gpu.device, torch.float16)
        for size in (VOCAB_SIZE, MAX_POSITIONS)
    ]
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:batch].int().to(gpu.device)
    rows = SamplingRows.empty(batch, gpu.device)._replace(seeds=slots.long())

    def arguments(turn: int) -> Any:
        index = turn % MAX_CALLS
        state = (seq_len[index], length_limit[index], num_speculative[index], k, MAX_POSITIONS)
        return tokens[index], block_tables[index], slots, *state, num_fed, BLOCK_SIZE, rows, *tables

    def ours(turn: int) -> tuple[RoundPlan, ForwardStart]:
        return gpu.ops.begin_round(*arguments(turn))

    def apart(turn: int) -> tuple[RoundPlan, ForwardStart]:
        text, table, own, *state, _, block_size, each, token_table, position_table = arguments(turn)
        plan = gpu.ops.plan_round(own, *state)
        start, q_len = plan.last_position, plan.is_running
        if k:
            start, q_len = plan.draft_start[0], plan.draft_q_len[0]
        wanted = plan.is_drafting[0] if k else plan.is_running
        where = (text, table, own, start, q_len, wanted, block_size, each, token_table, position_table)
        room = {"num_tokens": num_fed * batch, "num_logit_rows": batch}
        return plan, gpu.ops.begin_forward(*where, **room)

    expected = flat(reference.begin_round(*arguments(0)))
    for results in (flat(ours(0)), flat(apart(0))):
        for actual, true in zip(results, expected, strict=True):
            assert torch.equal(actual, true.to(actual.dtype))

    # Of each token its id and block, and a row of both tables, read; a row, its places and its keys written.
    keys = sum(column.dtype.itemsize for column in COLUMNS.values())
    a_token = 8 + 24 + WIDTH * (2 * tables[0].element_size() + 4)
    num_bytes = batch * (num_fed * a_token + 2 * keys + 16 + 4 * (4 + 3 * k))
    subject = Subject("begin_round", f"batch {batch}", "fp16", k, num_bytes, "")
    report.compare(benchmark, subject, ours, {"two launches": apart}, timer=gpu)
