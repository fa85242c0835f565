"""Queues rounds on the device, recorded where that pays, and hands their results back in order.

The device leads: a round may be queued before the results of the one before it have been read. Then the host knows
bounds only (a round emits at least one token of a sequence, at most k + 1), and a sequence that has ended by then (a
stop string, say) runs once more for nothing: its row is ignored.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from specengine import ranges
from specengine.config import MAX_NUM_SPECULATIVE_TOKENS
from specengine.drafters.base import RoundDrafter
from specengine.drafters.no_draft import NoDrafter
from specengine.errors import GraphCaptureError
from specengine.kernels.types.round import NUM_RESULT_COLUMNS
from specengine.runtime.graphs import Pending, Recorder, ResultRing, bucket, draft_bucket, sizes
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RoundMode, RunningBatch, round_mode
from specengine.speculative import RoundOutcome, run_round


@dataclass(frozen=True)
class Flight:
    """A round, or a prompt's first token, that is under way.

    drafter: whom to tell what became of it; None for a prompt
    """

    sequences: list[Sequence]
    batch: RunningBatch
    outcome: RoundOutcome
    results: Pending
    drafter: RoundDrafter | None

    @property
    def is_needed_now(self) -> bool:
        """Whether the next round would overwrite what the host has yet to read, or needs to know."""
        return self.batch.mode.wants_logprobs or self.batch.mode.has_bias


class Rounds:
    """The rounds of one engine.

    recorder:     records rounds for replay, or None: every round runs from Python
    is_strict:    whether a round that cannot be recorded is an error; else a warning, and rounds run from Python
    rounds_ahead: rounds that may be under way when the host has read all the others
    """

    def __init__(
        self,
        state: BatchState,
        target: ModelRunner,
        drafter: RoundDrafter,
        kv_cache: KVCache,
        *,
        recorder: Recorder | None,
        is_strict: bool,
        rounds_ahead: int,
    ) -> None:
        self.drafter = drafter
        self.recorder = recorder
        self._state = state
        self._target = target
        self._kv_cache = kv_cache
        self._no_drafter = NoDrafter()
        self._is_strict = is_strict
        self._rounds_ahead = rounds_ahead if drafter.may_run_ahead else 0
        self._sizes = sizes(state.num_slots)
        self._recordings: dict[tuple[int, int, RoundMode], Callable[[], RoundOutcome]] = {}
        self._flights: deque[Flight] = deque()
        self._ring = ResultRing(
            # A step reads what it must after it has queued a prompt's first token and a round.
            num_entries=rounds_ahead + 2,
            num_values=state.num_slots * (NUM_RESULT_COLUMNS + MAX_NUM_SPECULATIVE_TOKENS + 1),
            device=state.device,
        )

    def record(self, k: int, mode: RoundMode) -> None:
        """Records rounds of up to `k` drafts for every batch size, the largest first: they share its memory."""
        for size in reversed(self._sizes):
            self._recorded(size, draft_bucket(k), mode)

    def launch(self, sequences: list[Sequence]) -> None:
        """Queues a round of these sequences; reads no result."""
        k = max(0, *(sequence.max_draft_tokens for sequence in sequences))
        drafter = self.drafter if k else self._no_drafter
        table, mode = self._kv_cache.device_block_table(), round_mode(sequences)
        size, run = len(sequences), None
        if self.recorder is not None and not mode.has_bias:
            k, size = draft_bucket(k), bucket(size, self._sizes)
            run = self._recorded(size, k, mode)
        batch = self._state.select(sequences, table, mode, k=k, size=size)
        with ranges.span(ranges.DRAFT, batch_size=len(sequences), k=k):
            is_replayable = drafter.prepare(batch, self._state)
        if run is None or not is_replayable:
            batch = batch.without_padding()
            run = partial(run_round, batch, self._state, self._target, drafter)
        self.push(sequences, batch, run(), drafter)

    def push(
        self,
        sequences: list[Sequence],
        batch: RunningBatch,
        outcome: RoundOutcome,
        drafter: RoundDrafter | None,
    ) -> None:
        """Notes what is under way, and sends its record to the host."""
        assert outcome.record is not None, "what is under way has been committed"
        results = self._ring.push(outcome.record)
        self._flights.append(Flight(sequences, batch, outcome, results, drafter))
        if drafter is not None:
            for sequence, limit in zip(sequences, batch.draft_limits, strict=True):
                sequence.add_round_ahead(limit)

    def pop(self) -> Flight | None:
        """What has been under way longest; the host knows its results from here on."""
        if not self._flights:
            return None
        flight = self._flights.popleft()
        if flight.drafter is not None:
            for sequence, limit in zip(flight.sequences, flight.batch.draft_limits, strict=True):
                sequence.drop_round_ahead(limit)
        return flight

    def pop_due(self, *, has_launched: bool) -> Flight | None:
        """`pop`, unless everything that is under way may stay so: the rounds that were launched last."""
        if not self._flights:
            return None
        may_stay = self._rounds_ahead if has_launched and not self._flights[-1].is_needed_now else 0
        return self.pop() if len(self._flights) > may_stay else None

    def clear(self) -> None:
        """Forgets what is under way: nobody wants to know any more."""
        while self.pop() is not None:
            pass

    def close(self) -> None:
        """Forgets what is under way and gives the recordings' memory back."""
        self.clear()
        self._recordings.clear()

    def _recorded(self, size: int, k: int, mode: RoundMode) -> Callable[[], RoundOutcome] | None:
        key = (size, k, mode)
        if key not in self._recordings and self.recorder is not None:
            drafter = self.drafter if k else self._no_drafter
            # Padding alone, where later batches of this size lie: nothing of the host's knowledge is in it.
            batch = self._state.select([], self._kv_cache.device_block_table(), mode, k=k, size=size)
            name = f"{size} sequences, k = {k}, {mode}"
            try:
                self._recordings[key] = self.recorder.record(
                    name, partial(run_round, batch, self._state, self._target, drafter)
                )
            except GraphCaptureError as error:
                if self._is_strict:
                    raise
                warnings.warn(f"{error}; rounds run without CUDA graphs", RuntimeWarning, stacklevel=2)
                self.recorder = None
        return self._recordings.get(key)
