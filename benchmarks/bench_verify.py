"""Verification of k draft tokens over GPT-2's vocabulary, filters included: greedy, coupled, rejection with top-p.

PyTorch's side does what engines do without kernels of their own: softmax, sort and cumulative sum for top-p,
exponential noise or `multinomial` for draws, `cumprod` for the accepted length. The logits, which a model would
have just written, come from memory, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_cases import NATIVE, random_logits, random_seeds
from measure import ROTATED_BYTES, Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.reference.filter_rows import filtered_log_probs

VOCAB_SIZE, PADDED = 50257, 50304
MODES = ("greedy", "coupled", "rejection")
TOP_P = 0.9
SEQ_LEN = 100
NUM_ROWS = ROTATED_BYTES // (4 * PADDED) + 1


@dataclass(frozen=True)
class Logits:
    """Rows of the target's and of a draft's logits, some noise apart; pad columns -inf."""

    target: Tensor
    draft: Tensor


@pytest.fixture(scope="module")
def logits() -> Logits:
    target = torch.empty(NUM_ROWS, PADDED)
    draft = torch.empty(NUM_ROWS, PADDED)
    some = random_logits(64, PADDED)
    noise = torch.randn(64, PADDED, generator=torch.Generator().manual_seed(1)) * 0.3
    for first in range(0, NUM_ROWS, 64):
        count = min(64, NUM_ROWS - first)
        target[first : first + count] = some[:count]
        draft[first : first + count] = some[:count] + noise[:count]
    for rows in (target, draft):
        rows[:, VOCAB_SIZE:] = float("-inf")
    return Logits(target, draft)


@dataclass(frozen=True)
class Round:
    """What one call verifies: B sequences of k draft tokens."""

    logits: Tensor  # [B (k + 1), V]
    draft_logits: Tensor  # [B, k, V]
    draft_stats: Tensor  # [B, k, 4]
    draft_tokens: Tensor  # [B, k]
    draft_log_probs: Tensor  # [B, k]


@dataclass(frozen=True)
class Case:
    mode: str
    batch: int
    k: int
    seeds: Tensor
    rounds: list[Round]

    @property
    def temperature(self) -> Tensor:
        return torch.full((self.batch,), 0.0 if self.mode == "greedy" else 1.0)

    def verify(self, ops, turn: int) -> tuple[Tensor, Tensor]:
        """(tokens, num_accepted) of the ops `filter_rows` and `match_verify` or `rejection_verify`."""
        this = self.rounds[turn % len(self.rounds)]
        batch, k, num_rows = self.batch, self.k, this.logits.shape[0]
        per_row = self.temperature.repeat_interleave(k + 1)
        stats = ops.filter_rows(this.logits, per_row, *filters(self.mode, num_rows))
        tokens = torch.zeros(batch, k + 1, dtype=torch.int32)
        num_accepted, error = torch.zeros(2, batch, dtype=torch.int32)
        draft = (this.draft_log_probs, this.draft_logits, this.draft_stats)
        op = ops.rejection_verify if self.mode == "rejection" else ops.match_verify
        op(
            this.logits,
            stats,
            torch.arange(batch, dtype=torch.int32) * (k + 1),
            torch.full((batch,), k, dtype=torch.int32),
            this.draft_tokens,
            *(draft if self.mode == "rejection" else ()),
            self.temperature,
            self.seeds,
            torch.full((batch,), SEQ_LEN, dtype=torch.int32),
            torch.ones(batch, dtype=torch.bool),
            tokens,
            num_accepted,
            error,
        )
        assert not error.any()
        return tokens, num_accepted


def filters(mode: str, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """top_k, top_p, min_p."""
    top_p = TOP_P if mode == "rejection" else 1.0
    return torch.zeros(num_rows).int(), torch.full((num_rows,), top_p), torch.zeros(num_rows)


def build_case(logits: Logits, mode: str, batch: int, k: int) -> Case:
    seeds = random_seeds(batch)
    temperature = torch.full((batch * k,), 0.0 if mode == "greedy" else 1.0)
    stream = rng.STREAM_DRAFT if mode == "rejection" else rng.STREAM_TARGET
    base = torch.full((batch * k,), SEQ_LEN if mode == "rejection" else 0, dtype=torch.int32)
    positions = (SEQ_LEN + torch.arange(k, dtype=torch.int32)).repeat(batch)
    rounds = []
    for first in range(0, NUM_ROWS - batch * (k + 1) + 1, batch * (k + 1)):
        rows = slice(first, first + batch * (k + 1))
        draft_logits = logits.draft[rows].view(batch, k + 1, PADDED)[:, :k]
        flat = draft_logits.flatten(0, 1)
        stats = NATIVE.filter_rows(flat, temperature, *filters(mode, batch * k))
        tokens, log_probs = NATIVE.sample_rows(
            flat, stats, temperature, seeds.repeat_interleave(k), positions, stream, base
        )
        rounds.append(
            Round(
                logits.target[rows],
                draft_logits,
                stats.view(batch, k, 4),
                tokens.view(batch, k),
                log_probs.view(batch, k),
            )
        )
    return Case(mode, batch, k, seeds, rounds)


def accepted_length(is_accepted: Tensor) -> Tensor:
    return is_accepted.int().cumprod(dim=1).sum(dim=1)


def pytorch_match(case: Case, turn: int) -> tuple[Tensor, Tensor]:
    this = case.rounds[turn % len(case.rounds)]
    scores = this.logits
    if case.mode == "coupled":
        probs = torch.softmax(this.logits, dim=-1)
        scores = probs.div_(torch.empty_like(probs).exponential_())
    tokens = scores.argmax(dim=-1).view(case.batch, case.k + 1)
    return tokens, accepted_length(tokens[:, : case.k] == this.draft_tokens)


def top_p_probs(logits: Tensor) -> Tensor:
    ordered, order = torch.sort(logits, dim=-1, descending=True)
    probs = torch.softmax(ordered, dim=-1)
    is_dropped = probs.cumsum(dim=-1) - probs >= TOP_P
    is_dropped = torch.zeros_like(is_dropped).scatter_(-1, order, is_dropped)
    return torch.softmax(logits.masked_fill(is_dropped, float("-inf")), dim=-1)


def pytorch_rejection(case: Case, draft_probs: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """With the draft's probabilities kept from when it drew; here the same for every turn."""
    this = case.rounds[turn % len(case.rounds)]
    probs = top_p_probs(this.logits).view(case.batch, case.k + 1, -1)
    chosen = this.draft_tokens.long()[..., None]
    p, q = probs[:, : case.k].gather(2, chosen)[..., 0], draft_probs.gather(2, chosen)[..., 0]
    length = accepted_length(torch.rand_like(p) * q <= p)
    sequences = torch.arange(case.batch)
    last = probs[sequences, length]
    residual = (last - draft_probs[sequences, length.clamp_max(case.k - 1)]).clamp_min_(0.0)
    weights = torch.where((length < case.k)[:, None], residual, last)
    return torch.multinomial(weights, 1)[:, 0], length


