"""typical_verify: typical verification of k draft tokens over GPT-2's vocabulary, after the filter.

On the CPU with top-p, beside the same rule in PyTorch, as an engine without kernels of its own would write it. The
logits, which a model would have just written, come from memory, as everywhere here.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from kernel_cases import NATIVE
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import (
    ACCEPTANCE_DELTA,
    ACCEPTANCE_THRESHOLD,
    CPU_ROUNDS,
    GPU_ROUNDS,
    ROW_BYTES,
    Logits,
    accepted_length,
    build_case,
    exponential_race,
    top_p_probs,
)

from specengine.kernels import reference

TOP_P = 0.9


def accept(probs: Tensor, draft_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted lengths `[B]`, and the weights `[B, V]` that the next tokens are drawn by.

    probs: the target's, `[B, k + 1, V]`; draft_tokens: `[B, k]`
    """
    drafted = probs[:, :-1].gather(2, draft_tokens.long()[..., None])[..., 0]
    entropy = torch.special.entr(probs[:, :-1]).sum(dim=2)
    length = accepted_length(
        drafted > (ACCEPTANCE_DELTA * torch.exp(-entropy)).clamp_max(ACCEPTANCE_THRESHOLD)
    )
    return length, probs[torch.arange(len(probs), device=probs.device), length]


@pytest.mark.parametrize(("batch", "k"), CPU_ROUNDS)
def test_native(benchmark: BenchmarkFixture, report: Report, logits: Logits, batch: int, k: int) -> None:
    case = build_case(logits, "typical", batch, k, NATIVE, top_p=TOP_P)
    case.check(NATIVE, reference)

    def pytorch(turn: int) -> tuple[Tensor, Tensor]:
        this = case.round_at(turn)
        probs = top_p_probs(this.logits, TOP_P).view(batch, k + 1, -1)
        length, weights = accept(probs, this.draft_tokens)
        return torch.multinomial(weights, 1)[:, 0], length

    names = "softmax, sort, cumsum, entr, sum, gather, multinomial"
    num_bytes = ROW_BYTES * batch * (k + 1)
    subject = Subject("filter_rows, typical_verify", case.shape, "fp32", k, num_bytes, names)
    report.compare(benchmark, subject, partial(case.filter_and_verify, NATIVE), {"torch": pytorch})


@pytest.mark.parametrize(("batch", "k"), GPU_ROUNDS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_logits: Logits, batch: int, k: int
) -> None:
    case = build_case(gpu_logits, "typical", batch, k, gpu.ops)
    case.check(gpu.ops, reference)
    stats = case.all_stats(gpu.ops)

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        return case.verify(gpu.ops, turn, stats[turn % len(stats)])

    def pytorch(logits: Tensor, draft_tokens: Tensor) -> tuple[Tensor, Tensor]:
        length, weights = accept(torch.softmax(logits, dim=-1), draft_tokens)
        return exponential_race(weights), length

    def given_at(turn: int) -> tuple[Tensor, Tensor]:
        this = case.round_at(turn)
        return this.logits.view(batch, k + 1, -1), this.draft_tokens

    # Every row, unless its draft and all before it are likely enough as they are.
    names = "softmax, entr, sum, gather, exponential_, argmax"
    subject = Subject("typical_verify", case.shape, "fp32", k, ROW_BYTES * batch * (k + 1), names)
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch, given_at), timer=gpu)
