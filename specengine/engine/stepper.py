"""The step: moves every running sequence one round further, and mends what an interruption leaves."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from specengine.adaptive import Chooser
from specengine.drafters.base import RoundDrafter
from specengine.engine import record
from specengine.engine.prompts import Prompts
from specengine.engine.record import Records
from specengine.engine.rounds import Flight, Rounds
from specengine.engine.scheduler import Plan, Scheduler
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import (
    MAX_ROUNDS_UNREAD,
    UNREAD_SECONDS_A_ROUND,
    Request,
    Sequence,
)
from specengine.runtime.state import BatchState


class Stepper:
    """Prompts, rounds and their records, in turn. One thread at a time.

    is_stepping: whether a step is under way: then nobody may be ended
    chooser:     of k, for requests that leave it open
    """

    def __init__(
        self,
        kv_cache: KVCache,
        state: BatchState,
        target: ModelRunner,
        drafter: RoundDrafter,
        rounds: Rounds,
        *,
        chunk_size: int,
        hides_host: bool,
    ) -> None:
        self.is_stepping = False
        self.chooser = Chooser.of(drafter, hides_host=hides_host)
        # One for all steps: to make another takes longer than to enter it.
        self._inference_mode = torch.inference_mode()
        # Seconds of the host's before the latest round.
        self._preparation = 0.0
        self._kv_cache = kv_cache
        self._state = state
        self._drafter = drafter
        self._rounds = rounds
        self.scheduler = Scheduler(
            kv_cache,
            state,
            chunk_size=chunk_size,
            drafter=drafter,
            on_pressure=self._collect_one,
        )
        self._records = Records(kv_cache, target, on_settled=self._after_round)
        self._prompts = Prompts(target, state, kv_cache, rounds, self.scheduler, on_scored=self._end_scored)

    def step(self) -> None:
        """One step. Whatever interrupts it, what is settled stays, and the next step goes on from there."""
        with self._inference_mode:
            self._step()

    def _step(self) -> None:
        try:
            self.is_stepping = True
            begun = time.perf_counter()
            while self.chooser.reads_text(self.scheduler.running) and self._collect_one():
                pass
            self.chooser.choose(self.scheduler.running)
            while self._rounds.must_read(self.scheduler.running):
                self._collect_one()
            num_unread = self._num_unread()
            plan = self.scheduler.schedule(min(self.chooser.max_rounds, num_unread))
            self._preparation = time.perf_counter() - begun
            self._run(plan, max_seconds=UNREAD_SECONDS_A_ROUND * num_unread)
            self.is_stepping = False  # here too: an interruption may strike the line below
        except BaseException:
            self._recover()
            raise
        finally:
            self.is_stepping = False

    def end(self, *requests: Request) -> None:
        """Ends what is unfinished of the requests, all of it even if a drafter raises on the way."""
        sequences = [sequence for request in requests for sequence in request.sequences]
        with ExitStack() as cleanup:
            for sequence in reversed(sequences):
                if not sequence.is_finished:
                    cleanup.callback(self._end, sequence)

    def _run(self, plan: Plan, *, max_seconds: float) -> None:
        scheduler = self.scheduler
        is_stuck = not (plan.chunks or plan.decoding or scheduler.running) and scheduler.has_work
        assert not is_stuck, f"{len(scheduler.waiting)} sequences wait, and nobody runs"
        if plan.chunks:
            self._prompts.run(plan.chunks)
        if plan.decoding:
            num_rounds = self._rounds.launch(
                plan.decoding, max_rounds=plan.num_rounds, max_seconds=max_seconds
            )
            self.chooser.go_on(num_rounds - 1)
        while (flight := self._rounds.pop_due(has_launched=bool(plan.decoding))) is not None:
            self._collect(flight)
        if not scheduler.has_work:
            self._rounds.clear()

    def _num_unread(self) -> int:
        """How many rounds may run in a row before the host looks at the first: nobody wants to know of them."""
        running = self.scheduler.running
        if not self._rounds.may_run_in_a_row(running):
            return 1
        return min([MAX_ROUNDS_UNREAD, *(each.max_rounds_unread for each in running)])

    def _collect_one(self) -> bool:
        """Reads what has been under way longest; whether there was anything."""
        flight = self._rounds.pop()
        if flight is not None:
            self._collect(flight)
        return flight is not None

    def _collect(self, flight: Flight) -> None:
        results = self._records.collect(flight)
        times = self._rounds.note_times(flight)
        if times is not None:
            self.chooser.observe(
                flight.sequences,
                flight.batch.draft_limits,
                results,
                ways=flight.batch.ways,
                device=times.device,
                draft=times.draft,
                verify=times.verify,
                host=times.host + self._preparation,
            )
            self._preparation = 0.0

    def _recover(self) -> None:
        """What is settled is the truth; everything else is made to agree with it, or is unreachable again."""
        self._rounds.clear()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            sequence.forget_unsettled()
        self.scheduler.recover()
        for sequence in list(self.scheduler.running):
            assert sequence.slot is not None, f"sequence {sequence.sequence_id} has no slot"
            self._state.admit(sequence)
            self._kv_cache.manager.rollback(sequence.slot, max(0, sequence.num_tokens - 1))
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._after_settled(sequence)

    def _after_round(self, sequence: Sequence) -> None:
        self._drafter.hear(sequence)
        self._after_settled(sequence)

    def _after_settled(self, sequence: Sequence) -> None:
        sequence.request.on_news(sequence.request)
        if sequence.is_finished:
            self.scheduler.remove(sequence)
            self.chooser.release(sequence.sequence_id)

    def _end_scored(self, sequence: Sequence) -> None:
        sequence.request.first_token_time = sequence.request.last_token_time = time.perf_counter()
        record.finish(sequence, "length")
        self._after_settled(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.request.on_news(sequence.request)
        record.finish(sequence, "abort")
        self._after_settled(sequence)
