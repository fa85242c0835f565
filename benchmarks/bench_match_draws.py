"""match_draws: k drafts judged by what the target has drawn."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import MAX_CALLS, Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import VOCAB_SIZE, accepted_length

from specengine.kernels import reference
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows

ACCEPTANCE = 0.7


def pytorch_match(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
) -> None:
    """The reference without waiting for the device; of the tokens all are written, and every sequence runs."""
    k = drafts.tokens.shape[1]
    offset = torch.arange(k + 1, device=drawn.device)
    at = drafts.row_start[:, None] + torch.minimum(offset, drafts.num_draft[:, None])
    draws = drawn[at]
    is_match = (draws[:, :k] == drafts.tokens) & (offset[:k] < drafts.num_draft[:, None])
    accepted = accepted_length(is_match)
    verdict.tokens.copy_(draws)
    verdict.num_accepted.copy_(accepted)
    verdict.error.copy_(((drawn_error[at] != 0) & (offset <= accepted[:, None])).any(dim=1))


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_gpu(benchmark: BenchmarkFixture, report: Report, gpu: Gpu, batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (MAX_CALLS, batch * (k + 1))
    drawn = torch.randint(VOCAB_SIZE, shape, generator=generator, dtype=torch.int32)
    is_wrong = torch.rand(MAX_CALLS, batch, k, generator=generator) > ACCEPTANCE
    drafts = (drawn.view(MAX_CALLS, batch, k + 1)[:, :, :k] + is_wrong).int().to(gpu.device)
    drawn = drawn.to(gpu.device)
    drawn_error = torch.zeros_like(drawn)
    row_start = torch.arange(0, batch * (k + 1), k + 1, dtype=torch.int32, device=gpu.device)
    num_draft, is_running = torch.full_like(row_start, k), torch.ones_like(row_start)
    tokens = row_start.new_zeros(batch, k + 1)
    outputs = Verdict(tokens, torch.zeros_like(row_start), torch.zeros_like(row_start))
    rows = SamplingRows.empty(batch, gpu.device)

    def arguments(turn: int) -> tuple[Tensor, Tensor, Drafts, SamplingRows, Tensor, Verdict]:
        index = turn % MAX_CALLS
        judged = Drafts(row_start, row_start, num_draft, drafts[index])
        return drawn[index], drawn_error[index], judged, rows, is_running, outputs

    def ours(turn: int) -> None:
        gpu.ops.match_draws(*arguments(turn))

    results = []
    for op in (reference.match_draws, gpu.ops.match_draws, pytorch_match):
        op(*arguments(0))
        results.append([output.clone() for output in outputs])
    (expected, num_expected, no_error), *others = results
    is_emitted = torch.arange(k + 1, device=gpu.device) <= num_expected[:, None]
    for emitted, num_accepted, error in others:
        assert torch.equal(num_accepted, num_expected)
        assert torch.equal(error, no_error)
        assert torch.equal(emitted[is_emitted], expected[is_emitted])

    num_bytes = 4 * batch * (4 * (k + 1) + 5)
    subject = Subject("match_draws", f"batch {batch}", "", k, num_bytes, "gather, ==, cumprod, sum, copy")
    report.compare(benchmark, subject, ours, pytorch_rivals(pytorch_match, arguments), timer=gpu)
