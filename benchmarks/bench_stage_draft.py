"""stage_draft: a drawn draft of each sequence put in its places, alone and with the law it was drawn from."""

from __future__ import annotations

import pytest
import torch
from cpu_timing import ROTATED_BYTES
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import PADDED_VOCAB_SIZE, VOCAB_SIZE

from specengine.kernels import reference
from specengine.kernels.types.statistics import STAT_ERROR

K, STEP = 8, 3
NUM_SLOTS, MAX_SEQ_LEN = 65, 1024

Law = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def pytorch_stage(
    step: int,
    tokens: Tensor,
    slots: Tensor,
    seq_len: Tensor,
    is_drafting: Tensor,
    drawn: Tensor,
    drawn_error: Tensor | None,
    draft_tokens: Tensor,
    num_draft: Tensor,
    *law: Tensor,
) -> None:
    """The reference without waiting for the device: every row is written, some with what they held."""
    is_drafting = is_drafting != 0
    row = (is_drafting.cumsum(0) - 1).clamp_min(0)
    place = (slots.long(), seq_len.long() + step)
    token = drawn[row]
    tokens[place] = torch.where(is_drafting, token, tokens[place])
    draft_tokens[:, step] = torch.where(is_drafting, token, draft_tokens[:, step])
    error = law[2][:, STAT_ERROR] if drawn_error is None else drawn_error
    is_bad = is_drafting & (error[row] != 0)
    num_draft.copy_(torch.where(is_bad, num_draft.clamp_max(step), num_draft))
    for source, target in zip(law[:3], law[3:], strict=True):
        column = target[:, step]
        mask = is_drafting.view(-1, *(1,) * (column.dim() - 1))
        column.copy_(torch.where(mask, source[row], column))


def build_law(batch: int, device: torch.device) -> list[Law]:
    """For each turn other logits; the places they are kept in are the same every time, as in a round."""
    num_turns = min(MAX_CALLS, ROTATED_BYTES // (4 * PADDED_VOCAB_SIZE * batch) + 1)
    kept = (
        torch.zeros(batch, K, device=device),
        torch.zeros(batch, K, PADDED_VOCAB_SIZE, device=device),
        torch.zeros(batch, K, 4, device=device),
    )
    logits = torch.randn(num_turns, batch, PADDED_VOCAB_SIZE, device=device)
    stats = torch.zeros(num_turns, batch, 4, device=device)
    log_probs = torch.zeros(num_turns, batch, device=device)
    return [(log_probs[turn], logits[turn], stats[turn], *kept) for turn in range(num_turns)]


@pytest.mark.parametrize("has_law", [False, True], ids=["token", "law"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, has_law: bool) -> None:
    generator = torch.Generator().manual_seed(7)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(gpu.device)

    tokens, drawn = integers(VOCAB_SIZE, MAX_CALLS, NUM_SLOTS, MAX_SEQ_LEN), integers(VOCAB_SIZE, batch)
    slots = torch.randperm(NUM_SLOTS - 1, generator=generator)[:batch].int().to(gpu.device)
    seq_len, drafts = integers(MAX_SEQ_LEN - K, batch), integers(VOCAB_SIZE, batch, K)
    is_drafting, num_draft, error = torch.ones_like(slots), torch.full_like(slots, K), torch.zeros_like(slots)
    laws = build_law(batch, gpu.device) if has_law else [()]

    def arguments(turn: int) -> tuple[int | Tensor | None, ...]:
        drawn_error = None if has_law else error
        where = (tokens[turn % MAX_CALLS], slots, seq_len, is_drafting)
        return STEP, *where, drawn, drawn_error, drafts, num_draft, *laws[turn % len(laws)]

    def ours(turn: int) -> None:
        gpu.ops.stage_draft(*arguments(turn))

    check(arguments(0), gpu)
    shape = f"batch {batch}" + (f" V {VOCAB_SIZE}" if has_law else "")
    num_bytes = batch * (32 + (8 * PADDED_VOCAB_SIZE if has_law else 0))
    names = "cumsum, gather, where, index_put" + (", copy" if has_law else "")
    subject = Subject("stage_draft", shape, "fp32" if has_law else "", K, num_bytes, names)
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch_stage, arguments), timer=gpu)


def check(arguments: tuple[int | Tensor | None, ...], gpu: Gpu) -> None:
    """Ours and PyTorch's write what the reference does."""
    results = []
    for op in (reference.stage_draft, gpu.ops.stage_draft, pytorch_stage):
        copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        op(*copies)
        results.append([each for each in copies if isinstance(each, Tensor)])
    expected = results.pop(0)
    for actual in results:
        assert all(map(torch.equal, actual, expected))
