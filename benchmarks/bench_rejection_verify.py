"""rejection_verify: rejection verification of k draft tokens over GPT-2's vocabulary, after the filter.

On the CPU with top-p, beside what engines do without kernels of their own: sort and cumulative sum for top-p, and
`multinomial`. The logits, which a model would have just written, come from memory, as everywhere here.
"""

from __future__ import annotations

from functools import partial

import flashinfer_rivals
import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from kernel_cases import NATIVE
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import (
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
MODES = ("rejection", "point mass")
# Two launches: the target of both together.
TARGET_US = {1: 6.0, 64: 42.0}


def accept(probs: Tensor, draft_tokens: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted lengths `[B]`, and the weights `[B, V]` that the next tokens are drawn by.

    probs: the target's, `[B, k + 1, V]`; draft_tokens: `[B, k]`; draft_probs: `[B, k, V]`
    """
    batch, k = draft_tokens.shape
    chosen = draft_tokens.long()[..., None]
    p, q = probs[:, :k].gather(2, chosen)[..., 0], draft_probs.gather(2, chosen)[..., 0]
    length = accepted_length(torch.rand_like(p) * q <= p)
    sequences = torch.arange(batch, device=probs.device)
    last = probs[sequences, length]
    residual = (last - draft_probs[sequences, length.clamp_max(k - 1)]).clamp_min_(0.0)
    return length, torch.where((length < k)[:, None], residual, last)


@pytest.mark.parametrize(("batch", "k"), CPU_ROUNDS)
def test_native(benchmark: BenchmarkFixture, report: Report, logits: Logits, batch: int, k: int) -> None:
    case = build_case(logits, "rejection", batch, k, NATIVE, top_p=TOP_P)
    case.check(NATIVE, reference)
    draft_probs = case.draft_probs(0)  # kept from when the draft drew; here the same for every turn

    def pytorch(turn: int) -> tuple[Tensor, Tensor]:
        this = case.round_at(turn)
        probs = top_p_probs(this.logits, TOP_P).view(batch, k + 1, -1)
        length, weights = accept(probs, this.draft_tokens, draft_probs)
        return torch.multinomial(weights, 1)[:, 0], length

    # The target's logits, and the draft's at the row of the first rejection.
    num_bytes = ROW_BYTES * (batch * (k + 1) + batch)
    names = "rejection: softmax, sort, cumsum, gather, multinomial"
    subject = Subject("filter_rows, rejection_verify", case.shape, "fp32", k, num_bytes, names)
    ours = partial(case.filter_and_verify, NATIVE)
    report.compare(benchmark, subject, ours, {"torch": pytorch})


@pytest.mark.parametrize("with_filter", [False, True], ids=["alone", "filter"])
@pytest.mark.parametrize(("batch", "k"), GPU_ROUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_gpu(
    benchmark: BenchmarkFixture,
    report: Report,
    gpu: Gpu,
    gpu_logits: Logits,
    mode: str,
    batch: int,
    k: int,
    with_filter: bool,
) -> None:
    case = build_case(gpu_logits, mode, batch, k, gpu.ops)
    case.check(gpu.ops, reference)
    stats = case.all_stats(gpu.ops)
    draft_probs = [case.draft_probs(turn) for turn in range(min(len(case.rounds), MAX_CALLS))]

    def alone(turn: int) -> tuple[Tensor, Tensor]:
        return case.verify(gpu.ops, turn, stats[turn % len(stats)])

    def pytorch(logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
        length, weights = accept(torch.softmax(logits, dim=-1), draft_tokens, draft_probs)
        return exponential_race(weights), length

    def logits_at(turn: int) -> Tensor:
        return case.round_at(turn).logits.view(batch, k + 1, -1)

    def draft_tokens_at(turn: int) -> Tensor:
        return case.round_at(turn).draft_tokens

    def draft_probs_at(turn: int) -> Tensor:
        return draft_probs[turn % len(draft_probs)]

    given = (logits_at, draft_tokens_at, draft_probs_at)
    rivals = pytorch_rivals(pytorch, lambda turn: tuple(at(turn) for at in given))
    rivals |= flashinfer_rivals.verify_chain(*given)
    # Logits of the row that is drawn from, the target's and the draft's; the filter reads all of the target's.
    num_rows = batch * (1 if mode == "point mass" else 2) + (batch * (k + 1) if with_filter else 0)
    subject = Subject(
        "filter_rows, rejection_verify" if with_filter else "rejection_verify",
        case.shape,
        "fp32",
        k,
        ROW_BYTES * num_rows,
        "softmax, gather, cumprod, exponential_, argmax",
        "softmax, chain_speculative_sampling",
        TARGET_US[batch] if with_filter else None,
    )
    ours = partial(case.filter_and_verify, gpu.ops) if with_filter else alone
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
