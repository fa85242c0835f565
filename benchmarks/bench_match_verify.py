"""match_verify: greedy and coupled verification of k draft tokens over GPT-2's vocabulary; on the CPU with the filter.

The logits, which a model would have just written, come from memory, as everywhere here.
"""

from __future__ import annotations

from functools import partial

import flashinfer_rivals
import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
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
)

from specengine.kernels import reference

MODES = {
    "greedy": "greedy: argmax, cumprod",
    "coupled": "coupled: softmax, exponential_, argmax, cumprod",
}
# One launch: the target of the op alone.
TARGET_US = {1: 3.0, 64: 33.0}


def pytorch_match(logits: Tensor, draft_tokens: Tensor, is_greedy: bool) -> tuple[Tensor, Tensor]:
    tokens = logits.argmax(dim=-1) if is_greedy else exponential_race(torch.softmax(logits, dim=-1))
    tokens = tokens.view(draft_tokens.shape[0], -1)
    return tokens, accepted_length(tokens[:, :-1] == draft_tokens)


@pytest.mark.parametrize(("batch", "k"), CPU_ROUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_native(
    benchmark: BenchmarkFixture, report: Report, logits: Logits, mode: str, batch: int, k: int
) -> None:
    case = build_case(logits, mode, batch, k, NATIVE)
    case.check(NATIVE, reference)

    def pytorch(turn: int) -> tuple[Tensor, Tensor]:
        this = case.round_at(turn)
        return pytorch_match(this.logits, this.draft_tokens, mode == "greedy")

    num_bytes = ROW_BYTES * batch * (k + 1)
    subject = Subject("filter_rows, match_verify", case.shape, "fp32", k, num_bytes, MODES[mode])
    report.compare(benchmark, subject, lambda turn: case.filter_and_verify(NATIVE, turn), {"torch": pytorch})


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

    def alone(turn: int) -> tuple[Tensor, Tensor]:
        return case.verify(gpu.ops, turn, stats[turn % len(stats)])

    def arguments(turn: int) -> tuple[Tensor, Tensor, bool]:
        this = case.round_at(turn)
        return this.logits, this.draft_tokens, mode == "greedy"

    def compare(turn: int, tokens: Tensor) -> Tensor:
        drafted = case.round_at(turn).draft_tokens
        return accepted_length(tokens.view(batch, k + 1)[:, :k] == drafted)

    rivals = pytorch_rivals(pytorch_match, arguments)
    if mode == "coupled":
        rivals |= flashinfer_rivals.sample(lambda turn: case.round_at(turn).logits, compare)
    subject = Subject(
        "filter_rows, match_verify" if with_filter else "match_verify",
        case.shape,
        "fp32",
        k,
        ROW_BYTES * batch * (k + 1),
        MODES[mode],
        "coupled: sampling_from_logits, cumprod",
        None if with_filter else TARGET_US[batch],
    )
    ours = partial(case.filter_and_verify, gpu.ops) if with_filter else alone
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
