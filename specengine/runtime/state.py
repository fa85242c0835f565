"""The running batch as struct-of-arrays tensors, one row a sequence slot."""

from __future__ import annotations

from collections.abc import Sequence as Collection
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from specengine.config import MAX_NUM_SPECULATIVE_TOKENS
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.program import ForwardBatch
from specengine.kernels.types.round import RoundPlan, StateTensors
from specengine.kernels.types.rows import COLUMNS, SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.kernels.types.transforms import Transforms
from specengine.logits.tables import TransformTables
from specengine.ops.backend import Backend
from specengine.runtime.batch import FirstForward, begin_round
from specengine.runtime.sequence import Sequence

_FOREVER = 2**31 - 1
# Where a sequence has the numbers of its row, in the columns' order.
_SOURCES = tuple(attrgetter(column.source) for column in COLUMNS.values())


class RoundMode(NamedTuple):
    """What kind of round a batch needs; rounds of one mode and size run the same operations.

    rules:          the rules that its rows ask for, ascending
    has_filters:    whether any row has top-k, top-p or min-p
    wants_logprobs: whether any row's log-probabilities are wanted
    has_transforms: whether any row asks for something to be done to its logits
    has_processors: whether any row's logits go through code of its request's own: such a round runs from Python
    has_confidence: whether any row's drafts end where its draft model is not certain enough
    wants_drafts:   whether any row's drafts are wanted
    """

    rules: tuple[Rule, ...] = (Rule.MATCH,)
    has_filters: bool = False
    wants_logprobs: bool = False
    has_transforms: bool = False
    has_processors: bool = False
    has_confidence: bool = False
    wants_drafts: bool = False

    @property
    def is_read_at_once(self) -> bool:
        """Whether the host reads more of a round than its record, before the next one writes over it."""
        return self.wants_logprobs or self.has_processors or self.wants_drafts


class RunningBatch(NamedTuple):
    """B running sequences as one round sees them. Tensors are `[B]` unless said otherwise.

    Rows beyond the sequences are padding: they point at a row of the state where nothing ever runs.

    sequence_ids:   stable names, for drafters that keep state
    slots:          int32, rows of `tokens` and `block_table`
    k:              the most tokens that any sequence may draft this round
    rows:           what each sequence is judged by
    tokens:         `[S, max_seq_len + 65]` int32, committed tokens; beyond seq_len staged drafts
    block_table:    `[S, max_blocks]` int32
    transforms:     what is done to the logits, by slot; None where no sequence asks for anything
    mode:           what kind of round this is
    host_slots, lengths, draft_limits: slot, committed tokens and the most drafts of each sequence, as the host knows
                    them (`lengths` lags behind while earlier rounds have not been read)
    forced_acceptance: for timing only, see `EngineConfig`
    sequences:      the host's record of each sequence
    ways:           how each sequence drafts: its `way` and `num_own_drafts`; (): all of them 0
    plan:           what the round feeds, found on the device when it begins
    started:        the round's first forward, the draft model's or for k = 0 the target's, where the launch that made
                    the plan has begun it
    """

    sequence_ids: tuple[int, ...]
    slots: Tensor
    k: int
    rows: SamplingRows
    tokens: Tensor
    block_table: Tensor
    mode: RoundMode
    host_slots: tuple[int, ...]
    lengths: tuple[int, ...]
    draft_limits: tuple[int, ...]
    forced_acceptance: float | None = None
    transforms: Transforms | None = None
    sequences: tuple[Sequence, ...] = ()
    ways: tuple[tuple[int, int], ...] = ()
    plan: RoundPlan | None = None
    started: ForwardBatch | None = None

    @property
    def size(self) -> int:
        return len(self.sequence_ids)

    @property
    def planned(self) -> RoundPlan:
        """The plan of a round that has begun."""
        assert self.plan is not None, "the round has not begun"
        return self.plan

    @property
    def seq_len(self) -> Tensor:
        """`[B]` int32, committed tokens."""
        return self.planned.seq_len

    @property
    def max_draft(self) -> Tensor:
        """`[B]` int32, how many tokens may be drafted."""
        return self.planned.num_draft

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that judge the round. MATCH always: whoever drafts nothing is judged by it."""
        if not self.k:
            return (Rule.MATCH,)
        return (Rule.MATCH, *(rule for rule in self.mode.rules if rule != Rule.MATCH))

    @property
    def reads_law(self) -> bool:
        """Whether some draft may be judged by the law that it was drawn from."""
        return any(rule.reads_law for rule in self.rules)

    @property
    def is_decided_by_draws(self) -> bool:
        """Whether the target's own draws decide everything, so that nobody need see its logits."""
        return not (self.mode.wants_logprobs or self.mode.has_processors or self.reads_law)

    def with_plan(self, plan: RoundPlan, started: ForwardBatch | None = None) -> RunningBatch:
        """The batch of a round that begins. (`_replace`, which asks for names, takes four times as long.)"""
        return RunningBatch(*self[:-2], plan, started)

    def without_padding(self) -> RunningBatch:
        """The batch of its sequences alone."""
        if self.size == self.slots.numel():
            return self
        rows = self.rows.take(slice(self.size))
        return self._replace(slots=self.slots[: self.size], rows=rows, started=None)

    def take(self, rows: Collection[int]) -> RunningBatch:
        """The batch of some of its sequences."""
        at = torch.tensor(rows, dtype=torch.int64, device=self.slots.device)
        limits = tuple([self.draft_limits[row] for row in rows])
        return self._replace(
            sequence_ids=tuple([self.sequence_ids[row] for row in rows]),
            slots=self.slots[at],
            k=max(limits),
            rows=self.rows.take(at),
            host_slots=tuple([self.host_slots[row] for row in rows]),
            lengths=tuple([self.lengths[row] for row in rows]),
            draft_limits=limits,
            sequences=tuple([self.sequences[row] for row in rows]),
            ways=tuple([self.ways[row] for row in rows]),
            plan=None,
            started=None,
        )

    def with_limits(self, limits: Collection[int]) -> RunningBatch:
        """The batch whose sequences draft no more than this, one number each."""
        return self._replace(k=max(limits), draft_limits=tuple(limits), plan=None, started=None)

    def committed(self, index: int) -> list[int]:
        """The committed token ids of sequence `index` of this batch, the prompt's included. Asks no device."""
        return self.sequences[index].token_ids[: self.lengths[index]]


