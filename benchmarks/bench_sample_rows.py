"""sample_rows: a draw from each row over GPT-2's vocabulary."""

from __future__ import annotations

import flashinfer_rivals
import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import GPU_ROWS, ROW_BYTES, VOCAB_SIZE, Draws, Logits, assert_wins, exponential_race

from specengine import rng
from specengine.kernels import reference

GAP = 1e-3  # of the race's two best, which the device's fast logarithm may exchange


def pytorch_sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(dim=-1)
    tokens = exponential_race(log_probs.exp())
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("rows", GPU_ROWS)
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_logits: Logits, rows: int) -> None:
    draws = Draws.build(rows, 1.0, gpu.device)
    base = torch.zeros_like(draws.positions)

    def logits_at(turn: int) -> Tensor:
        return gpu_logits.rows_at(turn, rows)

    stats = reference.filter_rows(logits_at(0), draws.rows)  # of which only the threshold matters here, -inf

    def ours(turn: int) -> tuple[Tensor, Tensor]:
        drawn = (draws.rows, draws.positions, rng.STREAM_TARGET, base)
        return gpu.ops.sample_rows(logits_at(turn), stats, *drawn)

    tokens, log_probs = ours(0)
    assert_wins(tokens, logits_at(0), draws, GAP)
    expected = logits_at(0).double().log_softmax(dim=-1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=0.0, atol=1e-4)

    rivals = pytorch_rivals(pytorch_sample, lambda turn: (logits_at(turn),))
    rivals |= flashinfer_rivals.sample(logits_at, lambda turn, tokens: tokens)
    subject = Subject(
        "sample_rows",
        f"V {VOCAB_SIZE}",
        "fp32",
        rows,
        ROW_BYTES * rows,
        "log_softmax, exp, exponential_, argmax, gather",
        "sampling_from_logits (without the log-probability)",
    )
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
