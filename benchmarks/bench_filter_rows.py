"""filter_rows: thresholds and normalisers of rows over GPT-2's vocabulary."""

from __future__ import annotations

import math

import flashinfer_rivals
import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import GPU_ROWS, ROW_BYTES, VOCAB_SIZE, Draws, Logits

from specengine.kernels import reference

# temperature, top_k, top_p, min_p
SETTINGS = {
    "unfiltered": (1.0, 0, 1.0, 0.0),
    "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0),
    "top-k 50, top-p 0.9, min-p 0.02": (1.0, 50, 0.9, 0.02),
}


def pytorch_filter(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(max, threshold, log-normaliser) `[R, 3]`."""
    values = logits / temperature
    maximum = values.amax(dim=-1)
    threshold = torch.full_like(maximum, float("-inf"))
    if top_k > 0 or top_p < 1.0:
        ordered = values.topk(top_k).values if top_k > 0 else values.sort(dim=-1, descending=True).values
        probs = ordered.softmax(dim=-1)
        num_kept = (probs.cumsum(dim=-1) - probs < top_p).sum(dim=-1, keepdim=True)
        threshold = ordered.gather(-1, num_kept - 1)[:, 0]
    if min_p > 0.0:
        threshold = torch.maximum(threshold, maximum + math.log(min_p))
    kept = values.masked_fill(values < threshold[:, None], float("-inf"))
    return torch.stack((maximum, threshold, kept.logsumexp(dim=-1)), dim=-1)


@pytest.mark.parametrize("rows", GPU_ROWS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_logits: Logits, setting: str, rows: int
) -> None:
    temperature, top_k, top_p, min_p = SETTINGS[setting]
    law = Draws.build(rows, temperature, gpu.device, top_k=top_k, top_p=top_p, min_p=min_p).rows

    def logits_at(turn: int) -> Tensor:
        return gpu_logits.rows_at(turn, rows)

    def ours(turn: int) -> Tensor:
        return gpu.ops.filter_rows(logits_at(turn), law)

    actual, expected = ours(0), reference.filter_rows(logits_at(0), law)
    assert torch.equal(actual[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    torch.testing.assert_close(actual[:, 2], expected[:, 2], rtol=1e-6, atol=0.0)

    rivals = pytorch_rivals(pytorch_filter, lambda turn: (logits_at(turn), *SETTINGS[setting]))
    rivals |= flashinfer_rivals.renormalise(logits_at, top_k, top_p)
    subject = Subject(
        "filter_rows",
        f"{setting} V {VOCAB_SIZE}",
        "fp32",
        rows,
        ROW_BYTES * rows,
        "amax, topk or sort, softmax, cumsum, gather, logsumexp: what the filter needs",
        "softmax, top_k_renorm_probs, top_p_renorm_probs: what the filter needs, without min-p",
    )
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
