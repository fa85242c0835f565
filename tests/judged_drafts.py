"""Drafts to judge, for the ops that verify by probabilities, and what float64 says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from kernel_cases import NATIVE, NEGATIVE_INFINITY, random_logits, random_seeds
from torch import Tensor

from specengine import rng
from specengine.kernels.types.drafts import DraftLaw, Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule

UNTOUCHED = -77
OFF = (0, 1.0, 0.0)


@dataclass(frozen=True)
class Case:
    logits: Tensor
    stats: Tensor
    row_start: Tensor
    num_draft: Tensor
    draft_tokens: Tensor
    draft_log_probs: Tensor
    draft_logits: Tensor | None
    draft_stats: Tensor | None
    temperature: Tensor
    seeds: Tensor
    seq_len: Tensor
    is_selected: Tensor
    has_law: Tensor | None = None
    rule: Rule = Rule.REJECTION
    acceptance_threshold: Tensor | None = None
    acceptance_delta: Tensor | None = None

    def run(self, op) -> tuple[Tensor, Tensor, Tensor]:
        count, k = self.draft_tokens.shape
        outputs = (
            torch.full((count, k + 1), UNTOUCHED, dtype=torch.int32),
            torch.full((count,), UNTOUCHED, dtype=torch.int32),
            torch.full((count,), UNTOUCHED, dtype=torch.int32),
        )
        fields = [field for field in vars(self).values() if isinstance(field, Tensor)]
        before = [field.clone() for field in fields]
        op(*self.arguments, Verdict(*outputs))
        for field, copy in zip(fields, before, strict=True):
            assert torch.equal(field.nan_to_num(), copy.nan_to_num())
        return outputs

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Drafts, SamplingRows, Tensor]:
        """A sequence that is not selected does not run, or is another rule's."""
        law = None
        if self.draft_logits is not None and self.draft_stats is not None:
            law = DraftLaw(self.draft_log_probs, self.draft_logits, self.draft_stats, self.has_law)
        drafts = Drafts(self.row_start, self.seq_len, self.num_draft, self.draft_tokens, law)
        is_other = ~self.is_selected & (torch.arange(len(self.seeds)) % 2 == 0)
        rows = SamplingRows.empty(len(self.seeds))._replace(
            temperature=self.temperature,
            seeds=self.seeds,
            rule=torch.where(is_other, int(Rule.MATCH), int(self.rule)).int(),
        )
        for name in ("acceptance_threshold", "acceptance_delta"):
            if (column := getattr(self, name)) is not None:
                rows = rows._replace(**{name: column})
        return self.logits, self.stats, drafts, rows, (self.is_selected | is_other).int()

    def drafting(self) -> Case:
        """Who drafts nothing is not judged by this rule."""
        return replace(self, is_selected=self.is_selected & (self.num_draft > 0))

    def take(self, chosen: Tensor) -> Case:
        of_sequences = {
            name: value[chosen]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in ("logits", "stats")
        }
        return replace(self, **of_sequences)


