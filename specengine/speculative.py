"""The round: propose, forward, verify, commit, observe. With nothing proposed it is plain decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specengine.drafters.base import Drafter, DraftProposal
from specengine.kernels.reference.expand_batch import row_owners
from specengine.ops import Backend
from specengine.runtime.batch import row_starts
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.state import BatchState, RunningBatch, apply_bias


@dataclass(frozen=True)
class RoundOutcome:
    """What a round decided.

    tokens:       `[B, k + 1]` int32: the accepted drafts, then the target's own token
    num_accepted: `[B]` int32, 0 … k; num_accepted + 1 tokens were emitted
    num_draft:    `[B]` int32, drafts that were judged
    error:        `[B]` int32, 1 where the target's logits were not a distribution (nothing of that row counts)
    logits:       `[R, V]` fp32, the target's raw logits; None where its draws decided
    row_start:    `[B]` int32, sequence b's first row of `logits`
    """

    tokens: Tensor
    num_accepted: Tensor
    num_draft: Tensor
    error: Tensor
    logits: Tensor | None
    row_start: Tensor


def run_round(batch: RunningBatch, state: BatchState, target: ModelRunner, drafter: Drafter) -> RoundOutcome:
    """One draft–verify–commit round over the running batch (Leviathan et al. 2023; Chen et al. 2023)."""
    proposal = drafter.propose(batch)
    state.stage(batch, proposal.tokens)
    outcome = judge(proposal, batch, target)
    state.commit(batch, outcome.tokens, outcome.num_accepted + 1)
    drafter.observe(batch, outcome.num_accepted)
    return outcome


def judge(proposal: DraftProposal, batch: RunningBatch, target: ModelRunner) -> RoundOutcome:
    """The target's one forward over the last committed token and the drafts, and what follows from it."""
    num_rows = proposal.num_tokens + 1
    where = (batch, batch.seq_len - 1, num_rows, num_rows)
    if batch.is_decided_by_draws:
        return match(*target.draw(*where), row_starts(num_rows), proposal, batch)
    stats = None
    if batch.bias is None:
        logits, stats = target.forward_stats(*where)
    else:
        logits = target.forward(*where)
    return verify(target.backend, logits, row_starts(num_rows), proposal, batch, stats)


def match(
    drawn: Tensor, drawn_error: Tensor, row_start: Tensor, proposal: DraftProposal, batch: RunningBatch
) -> RoundOutcome:
    """`verify` where the target has drawn already: row row_start[b] + i, `[R]` int32 each, decides seq_len[b] + i."""
    num_draft, k = proposal.num_tokens, proposal.tokens.shape[1]
    if k == 0:  # row b is sequence b's
        return RoundOutcome(
            drawn[:, None], torch.zeros_like(num_draft), num_draft, drawn_error, None, row_start
        )
    if drawn.numel() == num_draft.numel() * (k + 1):  # everybody drafted k: the rows are a rectangle
        tokens, error = drawn.view(-1, k + 1), drawn_error.view(-1, k + 1)
        is_match = tokens[:, :k] == proposal.tokens
    else:
        column = torch.arange(k + 1, device=drawn.device)
        row = (row_start[:, None] + column).clamp_max(drawn.numel() - 1)
        tokens, error = drawn[row], drawn_error[row]
        is_match = (tokens[:, :k] == proposal.tokens) & (column[:k] < num_draft[:, None])
    num_accepted = is_match.cumprod(dim=1).sum(dim=1, dtype=torch.int32)
    is_bad = error.cummax(dim=1).values.gather(1, num_accepted[:, None].long())[:, 0]
    return RoundOutcome(tokens, num_accepted, num_draft, is_bad, None, row_start)


def verify(
    backend: Backend,
    logits: Tensor,
    row_start: Tensor,
    proposal: DraftProposal,
    batch: RunningBatch,
    stats: Tensor | None = None,
) -> RoundOutcome:
    """Judges a proposal by the target's logits: row row_start[b] + i decides position seq_len[b] + i.

    Greedy and coupled sequences, and those without a draft, match the target's own draw; the others use
    rejection sampling. stats: `[R, 4]` of the logits (`filter_rows`) where they are known and nobody has a bias.
    """
    num_draft = proposal.num_tokens
    biased = apply_bias(logits, batch, row_start, num_draft + 1, batch.seq_len)
    if stats is None:
        owner = row_owners(num_draft + 1)
        filters = (batch.temperature[owner], batch.top_k[owner], batch.top_p[owner], batch.min_p[owner])
        stats = backend.filter_rows(biased, *filters)
    outcome = RoundOutcome(
        tokens=batch.seq_len.new_zeros(batch.size, proposal.tokens.shape[1] + 1),
        num_accepted=torch.zeros_like(num_draft),
        num_draft=num_draft,
        error=torch.zeros_like(num_draft),
        logits=logits,
        row_start=row_start,
    )
    by_rejection = batch.uses_rejection & (num_draft > 0)
    drafts = (row_start, num_draft, proposal.tokens)
    keys = (batch.temperature, batch.seeds, batch.seq_len)
    results = (outcome.tokens, outcome.num_accepted, outcome.error)
    backend.match_verify(biased, stats, *drafts, *keys, ~by_rejection, *results)
    if batch.has_rejection:
        log_probs = proposal.log_probs
        if log_probs is None:  # a point mass
            log_probs = torch.zeros_like(proposal.tokens, dtype=torch.float32)
        law = (log_probs, proposal.logits, proposal.stats)
        backend.rejection_verify(biased, stats, *drafts, *law, *keys, by_rejection, *results)
    return outcome
