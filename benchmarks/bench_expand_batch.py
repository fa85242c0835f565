"""expand_batch: what a forward's batch is made of, from a start and a length for each sequence."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference

NUM_SLOTS, MAX_SEQ_LEN, BLOCK_SIZE = 64, 1024, 16


def pytorch_expand(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
    num_tokens: int,
    num_rows: int,
) -> tuple[Tensor, ...]:
    """The reference with the totals known on the host, so that nothing waits for the device."""

    def ragged(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        ends = lengths.cumsum(0)
        index = torch.arange(total, device=lengths.device)
        row = torch.searchsorted(ends, index, right=True)
        return row, index - (ends - lengths)[row]

    row, offset = ragged(q_len, num_tokens)
    positions = start.long()[row] + offset
    slot = slots.long()[row]
    block = block_table[slot, positions // block_size].long()
    q_end = q_len.cumsum(0)
    logit_row, logit_offset = ragged(num_logits, num_rows)
    return (
        tokens[slot, positions],
        positions.int(),
        block * block_size + positions % block_size,
        torch.cat((q_end.new_zeros(1), q_end)).int(),
        start + q_len,
        (q_end - num_logits)[logit_row] + logit_offset,
    )


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (MAX_CALLS, NUM_SLOTS, MAX_SEQ_LEN)
    tokens = torch.randint(50257, shape, generator=generator, dtype=torch.int32).to(gpu.device)
    num_blocks = MAX_SEQ_LEN // BLOCK_SIZE
    shape = (MAX_CALLS, NUM_SLOTS, num_blocks)
    block_tables = torch.randint(NUM_SLOTS * num_blocks, shape, generator=generator, dtype=torch.int32)
    block_tables = block_tables.to(gpu.device)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:batch].int().to(gpu.device)
    start = torch.randint(MAX_SEQ_LEN - k, (batch,), generator=generator, dtype=torch.int32).to(gpu.device)
    q_len = torch.full_like(slots, k + 1)
    total = batch * (k + 1)

    def arguments(turn: int) -> tuple[Tensor | int, ...]:
        index = turn % MAX_CALLS
        return tokens[index], block_tables[index], slots, start, q_len, q_len, BLOCK_SIZE

    def ours(turn: int) -> tuple[Tensor, ...]:
        return gpu.ops.expand_batch(*arguments(turn), num_tokens=total, num_logit_rows=total)

    for actual, expected in zip(ours(0), reference.expand_batch(*arguments(0)), strict=True):
        assert torch.equal(actual, expected)

    rivals = pytorch_rivals(pytorch_expand, lambda turn: (*arguments(turn), total, total))
    # Of each token its id and block, read; id, position, place and logit row, written; a few numbers a sequence.
    num_bytes = total * (8 + 24) + batch * 24
    subject = Subject(
        "expand_batch", f"batch {batch}", "", k + 1, num_bytes, "cumsum, searchsorted, gather, ..."
    )
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
