"""Queues rounds on the device, recorded where that pays, and hands their results back in order.

The device leads: a round may be queued before the results of the one before it have been read. Then the host knows
bounds only (a round emits at least one token of a sequence, at most k + 1), and a sequence that has ended by then (a
stop string, say) runs once more for nothing: its row is ignored.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from specengine import ranges
from specengine.config import MAX_NUM_SPECULATIVE_TOKENS
from specengine.drafters.base import RoundDrafter
from specengine.drafters.no_draft import NoDrafter
from specengine.engine.times import NUM_TIMES, Clock, RoundTimes, Stopwatch
from specengine.errors import GraphCaptureError
from specengine.kernels.types.round import NUM_RESULT_COLUMNS, BoundRound
from specengine.runtime.graphs import Pending, Recorder, ResultRing, bucket, draft_bucket, sizes
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RoundMode, RunningBatch, round_mode
from specengine.speculative import RoundOutcome, bind_round, run_round

# Of a recording: batch size, k, mode, and who drafts (see `RoundDrafter.prepare`).
_Key = tuple[int, int, RoundMode, Hashable]


class Done(NamedTuple):
    """Results that are there."""

    rows: list[list[int]]

    def read(self) -> list[list[int]]:
        return self.rows


class Flight(NamedTuple):
    """A round, or a prompt's first token, that is under way.

    drafter: whom to tell what became of it; None for a prompt
    watch:   times the round; None for a prompt
    """

    sequences: list[Sequence]
    batch: RunningBatch
    outcome: RoundOutcome | BoundRound
    results: Pending | Done
    drafter: RoundDrafter | None
    watch: Stopwatch | None

    @property
    def is_needed_now(self) -> bool:
        """Whether the next round would overwrite what the host has yet to read, or (as likely as not) needs to know."""
        runs_ahead = self.drafter is None or self.drafter.may_run_ahead
        return self.batch.mode.is_read_at_once or not runs_ahead

    def read_drafts(self) -> list[list[int]]:
        """Of each sequence, what was judged, and then anything."""
        if not isinstance(self.outcome, RoundOutcome):
            return self.outcome.drafts()
        drafts: list[list[int]] = self.outcome.drafts.tolist()
        return drafts

    def read(self) -> list[list[int]]:
        """The rows of its record: waits for them. What the host makes of them is timed from here on."""
        rows = self.results.read()
        if self.watch is not None:
            self.watch.begin_host()
        return rows


class Rounds:
    """The rounds of one engine.

    recorder:     records rounds for replay, or None: every round runs from Python
    is_strict:    whether a round that cannot be recorded is an error; else a warning, and rounds run from Python
    rounds_ahead: rounds that may be under way when the host has read all the others
    times:        what the latest rounds took, the last one last
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
        self._rounds_ahead = rounds_ahead
        self._clock = Clock(state.device)
        self.times: deque[RoundTimes] = deque(maxlen=NUM_TIMES)
        self._sizes = sizes(state.num_slots)
        self._recorded_transforms = state.transforms
        self._recordings: dict[_Key, Callable[[], tuple[RoundOutcome, Tensor]]] = {}
        # Those that run in one call; None: they cannot.
        self._bound: dict[_Key, BoundRound | None] = {}
        self._flights: deque[Flight] = deque()
        self._ring = ResultRing(
            # A step reads what it must after it has queued a prompt's first token and a round.
            num_entries=rounds_ahead + 2,
            num_values=state.num_slots * (NUM_RESULT_COLUMNS + MAX_NUM_SPECULATIVE_TOKENS + 1),
            device=state.device,
        )

    def record(self, k: int, mode: RoundMode) -> None:
        """Records rounds of up to `k` drafts for every batch size, the largest first: they share its memory."""
        drafter, k = self._who_drafts(k), draft_bucket(k)
        for size in reversed(self._sizes):
            who = drafter.prepare(self._select([], mode, k=k, size=size), self._state)
            if who is not None:
                self._record((size, k, mode, who), drafter)

    def may_run_in_a_row(self, running: list[Sequence]) -> bool:
        """Whether some of these may, before the host has looked at the first."""
        return self.recorder is None and not self._awaits_results(running)

    def must_read(self, running: list[Sequence]) -> bool:
        """Whether a round of these has to wait for a result: its drafter wants to know what was accepted, or code of
        a request's own which tokens there are."""
        if not self._flights:
            return False
        return self._awaits_results(running) or any(each.params.logits_processor for each in running)

    def launch(self, sequences: list[Sequence], *, max_rounds: int = 1, max_seconds: float = 0.0) -> int:
        """Queues a round of these sequences, or up to `max_rounds` in a row, of which none begins after `max_seconds`,
        where they run in one call; returns how many, and reads no result."""
        k = max(0, *(sequence.max_draft_tokens for sequence in sequences))
        watch = self._clock.start(len(sequences), k)
        drafter, mode, size = self._who_drafts(k), round_mode(sequences), len(sequences)
        is_recordable = self.recorder is not None and not mode.has_processors
        if is_recordable:
            k, size = draft_bucket(k), bucket(size, self._sizes)
        batch = self._select(sequences, mode, k=k, size=size)
        with ranges.span(ranges.DRAFT, batch_size=len(sequences), k=k):
            who = drafter.prepare(batch, self._state)
        replay = None
        if is_recordable and who is not None:
            self._drop_outgrown()
            key = (size, k, mode, who)
            if key not in self._recordings:
                self._record(key, drafter)
                # The recording's batch of padding lay where this one does.
                batch = self._select(sequences, mode, k=k, size=size)
                self._clock.restart(watch)
            replay = self._recordings.get(key)
        bound = self._bind((size, k, mode, who), batch, drafter) if self.recorder is None else None
        if bound is not None:
            if mode.is_read_at_once or not drafter.may_run_ahead:
                max_rounds = 1
            stop_ids = [token for sequence in sequences for token in sequence.ending_ids]
            rounds = bound.run(max_rounds, max_seconds, stop_ids)
            watches = self._clock.split(watch, [parts for _, parts in rounds])
            for (rows, parts), each in zip(rounds, watches, strict=True):
                ranges.tell(parts)
                self._note(Flight(sequences, batch, bound, Done(rows), drafter, each))
            return len(rounds)
        if replay is not None:
            outcome, record = replay()
            watch.mark()
        else:
            batch = batch.without_padding()
            outcome, record = run_round(batch, self._state, self._target, drafter, mark=watch.mark)
        self.push(sequences, batch, outcome, record, drafter, watch)
        return 1

    def push(
        self,
        sequences: list[Sequence],
        batch: RunningBatch,
        outcome: RoundOutcome,
        record: Tensor,
        drafter: RoundDrafter | None,
        watch: Stopwatch | None = None,
    ) -> None:
        """Notes what is under way, and sends its record to the host."""
        self._note(Flight(sequences, batch, outcome, self._ring.push(record), drafter, watch))

    def _note(self, flight: Flight) -> None:
        self._flights.append(flight)
        if flight.drafter is not None:
            for sequence, limit in zip(flight.sequences, flight.batch.draft_limits, strict=True):
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

    def note_times(self, flight: Flight) -> RoundTimes | None:
        """What was read of a flight has been worked through. Its times, if it was a round."""
        if flight.watch is None:
            return None
        times = self._clock.stop(flight.watch)
        self.times.append(times)
        return times

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
        self._bound.clear()

    def _awaits_results(self, running: list[Sequence]) -> bool:
        """Whether who drafts for these wants to know what the round before accepted."""
        return not self.drafter.may_run_ahead and any(each.max_draft_tokens > 0 for each in running)

    def _who_drafts(self, k: int) -> RoundDrafter:
        return self.drafter if k else self._no_drafter

    def _select(self, sequences: list[Sequence], mode: RoundMode, *, k: int, size: int) -> RunningBatch:
        return self._state.select(sequences, self._kv_cache.device_block_table(), mode, k=k, size=size)

    def _record(self, key: _Key, drafter: RoundDrafter) -> None:
        """Records a round that `drafter` has prepared; unless strict, a failure is the last."""
        if self.recorder is None or key in self._recordings:
            return
        size, k, mode, _ = key
        # Padding alone, where later batches of this size lie: nothing of the host's knowledge is in it.
        batch = self._select([], mode, k=k, size=size)
        name = f"{size} sequences, k = {k}, {mode}"
        try:
            run = partial(run_round, batch, self._state, self._target, drafter)
            self._recordings[key] = self.recorder.record(name, run)
        except GraphCaptureError as error:
            if self._is_strict:
                raise
            warnings.warn(f"{error}; rounds run without CUDA graphs", RuntimeWarning, stacklevel=2)
            self.recorder = None

    def _bind(
        self, key: tuple[int, int, RoundMode, Hashable | None], batch: RunningBatch, drafter: RoundDrafter
    ) -> BoundRound | None:
        """The round in one call, if it can; not while somebody watches its parts as they happen."""
        size, k, mode, who = key
        if who is None or mode.has_processors or ranges.wants_spans():
            return None
        self._drop_outgrown()
        known = (size, k, mode, who)
        if known not in self._bound:
            self._bound[known] = bind_round(batch, self._state, self._target, drafter)
        return self._bound[known]

    def _drop_outgrown(self) -> None:
        """Forgets what was recorded with tables that have moved since."""
        if self._recorded_transforms is not self._state.transforms:
            self._recorded_transforms = self._state.transforms
            for rounds in (self._recordings, self._bound):
                for key in [key for key in rounds if key[2].has_transforms]:
                    del rounds[key]
