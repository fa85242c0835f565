"""block_verify: block verification of k draft tokens over GPT-2's vocabulary, after the filter.

On the CPU with top-p, beside the same formula in PyTorch, as an engine without kernels of its own would write it. The
logits, which a model would have just written, come from memory, as everywhere here.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from kernel_cases import NATIVE
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import CPU_ROUNDS, GPU_ROUNDS, ROW_BYTES, Logits, build_case, exponential_race, top_p_probs

from specengine.kernels import reference

TOP_P = 0.9


def accept_block(probs: Tensor, draft_tokens: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted lengths `[B]`, and the weights `[B, V]` that the next tokens are drawn by.

    probs: the target's, `[B, k + 1, V]`; draft_tokens: `[B, k]`; draft_probs: `[B, k, V]`
    """
    k = draft_tokens.shape[1]
    chosen = draft_tokens.long()[..., None]
    ratio = (probs[:, :k].gather(2, chosen) / draft_probs.gather(2, chosen))[..., 0]
    shares = [torch.ones_like(ratio[:, 0])]
    for i in range(k):
        shares.append((shares[-1] * ratio[:, i]).clamp_max(1.0))
    share = torch.stack(shares, dim=1)
    excess = (share[:, 1:k, None] * probs[:, 1:k] - draft_probs[:, 1:]).clamp_min_(0.0).sum(dim=2)
    height = torch.cat((excess / (excess + 1 - share[:, 1:k]), share[:, k:]), dim=1)
    lengths = torch.arange(1, k + 1, device=probs.device)
    length = ((torch.rand_like(height) <= height) * lengths).max(dim=1).values
    sequences = torch.arange(len(probs), device=probs.device)
    last, kept = probs[sequences, length], share[sequences, length]
    residual = (kept[:, None] * last - draft_probs[sequences, length.clamp_max(k - 1)]).clamp_min_(0.0)
    return length, torch.where((length < k)[:, None], residual, last)


@pytest.mark.parametrize(("batch", "k"), CPU_ROUNDS)
def test_native(benchmark: BenchmarkFixture, report: Report, logits: Logits, batch: int, k: int) -> None:
    case = build_case(logits, "block", batch, k, NATIVE, top_p=TOP_P)
    case.check(NATIVE, reference)
    draft_probs = case.draft_probs(0)  # kept from when the draft drew; here the same for every turn

    def pytorch(turn: int) -> tuple[Tensor, Tensor]:
        this = case.round_at(turn)
        probs = top_p_probs(this.logits, TOP_P).view(batch, k + 1, -1)
        length, weights = accept_block(probs, this.draft_tokens, draft_probs)
        return torch.multinomial(weights, 1)[:, 0], length

    # The target's logits, and the draft's at the row that is drawn from. How many sums it takes, the drafts decide.
    num_bytes = ROW_BYTES * (batch * (k + 1) + batch)
    names = "block: softmax, sort, cumsum, gather, clamp, sum, multinomial"
    subject = Subject("filter_rows, block_verify", case.shape, "fp32", k, num_bytes, names)
    report.compare(benchmark, subject, partial(case.filter_and_verify, NATIVE), {"torch": pytorch})


@pytest.mark.parametrize(("batch", "k"), GPU_ROUNDS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_logits: Logits, batch: int, k: int
) -> None:
    case = build_case(gpu_logits, "block", batch, k, gpu.ops)
    case.check(gpu.ops, reference)
    stats = case.all_stats(gpu.ops)
    draft_probs = [case.draft_probs(turn) for turn in range(min(len(case.rounds), MAX_CALLS))]

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        return case.verify(gpu.ops, turn, stats[turn % len(stats)])

    def pytorch(logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor) -> tuple[Tensor, Tensor]:
        length, weights = accept_block(torch.softmax(logits, dim=-1), draft_tokens, draft_probs)
        return exponential_race(weights), length

    def given_at(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        this = case.round_at(turn)
        probs = draft_probs[turn % len(draft_probs)]
        return this.logits.view(batch, k + 1, -1), this.draft_tokens, probs

    # Every row of the target's logits and of the draft's, unless the whole draft is kept.
    subject = Subject(
        "block_verify",
        case.shape,
        "fp32",
        k,
        ROW_BYTES * batch * (2 * k + 1),
        "softmax, gather, clamp, sum, exponential_, argmax",
    )
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch, given_at), timer=gpu)
