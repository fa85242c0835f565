"""The round: propose, forward, verify, commit. With nothing proposed it is plain decoding.

A round reads and writes device state only, at places that depend on the batch's size, its k and its mode: what is
recorded once can be replayed (`specengine.engine.rounds`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from specengine import ranges
from specengine.drafters.base import DraftProposal, RoundDrafter
from specengine.errors import blame
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.program import JudgedLogits
from specengine.kernels.types.round import BoundRound, RoundTensors, StateTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.logits.processors import process
from specengine.ops.backend import Backend
from specengine.ops.interpreter import row_keys
from specengine.runtime.batch import Feed, FirstForward
from specengine.runtime.model_runner import ModelRunner, draw_keys
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RunningBatch


class RoundOutcome(NamedTuple):
    """What a round decided.

    tokens:       `[B, k + 1]` int32: the accepted drafts, then the target's own token
    num_accepted: `[B]` int32, 0 … k; num_accepted + 1 tokens were emitted
    num_draft:    `[B]` int32, drafts that were judged
    error:        `[B]` int32, 1 where the target's logits were not a distribution (nothing of that row counts)
    logits:       `[R, V]` fp32, the target's raw logits; None where its draws decided
    row_start:    `[B]` int32, sequence b's first row of `logits`
    drafts:       `[B, k]` int32, what was judged
    drawn, drawn_error: `[R]` int32, the target's draws where `commit` is yet to match drafts with them, and to write
                  tokens, num_accepted and error; else None
    """

    tokens: Tensor
    num_accepted: Tensor
    num_draft: Tensor
    error: Tensor
    logits: Tensor | None
    row_start: Tensor
    drafts: Tensor
    drawn: Tensor | None = None
    drawn_error: Tensor | None = None

    @property
    def verdict(self) -> Verdict:
        """What the op that judges writes."""
        return Verdict(self.tokens, self.num_accepted, self.error)


def run_round(
    batch: RunningBatch,
    state: BatchState,
    target: ModelRunner,
    drafter: RoundDrafter,
    *,
    mark: Callable[[], None] = lambda: None,
) -> tuple[RoundOutcome, Tensor]:
    """One draft–verify–commit round over the running batch (Leviathan et al. 2023; Chen et al. 2023).

    mark: called at the end of each of the three
    returns the outcome, and the record of it that the host reads (see `commit`)
    """
    size = {"batch_size": batch.slots.numel(), "k": batch.k}
    with ranges.span(ranges.DRAFT, **size):
        first = _first_forward(batch, state, target, drafter) if target.backend.has_launches else None
        batch = state.plan(batch, draft_positions=drafter.draft_positions, first=first)
        proposal = drafter.propose(batch, state)
        mark()
    with ranges.span(ranges.VERIFY, **size):
        outcome = judge(proposal, batch, target)
        mark()
    with ranges.span(ranges.COMMIT, **size):
        record = commit(outcome, batch, state)
        mark()
    return outcome, record


def _first_forward(
    batch: RunningBatch, state: BatchState, target: ModelRunner, drafter: RoundDrafter
) -> FirstForward | None:
    """What a round begins with, where that is known before it has a plan: the target's forward over a token of each
    sequence, or the draft model's first."""
    if not batch.k:
        return target.first_forward(1)
    source = drafter.source(batch, state)
    if source is None or source.model is None:
        return None
    return source.model.first_forward(source.num_fed)


def bind_round(
    batch: RunningBatch, state: BatchState, target: ModelRunner, drafter: RoundDrafter
) -> BoundRound | None:
    """`run_round` in one call, for every round of the batch's size, k, mode and of what `drafter` has prepared; None
    where the backend, the batch or the drafter wants it part by part."""
    source = drafter.source(batch, state) if batch.is_decided_by_draws else None
    if source is None:
        return None
    count = batch.slots.numel()
    given = None if source.given is None else (source.given[0][:count], source.given[1][:count])
    tensors = RoundTensors(
        StateTensors(
            batch.tokens, batch.block_table, state.seq_len, state.length_limit, state.num_speculative
        ),
        batch.slots,
        batch.rows,
        batch.transforms,
        given,
        batch.k,
        drafter.draft_positions,
        batch.forced_acceptance,
    )
    draft = None if source.model is None else source.model.in_round
    return target.decoder.bind_round(target.in_round, draft, source.num_fed, tensors)


def judge(
    proposal: DraftProposal,
    batch: RunningBatch,
    target: ModelRunner,
    feed: Feed | None = None,
    row_start: Tensor | None = None,
) -> RoundOutcome:
    """The target's one forward and what follows from it: over the last committed token and the drafts, or, for chunks
    of prompts, over `feed`, where the logit row row_start[b] is the one that decides."""
    plan, k = batch.planned, proposal.tokens.shape[1]
    rows = batch.started if batch.k == 0 else None
    if rows is None:
        if feed is None:
            # The drafts, and a row for whoever runs.
            counts = (proposal.num_tokens, plan.is_running) if k else (plan.is_running, None)
            most = batch.slots.numel() * (k + 1)
            feed = Feed(plan.last_position, counts[0], counts[0], most, most, counts[1])
        rows = target.build(batch, feed)
    if row_start is None:
        row_start = rows.q_start[:-1]
    if not rows.logit_rows.numel():
        # Chunks that decide nothing; or everybody has ended since the host looked, and there is nothing to feed.
        if rows.token_ids.numel():
            target.forward(rows)
        return _empty_outcome(proposal, row_start)
    if batch.is_decided_by_draws:
        return match(target.backend, *target.draw(rows, batch), row_start, proposal, batch)
    judged = target.judge(rows, batch)
    if batch.mode.has_processors:
        by_row, _ = row_keys(target.backend, draw_keys(batch), rows)
        outcome = verify_processed(target, judged, by_row, row_start, proposal, batch)
    else:
        outcome = verify(target.backend, judged.logits, judged.stats, row_start, proposal, batch)
    return outcome._replace(logits=judged.raw)