@pytest.mark.parametrize(("batch", "k"), [*((1, k) for k in range(1, 9)), *((8, k) for k in (1, 2, 4, 8))])
@pytest.mark.parametrize("mode", MODES)
def test_verify(
    benchmark: BenchmarkFixture, report: Report, logits: Logits, mode: str, batch: int, k: int
) -> None:
    case = build_case(logits, mode, batch, k)
    (tokens, num_accepted), (expected, num_expected) = (case.verify(ops, 0) for ops in (NATIVE, reference))
    assert torch.equal(num_accepted, num_expected)
    is_emitted = torch.arange(k + 1) <= num_expected[:, None]
    assert torch.equal(tokens[is_emitted], expected[is_emitted])
    if mode == "rejection":
        first = case.rounds[0]
        flat, flat_stats = first.draft_logits.flatten(0, 1), first.draft_stats.flatten(0, 1)
        draft_probs = filtered_log_probs(flat, torch.ones(batch * k), flat_stats).exp().view(batch, k, -1)

    def pytorch(turn: int) -> tuple[Tensor, Tensor]:
        if mode == "rejection":
            return pytorch_rejection(case, draft_probs, turn)
        return pytorch_match(case, turn)

    # The target's logits, and the draft's at the row of the first rejection.
    num_bytes = 4 * PADDED * (batch * (k + 1) + (batch if mode == "rejection" else 0))
    side = {
        "greedy": "argmax, cumprod",
        "coupled": "softmax, exponential_, argmax, cumprod",
        "rejection": "softmax, sort, cumsum, gather, multinomial",
    }
    op = "rejection_verify" if mode == "rejection" else "match_verify"
    shape = f"{mode} V {VOCAB_SIZE}" + (f" batch {batch}" if batch > 1 else "")
    subject = Subject(f"filter_rows, {op}", shape, "fp32", k, num_bytes, f"{mode}: {side[mode]}")
    report.compare(benchmark, subject, lambda turn: case.verify(NATIVE, turn), pytorch)
