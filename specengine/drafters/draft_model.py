"""A small model as the drafter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specengine import rng
from specengine.drafters.base import DraftProposal
from specengine.kernels.reference.filter_rows import STAT_ERROR
from specengine.runtime.batch import row_starts
from specengine.runtime.model_runner import ModelRunner, draft_steps
from specengine.runtime.state import RunningBatch, apply_bias


class DraftModelDrafter:
    """Drafts k tokens one by one with a model that shares the target's block table.

    Its first forward of a round feeds whatever was committed beyond its watermark: one token, two after a fully
    accepted round (its KV lacks the last accepted token), more after rounds without drafting or a prefix hit that
    only the target had.
    """

    def __init__(self, runner: ModelRunner, *, name: str, chunk_size: int) -> None:
        self.name = name
        self.runner = runner
        self._chunk_size = chunk_size

    def propose(self, batch: RunningBatch) -> DraftProposal:
        limits = [
            self._context_limit(length, limit)
            for length, limit in zip(batch.lengths, batch.draft_limits, strict=True)
        ]
        num_tokens = torch.tensor(limits, dtype=torch.int32, device=batch.seq_len.device)
        k = max(limits, default=0)
        if k == 0:
            return DraftProposal(num_tokens.new_zeros(batch.size, 0), num_tokens)
        start = self._catch_up(batch, limits)
        if batch.bias is None and not batch.has_rejection:
            tokens, error = self.runner.draft(batch, start, limits)
            proposal = DraftProposal(tokens, _up_to_errors(num_tokens, error))
        else:
            proposal = self._draft_from_logits(batch, start, limits, num_tokens)
        self._advance(batch, limits)
        return proposal

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Nothing to do: rollback is a minimum, and the block manager takes it."""

    def release(self, sequence_id: int) -> None:
        """Nothing to do: the state is KV, which the block manager frees."""

    def _draft_from_logits(
        self, batch: RunningBatch, start: Tensor, limits: list[int], num_tokens: Tensor
    ) -> DraftProposal:
        draft = _Draft(batch, max(limits))
        for step, rows, part, fed in draft_steps(batch, start, limits):
            draft.draw(self.runner, part, rows, step, *self._logits(part, step, fed))
        return draft.proposal(num_tokens)

    def _logits(
        self, part: RunningBatch, step: int, fed: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The logits that step `step` of a draft draws from, biases included, and their statistics."""
        if part.bias is None:
            return self.runner.forward_stats(part, *fed)
        ones = torch.ones_like(part.seq_len)
        logits = self.runner.forward(part, *fed)
        logits = apply_bias(logits, part, row_starts(ones), ones, part.seq_len + step)
        filters = (part.temperature, part.top_k, part.top_p, part.min_p)
        return logits, self.runner.backend.filter_rows(logits, *filters)

    def _context_limit(self, length: int, limit: int) -> int:
        """The last draft forward feeds position length + k - 2, which the draft's context must hold."""
        return max(0, min(limit, self.runner.max_positions - length + 1))

    def _catch_up(self, batch: RunningBatch, limits: list[int]) -> Tensor:
        """Computes all but the last chunk of what the draft's KV lacks; returns where the rest starts, `[B]`."""
        cache, index = self.runner.kv_cache, self.runner.model_index
        slots = batch.slots.tolist()
        start = [cache.num_computed(slot, index) for slot in slots]
        while True:
            rows = [
                row
                for row, limit in enumerate(limits)
                if limit > 0 and batch.lengths[row] - start[row] > self._chunk_size
            ]
            if not rows:
                return torch.tensor(start, dtype=torch.int32, device=batch.seq_len.device)
            part = batch.take(rows)
            first = torch.tensor([start[row] for row in rows], dtype=torch.int32, device=batch.seq_len.device)
            chunk = torch.full_like(first, self._chunk_size)
            self.runner.forward(part, first, chunk, torch.zeros_like(first))
            for row in rows:
                start[row] += self._chunk_size
                cache.manager.set_computed(slots[row], index, start[row])

    def _advance(self, batch: RunningBatch, limits: list[int]) -> None:
        manager, index = self.runner.kv_cache.manager, self.runner.model_index
        for slot, length, limit in zip(batch.slots.tolist(), batch.lengths, limits, strict=True):
            if limit > 0:
                manager.set_computed(slot, index, length + limit - 1)


def _up_to_errors(num_tokens: Tensor, error: Tensor) -> Tensor:
    """Rows stop before the first draft distribution that is not one (a NaN, say)."""
    return torch.minimum(num_tokens, (error == 0).cumprod(dim=1).sum(dim=1, dtype=torch.int32))


class _Draft:
    """The proposal under construction from logits: tokens, and in rejection mode the rows they were drawn from."""

    def __init__(self, batch: RunningBatch, k: int) -> None:
        self.tokens = batch.slots.new_zeros(batch.size, k)
        self.error = torch.zeros_like(self.tokens)
        self.law: _Law | None = None

    def draw(
        self,
        runner: ModelRunner,
        part: RunningBatch,
        rows: list[int],
        step: int,
        logits: Tensor,
        stats: Tensor,
    ) -> None:
        """Draws token `step` of the given rows from their logits and stages it."""
        position = part.seq_len + step
        tokens, log_probs = _draw(runner, part, logits, stats, position)
        if part.has_rejection:
            if self.law is None:
                self.law = _Law.empty(self.tokens.shape, logits)
            self.law.record(rows, step, log_probs, logits, stats)
        self.tokens[rows, step] = tokens
        self.error[rows, step] = stats[:, STAT_ERROR].int()
        part.tokens[part.slots.long(), position.long()] = tokens

    def proposal(self, limits: Tensor) -> DraftProposal:
        num_tokens = _up_to_errors(limits, self.error)
        if self.law is None:
            return DraftProposal(self.tokens, num_tokens)
        return DraftProposal(self.tokens, num_tokens, self.law.log_probs, self.law.logits, self.law.stats)


@dataclass(frozen=True)
class _Law:
    """What a proposal's tokens were drawn from; see `DraftProposal`."""

    log_probs: Tensor
    logits: Tensor
    stats: Tensor

    @staticmethod
    def empty(shape: torch.Size, like: Tensor) -> _Law:
        """For [B, k] tokens, and logits as wide as `like`."""
        device = like.device
        logits = torch.full((*shape, like.shape[1]), float("-inf"), device=device)
        return _Law(torch.zeros(shape, device=device), logits, torch.zeros(*shape, 4, device=device))

    def record(self, rows: list[int], step: int, log_probs: Tensor, logits: Tensor, stats: Tensor) -> None:
        self.log_probs[rows, step] = log_probs
        self.logits[rows, step] = logits
        self.stats[rows, step] = stats


def _draw(
    runner: ModelRunner, part: RunningBatch, logits: Tensor, stats: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Match mode draws with the target's own noise, rejection mode with the draft stream's."""

    def draw(stream: int, base: Tensor) -> tuple[Tensor, Tensor]:
        return runner.backend.sample_rows(logits, stats, part.temperature, part.seeds, position, stream, base)

    if part.is_all_rejection:
        return draw(rng.STREAM_DRAFT, part.seq_len)
    matched = draw(rng.STREAM_TARGET, torch.zeros_like(position))
    if not part.has_rejection:
        return matched
    own = draw(rng.STREAM_DRAFT, part.seq_len)
    tokens, log_probs = (torch.where(part.uses_rejection, *pair) for pair in zip(own, matched, strict=True))
    return tokens, log_probs
