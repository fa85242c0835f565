"""token_logprobs: of given tokens and of the most likely ones, over GPT-2's vocabulary."""

from __future__ import annotations

import pytest
import torch
from gpu_timing import Gpu, pytorch_rivals
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from verify_cases import GPU_ROWS, ROW_BYTES, VOCAB_SIZE, Logits

from specengine.kernels import reference


def pytorch_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = logits.log_softmax(dim=-1)
    values, ids = log_probs.topk(num_top, dim=-1)
    return log_probs.gather(1, token_ids.long()[:, None])[:, 0], ids, values


@pytest.mark.parametrize("rows", GPU_ROWS)
@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_gpu(
    benchmark: BenchmarkFixture, report: Report, gpu: Gpu, gpu_logits: Logits, num_top: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(VOCAB_SIZE, (rows,), generator=generator, dtype=torch.int32).to(gpu.device)

    def arguments(turn: int) -> tuple[Tensor, Tensor, int]:
        return gpu_logits.rows_at(turn, rows), token_ids, num_top

    def ours(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        return gpu.ops.token_logprobs(*arguments(turn))

    (chosen, ids, values), expected = ours(0), reference.token_logprobs(*arguments(0))
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close((chosen, values), (expected[0], expected[2]), rtol=1e-6, atol=1e-5)

    rivals = pytorch_rivals(pytorch_logprobs, arguments)
    shape = f"top {num_top} V {VOCAB_SIZE}"
    subject = Subject("token_logprobs", shape, "fp32", rows, ROW_BYTES * rows, "log_softmax, topk, gather")
    report.compare(benchmark, subject, ours, rivals, timer=gpu)
