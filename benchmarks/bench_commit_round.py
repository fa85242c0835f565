"""commit_round: what a round emitted, appended to its sequences, and a record of it."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import VOCAB_SIZE

from specengine.kernels import reference

NUM_SLOTS, MAX_SEQ_LEN = 65, 1024


def pytorch_commit(
    tokens: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    slots: Tensor,
    start: Tensor,
    is_running: Tensor,
    emitted: Tensor,
    num_accepted: Tensor,
    num_draft: Tensor,
    error: Tensor,
) -> Tensor:
    """The reference without waiting for the device: every row is written, some with what they held."""
    slot, is_running = slots.long(), is_running != 0
    is_error = is_running & (error != 0)
    num_emitted = (num_accepted + 1) * (is_running & ~is_error)
    offset = torch.arange(emitted.shape[1], device=tokens.device)
    place = (slot[:, None], start.long()[:, None] + offset)
    tokens[place] = torch.where(offset < num_emitted[:, None], emitted, tokens[place])
    seq_len[slot] = torch.where(num_emitted > 0, start + num_emitted, seq_len[slot])
    length_limit[slot] = torch.where(is_error, 0, length_limit[slot])
    columns = torch.stack((num_emitted, num_draft * is_running, is_error.int()), dim=1)
    return torch.cat((columns, emitted), dim=1)


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(gpu.device)

    tokens = integers(VOCAB_SIZE, MAX_CALLS, NUM_SLOTS, MAX_SEQ_LEN)
    seq_len = 2 + integers(MAX_SEQ_LEN - k - 3, MAX_CALLS, NUM_SLOTS)
    length_limit = torch.full_like(seq_len, MAX_SEQ_LEN)
    slots = torch.randperm(NUM_SLOTS - 1, generator=generator)[:batch].int().to(gpu.device)
    start = seq_len[
        :, slots.long()
    ]  # a round's plan holds them: what a call commits, the next one does not see
    emitted, num_accepted = integers(VOCAB_SIZE, MAX_CALLS, batch, k + 1), integers(k + 1, batch)
    is_running, num_draft, error = torch.ones_like(slots), torch.full_like(slots, k), torch.zeros_like(slots)

    def arguments(turn: int) -> tuple[Tensor, ...]:
        index = turn % MAX_CALLS
        state = (tokens[index], seq_len[index], length_limit[index])
        decided = (emitted[index], num_accepted, num_draft, error)
        return *state, slots, start[index], is_running, *decided

    def ours(turn: int) -> Tensor:
        return gpu.ops.commit_round(*arguments(turn))

    results = []
    for op in (reference.commit_round, gpu.ops.commit_round, pytorch_commit):
        copies = [each.clone() for each in arguments(0)]
        results.append([op(*copies), *copies[:3]])
    for actual in results[1:]:
        assert all(map(torch.equal, actual, results[0]))

    num_bytes = 4 * batch * (3 * (k + 1) + 11)
    subject = Subject(
        "commit_round", f"batch {batch}", "", k, num_bytes, "gather, where, index_put, stack, cat"
    )
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch_commit, arguments), timer=gpu)