def filtered(logits: Tensor, temperature: Tensor, setting: tuple[int, float, float]) -> Tensor:
    rows = SamplingRows.empty(logits.shape[0])
    top_k, top_p, min_p = (torch.full_like(*each) for each in zip(rows[1:4], setting, strict=True))
    return NATIVE.filter_rows(
        logits, rows._replace(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    )


def drawn_by(temperature: Tensor, seeds: Tensor) -> SamplingRows:
    return SamplingRows.empty(len(seeds))._replace(temperature=temperature, seeds=seeds)


def build_case(
    count: int,
    k: int,
    vocab_size: int,
    draft_vocab_size: int | None = None,
    seed: int = 0,
    settings: tuple = (OFF, OFF),
    has_law: bool = True,
    temperatures: tuple[float, ...] = (1.0, 0.7, 1.5),
    rule: Rule = Rule.REJECTION,
) -> Case:
    """Row b (k + 2) + i holds logits near the draft's; draft tokens are drawn from the draft's filtered law."""
    generator = torch.Generator().manual_seed(seed)
    draft_vocab_size = draft_vocab_size or vocab_size
    logits = random_logits(count * (k + 2), vocab_size, seed, 1.5)
    temperature = torch.tensor(temperatures)[
        torch.randint(0, len(temperatures), (count,), generator=generator)
    ]
    stats = filtered(logits, temperature.repeat_interleave(k + 2), settings[0])
    near = logits.view(count, k + 2, vocab_size)[:, :k, : min(vocab_size, draft_vocab_size)]
    draft_logits = torch.full((count, k, draft_vocab_size), -60.0)
    draft_logits[:, :, : near.shape[2]] = near
    draft_logits += torch.randn(draft_logits.shape, generator=generator)
    flat, flat_temperature = draft_logits.view(count * k, -1), temperature.repeat_interleave(k)
    draft_stats = filtered(flat, flat_temperature, settings[1])
    seq_len = torch.randint(1, 10000, (count,), generator=generator, dtype=torch.int32)
    seeds = random_seeds(count, seed)
    positions = (seq_len[:, None] + torch.arange(k)).flatten().int()
    tokens, log_probs = NATIVE.sample_rows(
        flat,
        draft_stats,
        drawn_by(flat_temperature, seeds.repeat_interleave(k)),
        positions,
        rng.STREAM_DRAFT,
        seq_len.repeat_interleave(k),
    )
    if not has_law:
        log_probs = torch.zeros_like(log_probs)
    return Case(
        logits,
        stats,
        (torch.arange(count) * (k + 2)).int(),
        torch.randint(0, k + 1, (count,), generator=generator, dtype=torch.int32),
        tokens.view(count, k),
        log_probs.view(count, k),
        draft_logits if has_law else None,
        draft_stats.view(count, k, 4) if has_law else None,
        temperature,
        seeds,
        seq_len,
        torch.rand(count, generator=generator) < 0.875,
        rule=rule,
    ).drafting()


def exact_log_probs(logits: Tensor, stats: Tensor, temperature: Tensor) -> Tensor:
    scaled = logits / temperature[:, None]
    kept = scaled.masked_fill(scaled < stats[:, 1, None], NEGATIVE_INFINITY).double()
    return kept - kept.logsumexp(-1, keepdim=True)


class Exact(NamedTuple):
    """A case in float64.

    log_p:      `[B, k + 1, V]`
    log_q:      `[B, k, V]`; of a point mass, 0 at its token
    log_p_drafted, log_q_drafted: `[B, k]`, of the drafts; log q as the case claims it
    u:          `[B, k]`
    is_drafted: `[B, k]`
    """

    log_p: Tensor
    log_q: Tensor
    log_p_drafted: Tensor
    log_q_drafted: Tensor
    u: Tensor
    is_drafted: Tensor


class Decision(NamedTuple):
    """What a rule decides.

    num_accepted: `[B]`
    is_clear:     `[B]`, whether no test is closer than what fp32 can resolve
    log_weight:   `[B, V]` that the next token is drawn by
    """

    num_accepted: Tensor
    is_clear: Tensor
    log_weight: Tensor


def exactly(case: Case) -> Exact:
    count, k = case.draft_tokens.shape
    vocab_size = case.logits.shape[1]
    rows = case.row_start[:, None].long() + torch.arange(k + 1)
    flat_temperature = case.temperature.repeat_interleave(k + 1)
    log_p = exact_log_probs(case.logits[rows.flatten()], case.stats[rows.flatten()], flat_temperature)
    log_p = log_p.view(count, k + 1, vocab_size)
    positions = case.seq_len[:, None] + torch.arange(k)
    base = case.seq_len[:, None].expand(-1, k)
    u = rng.uniform(rng.accept_bits(case.seeds[:, None].expand(-1, k), positions, base), torch.float64)
    chosen = case.draft_tokens.long()[:, :, None]
    inside = chosen.clamp(0, vocab_size - 1)
    log_p_drafted = log_p[:, :k].gather(2, inside).masked_fill(inside != chosen, -math.inf)[:, :, 0]
    log_q_drafted = case.draft_log_probs.double()
    log_q = torch.full((count, k, vocab_size), NEGATIVE_INFINITY, dtype=torch.float64)
    log_q.scatter_(2, inside, 0.0)
    if case.draft_logits is not None:
        drawn_from = exact_log_probs(
            case.draft_logits.flatten(0, 1),
            case.draft_stats.flatten(0, 1),
            case.temperature.repeat_interleave(k),
        ).view(count, k, -1)
        missing = max(0, vocab_size - drawn_from.shape[2])
        drawn_from = torch.nn.functional.pad(drawn_from, (0, missing), value=NEGATIVE_INFINITY)
        has_law = torch.ones(count, dtype=torch.bool) if case.has_law is None else case.has_law
        log_q = torch.where(has_law[:, None, None], drawn_from[:, :, :vocab_size], log_q)
        log_q_drafted = torch.where(has_law[:, None], log_q_drafted, 0.0)
    is_drafted = torch.arange(k)[None] < case.num_draft[:, None]
    return Exact(log_p, log_q, log_p_drafted, log_q_drafted, u, is_drafted)


def residual_log_weights(log_p: Tensor, log_q: Tensor, is_residual: Tensor) -> Tensor:
    """log max(p - q, 0) of the rows that say so and have something left, else log p. All `[B, …]`."""
    residual = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    is_residual = is_residual & (residual.sum(dim=1) > 1e-6)
    return torch.where(is_residual[:, None], residual.log(), log_p)


def check_decisions(op: Callable[..., None], case: Case, judge: Callable[[Exact], Decision]) -> None:
    """Every decision is float64's wherever float64's margin exceeds what fp32 logits near -60 can resolve."""
    count, k = case.draft_tokens.shape
    vocab_size = case.logits.shape[1]
    expected, is_clear, log_weight = judge(exactly(case))
    is_clear = is_clear & case.is_selected

    tokens, num_accepted, error = case.run(op)
    assert torch.equal(num_accepted[is_clear].long(), expected[is_clear])
    assert (num_accepted[~case.is_selected] == UNTOUCHED).all()
    assert (tokens[~case.is_selected] == UNTOUCHED).all()
    assert (error[case.is_selected] == 0).all()
    column = torch.arange(k + 1)[None]
    is_prefix = (column[:, :k] < expected[:, None]) & is_clear[:, None]
    assert torch.equal(tokens[:, :k][is_prefix], case.draft_tokens[is_prefix])
    assert (tokens[(column > expected[:, None]) & is_clear[:, None]] == UNTOUCHED).all()

    bits = rng.vocabulary_bits(case.seeds, case.seq_len + expected, 0, torch.zeros(count), vocab_size)
    scores = log_weight + rng.gumbel(bits, torch.float64)
    best = scores.max(dim=1)
    drawn = tokens.gather(1, expected[:, None])[:, 0].long()
    won = scores.gather(1, drawn.clamp(0, vocab_size - 1)[:, None])[:, 0]
    # A residual next to zero carries the cancellation of p - q.
    is_won = won >= best.values - 1e-3
    assert (is_won | ~is_clear).all()
    assert (((drawn >= 0) & (drawn < vocab_size)) | ~is_clear).all()
    share = float((drawn == best.indices)[is_clear].double().mean())
    assert share > 0.99, share
    assert float(is_clear[case.is_selected].double().mean()) > 0.98
    assert (expected[is_clear] > 0).any(), "nothing was accepted"
    assert (expected < case.num_draft)[is_clear].any(), "nothing was rejected"
