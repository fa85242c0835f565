"""begin_forward: what comes before gpt2-medium's layers, from a start and a length for each sequence."""

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
from specengine.kernels.types.rows import COLUMNS, SamplingRows

VOCAB_SIZE, MAX_POSITIONS, WIDTH = 50257, 1024, 1024
NUM_SLOTS, BLOCK_SIZE = 64, 16


def flat(start: ForwardStart) -> list[Tensor]:
    assert start.hidden is not None
    assert start.row_keys is not None
    return [*start.expanded, start.hidden, *start.row_keys[0], start.row_keys[1]]


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(gpu.device)

    # Every turn looks up other rows; between replays the cache is flushed.
    tokens = integers(VOCAB_SIZE, MAX_CALLS, NUM_SLOTS, MAX_POSITIONS)
    num_blocks = MAX_POSITIONS // BLOCK_SIZE
    block_tables = integers(NUM_SLOTS * num_blocks, MAX_CALLS, NUM_SLOTS, num_blocks)
    tables = [
        torch.randn(size, WIDTH, generator=generator).to(gpu.device, torch.float16)
        for size in (VOCAB_SIZE, MAX_POSITIONS)
    ]
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:batch].int().to(gpu.device)
    start, q_len = integers(MAX_POSITIONS - k, batch), torch.full_like(slots, k + 1)
    rows = SamplingRows.empty(batch, gpu.device)._replace(seeds=start.long())
    total = batch * (k + 1)
    room = {"num_tokens": total, "num_logit_rows": total}

    def arguments(turn: int) -> Any:
        index = turn % MAX_CALLS
        return tokens[index], block_tables[index], slots, start, q_len, q_len, BLOCK_SIZE, rows, *tables

    def ours(turn: int) -> ForwardStart:
        return gpu.ops.begin_forward(*arguments(turn), **room)

    def apart(turn: int) -> ForwardStart:
        *where, rows, token_table, position_table = arguments(turn)
        expanded = gpu.ops.expand_batch(*where, **room)
        token_ids, positions, _, q_start, _, logit_rows = expanded
        hidden = gpu.ops.embed(token_ids, positions, token_table, position_table)
        return ForwardStart(*expanded, hidden, gpu.ops.row_keys(rows, q_start, positions, logit_rows))

    expected = flat(reference.begin_forward(*arguments(0)))
    for results in (flat(ours(0)), flat(apart(0))):
        assert all(map(torch.equal, results, expected))

    # Of each token its id and block, and a row of both tables, read; a row, its places and its keys written.
    keys = sum(column.dtype.itemsize for column in COLUMNS.values())
    a_token = 8 + 24 + WIDTH * (2 * tables[0].element_size() + 4) + keys
    num_bytes = total * a_token + batch * (24 + keys)
    subject = Subject("begin_forward", f"batch {batch}", "fp16", k + 1, num_bytes, "")
    report.compare(benchmark, subject, ours, {"three launches": apart}, timer=gpu)
