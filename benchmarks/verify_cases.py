"""Logits to filter, draw from and verify, and what PyTorch does with them where it has no kernels for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cpu_timing import ROTATED_BYTES
from kernel_cases import random_logits, random_seeds
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.types.drafts import DraftLaw, Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

VOCAB_SIZE, PADDED_VOCAB_SIZE = 50257, 50304
ROW_BYTES = 4 * PADDED_VOCAB_SIZE
NUM_ROWS = ROTATED_BYTES // ROW_BYTES + 1
SEQ_LEN = 100
# Of the lossy rules: random logits give no token much.
ACCEPTANCE_THRESHOLD, ACCEPTANCE_DELTA = 0.01, 0.3
GPU_ROWS = (1, 9, 576)
# Sequences, and draft tokens of each.
CPU_ROUNDS = [*((1, k) for k in range(1, 9)), *((8, k) for k in (1, 2, 4, 8))]
GPU_ROUNDS = [(1, 1), (1, 4), (1, 8), (64, 8)]


@dataclass(frozen=True)
class Logits:
    """Rows of the target's and of a draft's logits, some noise apart; pad columns -inf."""

    target: Tensor
    draft: Tensor

    def rows_at(self, turn: int, rows: int) -> Tensor:
        """Other rows of the target's than in the turns before, `[rows, V]`."""
        first = turn % (NUM_ROWS // rows) * rows
        return self.target[first : first + rows]


def build_logits(device: torch.device) -> Logits:
    some = random_logits(64, PADDED_VOCAB_SIZE)
    noise = torch.randn(64, PADDED_VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 0.3
    blocks = []
    for block in (some, some + noise):
        block[:, VOCAB_SIZE:] = float("-inf")
        blocks.append(block.to(device).repeat(-(-NUM_ROWS // 64), 1)[:NUM_ROWS])
    return Logits(*blocks)


@dataclass(frozen=True)
class Draws:
    """What the draws of R rows depend on."""

    rows: SamplingRows
    positions: Tensor

    @staticmethod
    def build(
        rows: int,
        temperature: float,
        device: torch.device,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> Draws:
        drawn = SamplingRows.empty(rows, device)._replace(seeds=random_seeds(rows).to(device))
        for column, value in zip(drawn, (temperature, top_k, top_p, min_p), strict=False):
            column.fill_(value)
        positions = SEQ_LEN + torch.arange(rows, dtype=torch.int32, device=device)
        return Draws(drawn, positions)

    def scores(self, logits: Tensor) -> Tensor:
        """What each token has in the race for its row, in float64: without filters."""
        temperature = self.rows.temperature.double()[:, None]
        bits = rng.vocabulary_bits(
            self.rows.seeds,
            self.positions,
            rng.STREAM_TARGET,
            torch.zeros_like(self.positions),
            logits.shape[1],
        )
        scaled = logits.double() / torch.where(temperature > 0, temperature, 1.0)
        return torch.where(temperature > 0, scaled + rng.gumbel(bits, torch.float64), scaled)


def assert_wins(tokens: Tensor, logits: Tensor, draws: Draws, gap: float) -> None:
    """Each row's token has the best score, or one that rounding may take for it."""
    scores = draws.scores(logits)
    behind = scores.max(dim=-1).values - scores.gather(1, tokens.long()[:, None])[:, 0]
    assert float(behind.max()) < gap, f"{float(behind.max())} behind the best score"


@dataclass(frozen=True)
class Round:
    """What one call verifies: B sequences of k draft tokens. A point mass has no law."""

    logits: Tensor  # [B (k + 1), V]
    draft_tokens: Tensor  # [B, k]
    law: DraftLaw | None


@dataclass(frozen=True)
class Case:
    """Rounds in memory one behind the other, and the arguments and outputs that they share.

    mode: "greedy" and "coupled" (match), "rejection" and "point mass" (rejection with and without a draft's law),;
          "block" (with it), "threshold" and "typical" (which do not read it)
    rows: what `filter_rows` is given for each row of logits
    """

    mode: str
    batch: int
    k: int
    rounds: list[Round]
    rows: Draws
    row_start: Tensor
    num_draft: Tensor
    seq_len: Tensor
    rule: Rule
    judged_by: SamplingRows
    is_running: Tensor
    verdict: Verdict

    @property
    def shape(self) -> str:
        return f"{self.mode} V {VOCAB_SIZE}" + (f" batch {self.batch}" if self.batch > 1 else "")

    def round_at(self, turn: int) -> Round:
        return self.rounds[turn % len(self.rounds)]

    def filter(self, ops: Backend, turn: int) -> Tensor:
        return ops.filter_rows(self.round_at(turn).logits, self.rows.rows)

    def all_stats(self, ops: Backend) -> list[Tensor]:
        """What `filter` gives, for every turn."""
        return [self.filter(ops, turn) for turn in range(len(self.rounds))]

    def verify(self, ops: Backend, turn: int, stats: Tensor) -> tuple[Tensor, Tensor]:
        """tokens and num_accepted of the op that judges by the case's rule, overwritten by the next call."""
        this = self.round_at(turn)
        drafts = Drafts(self.row_start, self.seq_len, self.num_draft, this.draft_tokens, this.law)
        op = getattr(ops, self.rule.op)
        op(this.logits, stats, drafts, self.judged_by, self.is_running, self.verdict)
        return self.verdict.tokens, self.verdict.num_accepted

    def filter_and_verify(self, ops: Backend, turn: int) -> tuple[Tensor, Tensor]:
        return self.verify(ops, turn, self.filter(ops, turn))

    def draft_probs(self, turn: int) -> Tensor:
        """`[B, k, V]`; of a point mass, one-hot."""
        this = self.round_at(turn)
        if this.law is None:
            return F.one_hot(this.draft_tokens.long(), PADDED_VOCAB_SIZE).float()
        flat, stats = this.law.logits.flatten(0, 1), this.law.stats.flatten(0, 1)
        temperature = torch.ones(len(flat), device=flat.device)
        return filtered_log_probs(flat, temperature, stats).exp().view(this.law.logits.shape)

    def check(self, ops: Backend, reference: Backend) -> None:
        """Both emit the same."""
        results = []
        for backend in (ops, reference):
            self.verdict.error.fill_(-1)
            results.append([result.clone() for result in self.filter_and_verify(backend, 0)])
            assert not self.verdict.error.any()
        (tokens, num_accepted), (expected, num_expected) = results
        assert torch.equal(num_accepted, num_expected)
        is_emitted = torch.arange(self.k + 1, device=tokens.device) <= num_expected[:, None]
        assert torch.equal(tokens[is_emitted], expected[is_emitted])


def build_case(logits: Logits, mode: str, batch: int, k: int, ops: Backend, *, top_p: float = 1.0) -> Case:
    device = logits.target.device
    temperature = 0.0 if mode == "greedy" else 1.0
    num_rows = batch * (k + 1)
    sequences = Draws.build(batch, temperature, device)
    # A point mass is the draft's most likely token.
    proposal = Draws.build(batch * k, 0.0 if mode == "point mass" else temperature, device, top_p=top_p).rows
    positions = (SEQ_LEN + torch.arange(k, dtype=torch.int32, device=device)).repeat(batch)
    proposal = proposal._replace(seeds=sequences.rows.seeds.repeat_interleave(k))
    is_apart = mode not in ("greedy", "coupled", "point mass")
    stream, base = (rng.STREAM_DRAFT, SEQ_LEN) if is_apart else (rng.STREAM_TARGET, 0)
    rounds = []
    for first in range(0, NUM_ROWS - num_rows + 1, num_rows):
        rows = slice(first, first + num_rows)
        draft_logits = logits.draft[rows].view(batch, k + 1, PADDED_VOCAB_SIZE)[:, :k]
        flat = draft_logits.flatten(0, 1)
        stats = ops.filter_rows(flat, proposal)
        drawn = (proposal, positions, stream, torch.full_like(positions, base))
        tokens, log_probs = ops.sample_rows(flat, stats, *drawn)
        law = DraftLaw(log_probs.view(batch, k), draft_logits, stats.view(batch, k, 4))
        kept = None if mode == "point mass" else law
        rounds.append(Round(logits.target[rows], tokens.view(batch, k), kept))
    batch_column = torch.arange(batch, dtype=torch.int32, device=device)
    rules = {"greedy": Rule.MATCH, "coupled": Rule.MATCH, "point mass": Rule.REJECTION}
    rule = rules[mode] if mode in rules else Rule[mode.upper()]
    return Case(
        mode,
        batch,
        k,
        rounds,
        Draws.build(num_rows, temperature, device, top_p=top_p),
        row_start=batch_column * (k + 1),
        num_draft=torch.full_like(batch_column, k),
        seq_len=torch.full_like(batch_column, SEQ_LEN),
        rule=rule,
        judged_by=sequences.rows._replace(
            rule=torch.full_like(batch_column, int(rule)),
            acceptance_threshold=torch.full_like(sequences.rows.temperature, ACCEPTANCE_THRESHOLD),
            acceptance_delta=torch.full_like(sequences.rows.temperature, ACCEPTANCE_DELTA),
        ),
        is_running=torch.ones_like(batch_column),
        verdict=Verdict(
            torch.zeros(batch, k + 1, dtype=torch.int32, device=device),
            torch.zeros_like(batch_column),
            torch.zeros_like(batch_column),
        ),
    )


def top_p_probs(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = torch.sort(logits, dim=-1, descending=True)
    probs = torch.softmax(ordered, dim=-1)
    is_dropped = probs.cumsum(dim=-1) - probs >= top_p
    is_dropped = torch.zeros_like(is_dropped).scatter_(-1, order, is_dropped)
    return torch.softmax(logits.masked_fill(is_dropped, float("-inf")), dim=-1)


def accepted_length(is_accepted: Tensor) -> Tensor:
    return is_accepted.int().cumprod(dim=1).sum(dim=1)


def exponential_race(weights: Tensor) -> Tensor:
    """A draw from each row of weights, which are overwritten: what engines do instead of `multinomial`, which waits
    for the device."""
    return weights.div_(torch.empty_like(weights).exponential_()).argmax(dim=-1)
