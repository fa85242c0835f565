"""Computes prompts, a chunk of each a step, by the same forward and judgement as rounds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from specengine.drafters.no_draft import NoDrafter
from specengine.engine.logprobs import token_logprobs
from specengine.engine.rounds import Rounds
from specengine.engine.scheduler import Chunk, Scheduler
from specengine.runtime.batch import Feed
from specengine.runtime.kv_cache import TARGET, KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, round_mode
from specengine.speculative import RoundOutcome, commit, judge


class Prompts:
    """Runs chunks of prompts.

    on_scored: called with a sequence whose prompt was all that was wanted
    """

    def __init__(
        self,
        target: ModelRunner,
        state: BatchState,
        kv_cache: KVCache,
        rounds: Rounds,
        scheduler: Scheduler,
        *,
        on_scored: Callable[[Sequence], None],
    ) -> None:
        self._target = target
        self._state = state
        self._kv_cache = kv_cache
        self._rounds = rounds
        self._scheduler = scheduler
        self._on_scored = on_scored

    def run(self, chunks: list[Chunk]) -> None:
        """One forward over all chunks; the first tokens that it decides are under way afterwards."""
        now = time.perf_counter()
        for chunk in chunks:
            chunk.sequence.num_prompt_forwards += 1
            chunk.sequence.request.first_forward_time = chunk.sequence.request.first_forward_time or now
        num_logits = [_num_logits(chunk) for chunk in chunks]
        row_ends = list(itertools.accumulate(num_logits))
        sequences = [chunk.sequence for chunk in chunks]
        mode = round_mode(sequences)
        if any(sequence.wants_prompt_logprobs for sequence in sequences):
            mode = mode._replace(wants_logprobs=True)
        table = self._kv_cache.device_block_table()
        batch = self._state.plan(self._state.select(sequences, table, mode, k=0))
        decides = [chunk.decides_first for chunk in chunks]
        batch = batch._replace(plan=batch.planned._replace(is_running=self._int32(list(map(int, decides)))))
        feed = self._feed(chunks, num_logits)
        last_rows = self._int32([max(0, end - 1) for end in row_ends])
        outcome = judge(NoDrafter().propose(batch, self._state), batch, self._target, feed, last_rows)
        self._note_computed(chunks, outcome, num_logits, row_ends)
        if any(decides):
            self._rounds.push(sequences, batch, outcome, commit(outcome, batch, self._state), None)

    def _feed(self, chunks: list[Chunk], num_logits: list[int]) -> Feed:
        lengths = [chunk.length for chunk in chunks]
        starts = self._int32([chunk.start for chunk in chunks])
        return Feed(starts, self._int32(lengths), self._int32(num_logits), sum(lengths), sum(num_logits))

    def _note_computed(
        self, chunks: list[Chunk], outcome: RoundOutcome, num_logits: list[int], row_ends: list[int]
    ) -> None:
        for chunk, end, count in zip(chunks, row_ends, num_logits, strict=True):
            sequence = chunk.sequence
            assert sequence.slot is not None, "a chunk's sequence has a slot"
            if sequence.wants_prompt_logprobs:
                # Before the watermark says so: what an interruption leaves undone is computed, and put here, again.
                assert outcome.logits is not None, "whoever wants log-probabilities is judged by logits"
                self._score(chunk, outcome.logits[end - count : end])
            self._kv_cache.manager.set_computed(sequence.slot, TARGET, chunk.start + chunk.length)
            self._scheduler.publish(sequence)
            if chunk.is_last and sequence.remaining == 0:
                self._on_scored(sequence)

    def _score(self, chunk: Chunk, logits: Tensor) -> None:
        """Row i of a chunk predicts prompt token start + i + 1; the prompt's first token has no prediction."""
        request = chunk.sequence.request
        following = request.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        limits = [request.params.prompt_logprobs or 0] * len(following)
        request.prompt_logprobs[chunk.start + 1 :] = token_logprobs(
            self._target.backend,
            logits[: len(following)],
            self._int32(following),
            limits,
            vocab_size=self._target.vocab_size,
        )

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._state.device)


def _num_logits(chunk: Chunk) -> int:
    """Every row's logits, where the prompt's log-probabilities are wanted; else the one that decides, if any."""
    return chunk.length if chunk.sequence.wants_prompt_logprobs else int(chunk.decides_first)
