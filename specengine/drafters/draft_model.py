"""A small model as the drafter."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specengine.drafters.base import DraftProposal, DraftSource, RowResult
from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.program import ForwardBatch
from specengine.kernels.types.round import RoundPlan
from specengine.kernels.types.rules import Rule
from specengine.kernels.types.statistics import STAT_ERROR, STAT_LOG_NORMALISER, STAT_MAX
from specengine.ops.interpreter import row_keys
from specengine.runtime.batch import Feed
from specengine.runtime.model_runner import ModelRunner, draw_keys
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RunningBatch

# A round's first forward feeds the last two committed tokens: after full acceptance the draft's KV lacks the first
# of them too. Where it does not, it is written again with the same bits.
_NUM_FED = 2


class DraftModelDrafter:
    """Drafts k tokens one by one with a model that shares the target's block table.

    What its KV lacks beyond the last two committed tokens (after a prompt, after rounds without drafting, or a prefix
    hit that only the target had) is computed in chunks before the round; where rounds are not recorded, the last chunk
    in the round's first forward.

    place:       in a list of drafters its own, which is the way of rounds in which it drafts alone
    is_recorded: whether rounds are recorded: then all of them feed the same
    """

    may_run_ahead = True
    num_fed = _NUM_FED  # committed tokens, the last ones, that a round's first forward feeds: 1 or 2

    def __init__(
        self, runner: ModelRunner, *, name: str, chunk_size: int, place: int = 0, is_recorded: bool = True
    ) -> None:
        self.name = name
        self.runner = runner
        self.draft_positions = runner.max_positions
        self._chunk_size = chunk_size
        self._place = place
        self._is_recorded = is_recorded
        # Of the round that was prepared: what the first forward feeds besides the last tokens.
        self._lacking: _Lacking | None = None

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """Computes all but the last two committed tokens of what the draft's KV lacks; or leaves the last chunk of it
        to the round's first forward.

        Rounds that are under way need not have been read: which tokens they lack is found on the device, within
        bounds that the host knows.
        """
        self._lacking = None
        gaps = [
            self._gap(sequence, limit)
            for sequence, limit in zip(batch.sequences, batch.draft_limits, strict=True)
        ]
        longest = max([gap.length for gap in gaps], default=0)
        if not longest:
            return "model", self.name
        most_left = 0 if self._is_recorded else self._chunk_size
        while longest > most_left:
            gaps = self._fill(gaps, batch, state)
            longest = max(gap.length for gap in gaps)
        if self._is_recorded:
            return "model", self.name
        starts = [gap.start if gap.length else _FOREVER for gap in gaps]
        most = sum(gap.length for gap in gaps)
        self._lacking = _Lacking(torch.tensor(starts, dtype=torch.int32, device=state.device), most)
        return None

    def source(self, batch: RunningBatch, state: BatchState) -> DraftSource | None:
        """The model, unless it has to look at how sure it is, or feeds what it lacks first."""
        is_alike = self._lacking is None and not batch.mode.has_confidence
        return DraftSource(self.runner, self.num_fed) if is_alike else None

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """k draws in a row, in one call where the backend has it."""
        start = _first_start(batch.planned, self.num_fed)
        if self._lacking is not None:
            start = torch.minimum(start, self._lacking.start)
        if not (batch.reads_law or batch.mode.has_confidence):
            drafted = self.runner.draft(batch, start)
            if drafted is not None:
                tokens, error = drafted
                return DraftProposal(tokens, _up_to_errors(batch.planned.num_draft, error))
        draft = _Draft(batch, self.runner, start, self._lacking, num_fed=self.num_fed)
        for step in range(batch.k):
            draft.draw(step)
        return draft.proposal()

    def observe(self, batch: RunningBatch, results: Collection[RowResult | None]) -> None:
        """Notes what the draft's KV holds: of k drafts the last was never fed, of fewer than were planned, because the
        next would have been unsure, all were. Rollback is the block manager's."""
        for sequence, limit, result in zip(batch.sequences, batch.draft_limits, results, strict=True):
            if result is not None:
                room = min(sequence.length_limit - 1, self.draft_positions + 1) - result.length
                planned = min(limit, room)
                if planned > 0:
                    self._set_computed(result.slot, result.length + min(result.num_draft, planned - 1))

    def hear(self, sequence: Sequence) -> None:
        """Nothing to do: it reads the committed tokens on the device."""

    def release(self, sequence_id: int) -> None:
        """Nothing to do: the state is KV, which the block manager frees."""

    def first_written(self, sequence: Sequence) -> int | None:
        """The last two committed tokens, and whatever it lacks before them."""
        if sequence.slot is None or sequence.max_draft_tokens <= 0:
            return None
        computed = self.runner.kv_cache.num_computed(sequence.slot, self.runner.model_index)
        return min(computed, max(0, sequence.num_tokens - _NUM_FED))

    def _gap(self, sequence: Sequence, draft_limit: int) -> _Gap:
        """What the draft's KV may lack of a sequence before its last two committed tokens.

        A round in which it drafts leaves no gap, another one of what it emits. (Where a lookup goes on behind its
        drafts there is one too, and no such round is under way.)
        """
        length, ahead = sequence.num_tokens, sequence.ways_ahead
        num_rounds = len(ahead)  # up to the latest in which it drafts
        while num_rounds and ahead[num_rounds - 1] != self._place:
            num_rounds -= 1
        if draft_limit <= 0 or length > self.draft_positions or (num_rounds and num_rounds == len(ahead)):
            return _NO_GAP
        assert sequence.slot is not None, f"sequence {sequence.sequence_id} has no slot"
        # Each of these rounds emits a token or more, and the last leaves all before its first draft computed.
        start = length + num_rounds - 1
        if not num_rounds:
            start = self.runner.kv_cache.num_computed(sequence.slot, self.runner.model_index)
        end = min(length + sequence.num_tokens_ahead - _NUM_FED, self.draft_positions)
        return _Gap(start, max(0, end - start))

    def _fill(self, gaps: list[_Gap], batch: RunningBatch, state: BatchState) -> list[_Gap]:
        """Computes a chunk of every gap, and returns what is left of them."""
        lengths = [min(gap.length, self._chunk_size) for gap in gaps]
        padding = [0] * (batch.slots.numel() - len(gaps))
        start, most = (
            torch.tensor(values + padding, dtype=torch.int32, device=state.device)
            for values in ([gap.start for gap in gaps], lengths)
        )
        q_len = torch.minimum(state.seq_len[batch.slots.long()] - _NUM_FED - start, most).clamp_min(0)
        feed = Feed(start, q_len, torch.zeros_like(q_len), sum(lengths), 0)
        self.runner.forward(self.runner.build(batch, feed))
        for sequence, gap, length in zip(batch.sequences, gaps, lengths, strict=True):
            if length and sequence.slot is not None and not sequence.num_rounds_ahead:
                self._set_computed(sequence.slot, gap.start + length)
        return [
            _Gap(gap.start + length, gap.length - length) for gap, length in zip(gaps, lengths, strict=True)
        ]

    def _set_computed(self, slot: int, num_tokens: int) -> None:
        self.runner.kv_cache.manager.set_computed(slot, self.runner.model_index, num_tokens)