class BatchState:
    """Owns the per-slot tensors. A row means nothing until `admit` fills it; the last one is padding's."""

    def __init__(
        self,
        *,
        num_slots: int,
        max_seq_len: int,
        device: torch.device,
        backend: Backend,
        forced_acceptance: float | None = None,
    ) -> None:
        self.device = device
        self.num_slots = num_slots
        self._backend = backend
        self._forced_acceptance = forced_acceptance
        # Rounds write up to k + 1 tokens past the committed ones, wherever those end.
        width = max_seq_len + MAX_NUM_SPECULATIVE_TOKENS + 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        num_rows = num_slots + 1
        self.tokens = zeros(num_rows, width)
        self.seq_len = zeros(num_rows)
        self.length_limit = zeros(num_rows)
        self.num_speculative = zeros(num_rows)
        self.rows = SamplingRows.empty(num_rows, device)
        self._transforms = TransformTables(self.tokens)
        self._selected: dict[int, tuple[list[int], Tensor, SamplingRows]] = {}
        # `num_speculative` as the host wrote it last.
        self._num_speculative = [0] * num_slots

    def admit(self, sequence: Sequence) -> None:
        """Fills the row of a sequence that has just been given a slot."""
        slot = sequence.slot
        assert slot is not None, f"sequence {sequence.sequence_id} has no slot"
        self._forget_selections()
        ids = torch.from_numpy(sequence.token_array())
        self.tokens[slot, : ids.numel()] = ids.to(self.device)
        self.seq_len[slot] = sequence.num_tokens
        self.length_limit[slot] = sequence.length_limit
        self._set_num_speculative(slot, sequence.num_speculative_tokens)
        for values, number_of in zip(self.rows, _SOURCES, strict=True):
            values[slot] = number_of(sequence)
        self._transforms.admit(slot, sequence.logit_entries)

    def select(
        self,
        sequences: Collection[Sequence],
        block_table: Tensor,
        mode: RoundMode,
        *,
        k: int,
        size: int | None = None,
    ) -> RunningBatch:
        """The rows of `sequences`, in order, padded to `size`, for a round of up to `k` drafts each.

        The tensors of one size are the same memory every time. What a sequence drafts from here on is what its
        `num_speculative_tokens` says now.
        """
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        assert len(slots) == len(sequences), "every sequence of a round has a slot"
        for slot, sequence in zip(slots, sequences, strict=True):
            if self._num_speculative[slot] != sequence.num_speculative_tokens:
                self._set_num_speculative(slot, sequence.num_speculative_tokens)
        slots_and_padding, rows = self._select_rows(slots, size or len(slots))
        return RunningBatch(
            sequence_ids=tuple([sequence.sequence_id for sequence in sequences]),
            slots=slots_and_padding,
            k=k,
            rows=rows,
            tokens=self.tokens,
            block_table=block_table,
            transforms=self.transforms if mode.has_transforms else None,
            mode=mode,
            host_slots=tuple(slots),
            lengths=tuple([sequence.num_tokens for sequence in sequences]),
            draft_limits=tuple([min(k, max(0, sequence.max_draft_tokens)) for sequence in sequences]),
            forced_acceptance=self._forced_acceptance,
            sequences=tuple(sequences),
            ways=tuple([(sequence.way, sequence.num_own_drafts) for sequence in sequences]),
        )

    def _set_num_speculative(self, slot: int, k: int) -> None:
        """A fill, which waits for nothing; rounds that are under way keep what they were queued with."""
        self.num_speculative[slot] = k
        self._num_speculative[slot] = k

    def _select_rows(self, slots: list[int], size: int) -> tuple[Tensor, SamplingRows]:
        """The slots, padded, and their rows, which only `admit` changes: what is right is not written again."""
        padded = slots + [self.num_slots] * (size - len(slots))
        selection = self._selected.get(size)
        if selection is None or selection[0] != padded:
            of_slots = torch.tensor(padded, dtype=torch.int32, device=self.device)
            rows = self.rows.take(of_slots.long())
            if selection is not None:
                for kept, fresh in zip((selection[1], *selection[2]), (of_slots, *rows), strict=True):
                    kept.copy_(fresh)
                of_slots, rows = selection[1:]
            self._selected[size] = selection = padded, of_slots, rows
        return selection[1:]

    def _forget_selections(self) -> None:
        self._selected = {size: ([], *selection[1:]) for size, selection in self._selected.items()}

    def plan(
        self, batch: RunningBatch, *, draft_positions: int = _FOREVER, first: FirstForward | None = None
    ) -> RunningBatch:
        """The batch with what its round feeds, as the state stands now. first: a forward to be begun with it"""
        if first is None:
            return self._plan(batch, self.num_speculative, draft_positions)
        numbers = (self.seq_len, self.length_limit, self.num_speculative)
        state = StateTensors(batch.tokens, batch.block_table, *numbers)
        what = (self._backend, state, batch.slots, batch.rows, first)
        return batch.with_plan(*begin_round(*what, k=batch.k, draft_positions=draft_positions))

    def plan_within_limits(self, batch: RunningBatch, *, draft_positions: int) -> RunningBatch:
        """The same where nobody drafts more than the batch says, in whatever round it is a part of."""
        limits = [0] * (self.num_slots + 1)
        for slot, limit in zip(batch.host_slots, batch.draft_limits, strict=True):
            limits[slot] = limit
        return self._plan(batch, torch.tensor(limits, dtype=torch.int32, device=self.device), draft_positions)

    def _plan(self, batch: RunningBatch, num_speculative: Tensor, draft_positions: int) -> RunningBatch:
        where = (batch.slots, self.seq_len, self.length_limit, num_speculative)
        return batch.with_plan(self._backend.plan_round(*where, batch.k, draft_positions))

    @property
    def transforms(self) -> Transforms:
        """What is done to the logits, by slot. A request with more entries than there is room for moves the tables:
        rounds that were recorded with the old ones would read what nobody writes any more."""
        return self._transforms.tables

    def stage(self, batch: RunningBatch, drafted: Tensor) -> None:
        """Writes drafted tokens `[B, k]` behind the committed ones, where the next forward reads them."""
        if drafted.shape[1]:
            offset = torch.arange(drafted.shape[1], device=self.device)
            self.tokens[batch.slots.long()[:, None], batch.seq_len.long()[:, None] + offset] = drafted

    def commit(
        self, batch: RunningBatch, tokens: Tensor, num_accepted: Tensor, num_draft: Tensor, error: Tensor
    ) -> Tensor:
        """Appends tokens[b, : num_accepted[b] + 1] to each running sequence; returns the record of `commit_round`."""
        state = (self.tokens, self.seq_len, self.length_limit)
        rows = (batch.slots, batch.seq_len, batch.planned.is_running)
        return self._backend.commit_round(*state, *rows, tokens, num_accepted, num_draft, error)

    def commit_draws(
        self, batch: RunningBatch, drawn: Tensor, drawn_error: Tensor, drafts: Drafts, verdict: Verdict
    ) -> Tensor:
        """`commit` of what the target's draws decide, which is written to `verdict`; see the `commit_draws` op."""
        judged = (drawn, drawn_error, drafts, batch.rows, batch.planned.is_running, verdict)
        where = (self.tokens, self.seq_len, self.length_limit, batch.slots)
        return self._backend.commit_draws(*judged, *where, batch.forced_acceptance)


def round_mode(sequences: Collection[Sequence]) -> RoundMode:
    """The mode that a round of these sequences has."""
    rules: list[Rule] = []
    has_filters = wants_logprobs = has_transforms = has_processors = has_confidence = wants_drafts = False
    for sequence in sequences:
        params = sequence.params
        if sequence.rule not in rules:
            rules.append(sequence.rule)
        has_filters = has_filters or params.has_filters
        wants_logprobs = wants_logprobs or params.logprobs is not None
        has_transforms = has_transforms or sequence.has_transforms
        has_processors = has_processors or params.logits_processor != ()
        has_confidence = has_confidence or params.draft_confidence > 0.0
        wants_drafts = wants_drafts or params.return_rounds
    asked = (has_filters, wants_logprobs, has_transforms, has_processors, has_confidence, wants_drafts)
    return RoundMode(tuple(sorted(rules)) or (Rule.MATCH,), *asked)
