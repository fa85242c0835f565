"""Who runs in the next step: continuous batching, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from specengine.drafters.base import RoundDrafter
from specengine.errors import OutOfBlocksError, UnknownSequenceError
from specengine.runtime.kv_cache import TARGET, KVCache
from specengine.runtime.sequence import Request, Sequence
from specengine.runtime.state import BatchState

# Blocks are reserved for several rounds while one in so many is free.
_ROOMY_SHARE = 4


@dataclass(frozen=True)
class Chunk:
    """Tokens start … start + length - 1 of a sequence that has not computed all of its prompt."""

    sequence: Sequence
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.sequence.num_tokens_to_compute

    @property
    def decides_first(self) -> bool:
        """Whether its last row decides the sequence's first token."""
        return self.is_last and not self.sequence.output_ids and self.sequence.remaining > 0


@dataclass(frozen=True)
class Plan:
    """One step: prompt chunks for one forward, and the sequences of one round, or of up to `num_rounds` in a row."""

    chunks: list[Chunk]
    decoding: list[Sequence]
    num_rounds: int = 1


class Scheduler:
    """Owns the queues and decides who holds KV blocks. First come, first served; the latest is preempted first."""

    def __init__(
        self,
        kv_cache: KVCache,
        state: BatchState,
        *,
        chunk_size: int,
        drafter: RoundDrafter,
        on_pressure: Callable[[], bool],
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._kv_cache = kv_cache
        self._manager = kv_cache.manager
        self._state = state
        self._chunk_size = chunk_size
        self._drafter = drafter
        self._on_pressure = on_pressure

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def requests(self) -> list[Request]:
        """Every request that is queued or running."""
        return list(dict.fromkeys(sequence.request for sequence in [*self.running, *self.waiting]))

    def add(self, request: Request) -> None:
        """Queues every sample of a request."""
        self.waiting.extend(request.sequences)

    def schedule(self, max_rounds: int = 1) -> Plan:
        """Reserves blocks for a round of everyone who decodes, admits whom there is room for, cuts prompt chunks.

        For up to `max_rounds` in a row where there is nothing else to do, and blocks enough.
        """
        prefilled = [sequence for sequence in self.running if self._is_prefilled(sequence)]
        is_all = len(prefilled) == len(self.running) and not self.waiting
        if not is_all or self._manager.num_free_blocks * _ROOMY_SHARE < self._kv_cache.num_usable_blocks:
            max_rounds = 1
        while max_rounds > 1 and self._num_blocks(prefilled, max_rounds) > self._manager.num_free_blocks:
            max_rounds //= 2
        decoding = self._reserve(prefilled, max_rounds)
        if is_all:
            return Plan([], decoding, max_rounds)
        self._admit()
        return Plan(self._cut_chunks(others_than=set(prefilled)), decoding)

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out, wherever it is; its full blocks stay findable by prefix."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self._release(sequence)

    def recover(self) -> None:
        """After an interruption: makes queues and slots agree with each sequence's place, and no slot without one.

        Whoever was being given blocks computes anew: copies may not have been made.
        """
        lost = [sequence for sequence in self.running if sequence.slot is None]
        for sequence in self.running:
            if sequence.slot is not None and sequence.slot == self._kv_cache.interrupted_slot:
                self.waiting.appendleft(sequence)
                sequence.place = sequence.place._replace(slot=None)
                lost.append(sequence)
        self.running = [sequence for sequence in self.running if sequence.slot is not None]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.slot is None)
        owned = {sequence.slot for sequence in self.running}
        for slot in range(self._state.num_slots):
            if slot not in owned:
                with suppress(UnknownSequenceError):
                    self._manager.free(slot)
        self._kv_cache.interrupted_slot = None
        for sequence in lost:
            self._drafter.release(sequence.sequence_id)

    def publish(self, sequence: Sequence) -> None:
        """Makes the sequence's full computed blocks findable by prefix."""
        assert sequence.slot is not None, f"sequence {sequence.sequence_id} has no slot"
        self._manager.publish(sequence.slot, sequence.token_array())

    def num_computed(self, sequence: Sequence) -> int:
        """The target's watermark."""
        slot = sequence.slot
        assert slot is not None, f"sequence {sequence.sequence_id} has no slot"
        return self._kv_cache.num_computed(slot, TARGET)

    def _is_prefilled(self, sequence: Sequence) -> bool:
        return bool(sequence.output_ids) and self.num_computed(sequence) >= sequence.num_tokens_to_compute

    def _num_blocks(self, decoding: list[Sequence], num_rounds: int) -> int:
        """The most blocks that so many rounds of those may need besides what they hold, one that is shared included."""
        blocks_for = self._kv_cache.blocks_for
        return sum(
            blocks_for(each.max_num_computed(num_rounds)) - blocks_for(each.num_tokens) + 1
            for each in decoding
        )

    def _reserve(self, decoding: list[Sequence], num_rounds: int) -> list[Sequence]:
        """Blocks for rounds of those; whoever is preempted for that, or may emit no more, is left out."""
        reserved: list[Sequence] = []
        for sequence in decoding:
            while (
                sequence.slot is not None and sequence.may_run and not self._try_reserve(sequence, num_rounds)
            ):
                # What is under way may end somebody; only then is anybody's work thrown away.
                if not self._on_pressure():
                    self._preempt(self.running[-1])
            reserved.append(sequence)
        return [sequence for sequence in reserved if sequence.slot is not None and sequence.may_run]

    def _try_reserve(self, sequence: Sequence, num_rounds: int) -> bool:
        slot = sequence.slot
        assert slot is not None, f"sequence {sequence.sequence_id} has no slot"
        first = self._kv_cache.num_computed(slot, TARGET)
        drafted = self._drafter.first_written(sequence)
        first = first if drafted is None else min(first, drafted)
        try:
            self._kv_cache.reserve(slot, first, sequence.max_num_computed(num_rounds))
        except OutOfBlocksError:
            return False
        return True

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if self._manager.num_sequences == self._state.num_slots:
                return
            if self._awaits_sibling(sequence):
                continue
            if not self._try_admit(sequence):
                return

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether another sample of the same prompt is still computing the KV that this one will share: the
        target's in its prefill, the draft's in its first round."""

        def is_computing(other: Sequence) -> bool:
            is_drafted = other.settled.num_rounds > 0 or other.max_draft_tokens <= 0
            return other.slot is not None and not (self._is_prefilled(other) and is_drafted)

        siblings = sequence.request.sequences
        return not sequence.output_ids and any(
            is_computing(other) for other in siblings if other is not sequence
        )

    def _try_admit(self, sequence: Sequence) -> bool:
        slot = self._share_prefix(sequence)
        try:
            num_tokens = sequence.num_tokens_to_compute
            computed = self._kv_cache.num_computed(slot, TARGET)
            needed = self._manager.num_blocks_needed(slot, computed, num_tokens)
            # Each running sequence may want one more block soon: admitting into the last ones would only preempt.
            is_room = needed + len(self.running) <= self._manager.num_free_blocks
            if is_room:
                self._kv_cache.reserve(slot, computed, num_tokens)
                # It is in the queue that its place says whenever an interruption comes.
                self.running.append(sequence)
                cached = sequence.place.num_cached_tokens
                sequence.place = sequence.place._replace(
                    slot=slot, num_cached_tokens=computed if cached is None else cached
                )
                self._state.admit(sequence)
                self.waiting.remove(sequence)
        finally:
            if sequence.slot is None:
                self._manager.free(slot)
        return is_room

    def _share_prefix(self, sequence: Sequence) -> int:
        """A slot that starts with what others have computed: a sibling's prompt, or blocks of an equal prefix."""
        request = sequence.request
        limit = sequence.num_tokens - 1
        if not sequence.output_ids and sequence.sample_index > 0:
            for other in request.sequences:
                if other is not sequence and other.slot is not None:
                    return int(self._manager.fork(other.slot, limit))
        if request.params.prompt_logprobs is not None and sequence.sample_index == 0:
            limit = 0  # every prompt row's logits are wanted
        return int(self._manager.allocate(sequence.token_array(), limit))

    def _cut_chunks(self, others_than: set[Sequence]) -> list[Chunk]:
        chunks = []
        budget = self._chunk_size
        for sequence in [sequence for sequence in self.running if sequence not in others_than]:
            start = self.num_computed(sequence)
            length = min(sequence.num_tokens_to_compute - start, budget)
            if length > 0:
                chunks.append(Chunk(sequence, start, length))
                budget -= length
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        self.waiting.appendleft(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks. The drafter hears of it last: its errors find nothing half done."""
        slot = sequence.slot
        assert slot is not None, f"sequence {sequence.sequence_id} has no slot"
        self.publish(sequence)
        is_preempted = not sequence.is_finished
        num_preemptions = sequence.place.num_preemptions + is_preempted
        sequence.place = sequence.place._replace(slot=None, num_preemptions=num_preemptions)
        self.running.remove(sequence)
        self._manager.free(slot)
        self._drafter.release(sequence.sequence_id)