class _Gap(NamedTuple):
    """Tokens of a sequence, by position, whose keys and values may be missing."""

    start: int
    length: int


class _Lacking(NamedTuple):
    """Tokens before a round's last ones that its first forward is to feed.

    start: `[B]` int32, where they begin; _FOREVER: there are none
    most:  bound of their sum, as the host knows it
    """

    start: Tensor
    most: int


_NO_GAP = _Gap(0, 0)
_FOREVER = 2**31 - 1


def _first_start(plan: RoundPlan, num_fed: int) -> Tensor:
    """Where the first forward of a round begins."""
    return plan.last_position if num_fed == 1 else plan.draft_start[0]


def _up_to_errors(num_draft: Tensor, error: Tensor) -> Tensor:
    """Rows stop before the first draft distribution that is not one (a NaN, say)."""
    return torch.minimum(num_draft, (error == 0).cumprod(dim=1).sum(dim=1, dtype=torch.int32))


class _Draft:
    """The proposal under construction: tokens, and in rejection mode the rows they were drawn from.

    start:   `[B]` int32, where the first forward begins
    num_fed: the tokens it feeds of each sequence that drafts, besides those that are lacking
    """

    def __init__(
        self,
        batch: RunningBatch,
        runner: ModelRunner,
        start: Tensor,
        lacking: _Lacking | None,
        *,
        num_fed: int,
    ) -> None:
        self._batch = batch
        self._runner = runner
        self._start = start
        self._lacking = lacking
        self._num_fed = num_fed
        self._tokens = batch.slots.new_empty(batch.slots.numel(), batch.k)
        self._num_draft = batch.planned.num_draft
        self._law: _Law | None = None

    def draw(self, step: int) -> None:
        """Draws token `step` of every sequence that still drafts, and stages it."""
        batch, plan, runner = self._batch, self._batch.planned, self._runner
        wanted = self._wanted(step)
        rows = batch.started if step == 0 else None
        if rows is None:
            rows = runner.build(batch, self._feed(step, wanted))
        if not rows.logit_rows.numel():  # the host expected more drafts than there is room for
            return
        if not (batch.reads_law or batch.mode.has_confidence):
            where = (batch.tokens, batch.slots, plan.seq_len, wanted)
            runner.draw(rows, batch, Staging(step, *where, self._tokens, self._num_draft))
            return
        _, logits, stats = runner.judge(rows, batch)
        tokens, log_probs = self._sample(step, rows, logits, stats)
        if batch.mode.has_confidence:
            self._end_unsure(rows, stats)
        if not batch.reads_law:
            self._stage(step, tokens, stats[:, STAT_ERROR].int())
            return
        if self._law is None:
            self._law = _Law.empty(self._tokens.shape, logits)
        self._stage(step, tokens, None, (log_probs, logits, stats))

    def _feed(self, step: int, wanted: Tensor) -> Feed:
        """What the forward of a step feeds, for a logit row of each sequence that is wanted."""
        plan, count = self._batch.planned, wanted.numel()
        if step:
            return Feed(plan.draft_start[step], wanted, wanted, count, count)
        if self._lacking is not None:
            q_len = (plan.seq_len - self._start) * wanted
            return Feed(self._start, q_len, wanted, self._lacking.most + self._num_fed * count, count)
        q_len = plan.draft_q_len[0] if self._num_fed > 1 else wanted
        return Feed(self._start, q_len, wanted, self._num_fed * count, count)

    def proposal(self) -> DraftProposal:
        if self._law is None:
            return DraftProposal(self._tokens, self._num_draft)
        return DraftProposal(
            self._tokens, self._num_draft, self._law.log_probs, self._law.logits, self._law.stats
        )

    def _stage(
        self,
        step: int,
        drawn: Tensor,
        error: Tensor | None,
        drawn_from: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> None:
        batch, plan, law = self._batch, self._batch.planned, self._law
        where = (batch.tokens, batch.slots, plan.seq_len, self._wanted(step))
        kept = (None, None, None) if law is None else (law.log_probs, law.logits, law.stats)
        drafts = (self._tokens, self._num_draft)
        self._runner.backend.stage_draft(step, *where, drawn, error, *drafts, *drawn_from, *kept)

    def _wanted(self, step: int) -> Tensor:
        """`[B]` int32, who drafts in this step: all that the plan says, but for those that have been ended."""
        wanted = self._batch.planned.is_drafting[step]
        if not (step and self._batch.mode.has_confidence):
            return wanted
        return wanted * (self._num_draft > step)

    def _end_unsure(self, rows: ForwardBatch, stats: Tensor) -> None:
        """Marks the rows whose likeliest token is too unlikely, as if they were no distribution: drafts end before
        them. What was drawn there plays no part, so this is exact in rejection mode, too."""
        by_row, _ = row_keys(self._runner.backend, draw_keys(self._batch), rows)
        likeliest = (stats[:, STAT_MAX] - stats[:, STAT_LOG_NORMALISER]).exp()
        stats[:, STAT_ERROR] = torch.maximum(
            stats[:, STAT_ERROR], (likeliest < by_row.draft_confidence).float()
        )

    def _sample(self, step: int, rows: ForwardBatch, logits: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
        """Each row draws with the noise that its rule asks for: the target's own, or the draft's."""
        backend, rules = self._runner.backend, self._batch.mode.rules
        judged_by, position = row_keys(backend, draw_keys(self._batch), rows)

        def draw(rule: Rule) -> tuple[Tensor, Tensor]:
            base = position - step if rule.reads_law else torch.zeros_like(position)
            return backend.sample_rows(logits, stats, judged_by, position, rule.draft_stream, base)

        drawn = draw(rules[-1])
        if rules[0] == Rule.MATCH and len(rules) > 1:
            is_match = judged_by.rule == Rule.MATCH
            pairs = zip(draw(Rule.MATCH), drawn, strict=True)
            tokens, log_probs = (torch.where(is_match, *pair) for pair in pairs)
            drawn = tokens, log_probs
        return drawn


@dataclass(frozen=True)
class _Law:
    """What a proposal's tokens were drawn from; see `DraftProposal`."""

    log_probs: Tensor
    logits: Tensor
    stats: Tensor

    @staticmethod
    def empty(shape: torch.Size, like: Tensor) -> _Law:
        """For [B, k] tokens, and logits as wide as `like`. Of a draft that is not made nothing is read."""
        return _Law(like.new_empty(shape), like.new_empty(*shape, like.shape[1]), like.new_empty(*shape, 4))