def match(
    backend: Backend,
    drawn: Tensor,
    drawn_error: Tensor,
    row_start: Tensor,
    proposal: DraftProposal,
    batch: RunningBatch,
) -> RoundOutcome:
    """`verify` where the target has drawn already: row row_start[b] + i, `[R]` int32 each, decides seq_len[b] + i.
    Where launches are dear it is left to `commit`."""
    plan, outcome = batch.planned, _empty_outcome(proposal, row_start)
    if backend.has_launches:
        return outcome._replace(drawn=drawn, drawn_error=drawn_error)
    drafts = Drafts(row_start, plan.seq_len, proposal.num_tokens, proposal.tokens)
    given = (drafts, batch.rows, plan.is_running, outcome.verdict)
    backend.match_draws(drawn, drawn_error, *given, batch.forced_acceptance)
    return outcome


def verify(
    backend: Backend,
    logits: Tensor,
    stats: Tensor,
    row_start: Tensor,
    proposal: DraftProposal,
    batch: RunningBatch,
) -> RoundOutcome:
    """Judges a proposal by the target's logits, each sequence by its own rule: row row_start[b] + i decides position
    seq_len[b] + i. logits: `[R, V]` after every transform; stats: `[R, 4]` of them (`filter_rows`)."""
    plan, outcome = batch.planned, _empty_outcome(proposal, row_start)
    drafts = Drafts(row_start, plan.seq_len, proposal.num_tokens, proposal.tokens, proposal.law)
    for rule in batch.rules:
        judge_by_rule = getattr(backend, rule.op)
        judge_by_rule(logits, stats, drafts, batch.rows, plan.is_running, outcome.verdict)
    return outcome


def verify_processed(
    target: ModelRunner,
    judged: JudgedLogits,
    by_row: SamplingRows,
    row_start: Tensor,
    proposal: DraftProposal,
    batch: RunningBatch,
) -> RoundOutcome:
    """`verify` where code of requests' own comes between logits and judgement.

    Rows are processed in order, and one only after the draft before it was accepted: the code is called as in plain
    decoding, once for each token that is emitted. by_row: what each logit row is judged by.
    """
    backend = target.backend
    logits = judged.logits.clone() if judged.logits is judged.raw else judged.logits
    stats, starts, drafts = judged.stats, row_start.tolist(), proposal.tokens.tolist()
    is_running, processed = batch.planned.is_running.tolist(), logits[:, : target.vocab_size]
    texts = [batch.committed(index) for index in range(batch.size)]
    asks = [sequence.params.logits_processor != () for sequence in batch.sequences]
    going = [index for index in range(batch.size) if asks[index] and is_running[index]]
    for step in itertools.count():
        for index in going:
            row, processors = processed[starts[index] + step], batch.sequences[index].params.logits_processor
            try:
                row.copy_(process(processors, texts[index] + drafts[index][:step], row))
            except Exception as error:
                blame(error, batch.sequences[index].request.request_id)
                raise
        if going:
            changed = torch.tensor([starts[index] + step for index in going], device=logits.device)
            stats[changed] = backend.filter_rows(logits[changed], by_row.take(changed))
        outcome = verify(backend, logits, stats, row_start, proposal, batch)
        num_drafts, accepted = outcome.num_draft.tolist(), outcome.num_accepted.tolist()
        going = [
            index
            for index in going
            if step < num_drafts[index]
            and _needs_next(batch.sequences[index], accepted[index], drafts[index][step], step)
        ]
        if not going:
            break
    return outcome


def _needs_next(sequence: Sequence, num_accepted: int, draft: int, step: int) -> bool:
    """Whether the row after `draft`, the step-th, is needed once that has been judged."""
    is_over = num_accepted <= step or draft in sequence.ending_ids
    return not (sequence.rule.judges_in_order and is_over)


def commit(outcome: RoundOutcome, batch: RunningBatch, state: BatchState) -> Tensor:
    """Makes the outcome part of the sequences. Returns what the host reads, `[B, 3 + k + 1]` int32: see the
    `commit_round` op."""
    if outcome.drawn is not None and outcome.drawn_error is not None:
        drafts = Drafts(outcome.row_start, batch.seq_len, outcome.num_draft, outcome.drafts)
        return state.commit_draws(batch, outcome.drawn, outcome.drawn_error, drafts, outcome.verdict)
    return state.commit(batch, outcome.tokens, outcome.num_accepted, outcome.num_draft, outcome.error)


def _empty_outcome(proposal: DraftProposal, row_start: Tensor) -> RoundOutcome:
    """Room for an outcome: only what is said of running sequences is written, and read."""
    count, k = proposal.tokens.shape
    return RoundOutcome(
        tokens=row_start.new_empty(count, k + 1),
        num_accepted=row_start.new_empty(count),
        num_draft=proposal.num_tokens,
        error=row_start.new_empty(count),
        logits=None,
        row_start=row_start,
        drafts=proposal.tokens,
    )
