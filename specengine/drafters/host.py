"""A `Drafter` of the caller's in the engine's rounds: it works on the host, and what it proposes is uploaded."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import index

import torch
from torch import Tensor

from specengine.drafters.base import (
    Drafter,
    DraftProposal,
    DraftSource,
    ListeningDrafter,
    LookupDrafter,
    RowResult,
)
from specengine.drafters.given import take_proposal
from specengine.errors import blame
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.sequence import Sequence as HostSequence
from specengine.runtime.state import BatchState, RunningBatch


@dataclass
class _Heard:
    """What a listening drafter has been told of a sequence: the first num_heard of these tokens."""

    tokens: list[int] = field(default_factory=list)
    num_heard: int = 0


class HostDrafter:
    """Asks the caller's drafter before a round, checks what it proposes, and uploads it."""

    draft_positions = 2**31 - 1
    may_run_ahead = False

    def __init__(self, drafter: Drafter, *, vocab_size: int) -> None:
        self.name = drafter.name
        self._drafter = drafter
        # Asked once: to find out what a protocol wants takes longer than to hear.
        self._listener = drafter if isinstance(drafter, ListeningDrafter) else None
        self._lookup = drafter if isinstance(drafter, LookupDrafter) else None
        self._vocab_size = vocab_size
        self._uploads: dict[int, tuple[Tensor, Tensor]] = {}
        # The round's own: a proposal with a law until it is judged, and the batch until the drafter has observed it.
        self._proposal: DraftProposal | None = None
        self._asked: RunningBatch | None = None
        self._heard: dict[int, _Heard] = {}

    @property
    def runner(self) -> ModelRunner | None:
        """The model that it drafts with, if it is the engine's."""
        runner = getattr(self._drafter, "runner", None)
        return runner if isinstance(runner, ModelRunner) else None

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """Asks the drafter. The proposal's tokens are uploaded; a law stays where it is, and is not for recordings."""
        self._proposal = None
        if batch.size:
            proposal = self.ask(batch, state)
            if proposal.logits is not None:
                self._proposal = proposal
                return None
            tokens, num_tokens = self._upload(state, batch.k)
            tokens.zero_()
            num_tokens.zero_()
            tokens[: batch.size, : proposal.tokens.shape[1]] = proposal.tokens
            num_tokens[: batch.size] = proposal.num_tokens
        return "upload", self.name

    def ask(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """What the drafter proposes for the batch's sequences, checked; padding gets no row."""
        self._asked = asked = state.plan(batch.without_padding())
        if self._lookup is not None:
            rows = zip(batch.sequences, batch.draft_limits, strict=True)
            drafts = [self.follow(sequence, (), limit) for sequence, limit in rows]
            return DraftProposal.from_lists(drafts, device=batch.slots.device)
        for sequence in batch.sequences:
            self.hear(sequence)
        proposal = self._drafter.propose(asked)
        return take_proposal(proposal, asked, name=self.name, vocab_size=self._vocab_size)

    @property
    def can_follow(self) -> bool:
        """Whether it is a `LookupDrafter`."""
        return self._lookup is not None

    def follow(self, sequence: HostSequence, drafted: Sequence[int], limit: int) -> list[int]:
        """What a `LookupDrafter` has for a sequence behind what is committed and then `drafted`, checked."""
        assert self._lookup is not None, f"drafter {self.name!r} looks nothing up"
        if limit <= 0:
            return []
        try:
            return self._follow(self._lookup, sequence, drafted, limit)
        except Exception as error:
            blame(error, sequence.request.request_id)
            raise

    def _follow(
        self, lookup: LookupDrafter, sequence: HostSequence, drafted: Sequence[int], limit: int
    ) -> list[int]:
        self.hear(sequence)
        found = lookup.follow(sequence.sequence_id, drafted, limit)
        try:
            tokens = list(map(index, found))[:limit]
        except TypeError:
            raise TypeError(
                f"drafter {self.name!r}: follow must return token ids, got {reprlib.repr(found)}"
            ) from None
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._vocab_size):
            wrong = next(token for token in tokens if not 0 <= token < self._vocab_size)
            raise ValueError(
                f"drafter {self.name!r} proposed token id {wrong}, outside 0 … {self._vocab_size - 1}"
            )
        return tokens

    def source(self, batch: RunningBatch, state: BatchState) -> DraftSource:
        """What was uploaded."""
        return DraftSource(given=self._upload(state, batch.k))

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """What was prepared for this round."""
        proposal, self._proposal = self._proposal, None
        if proposal is None:
            count = batch.slots.numel()
            tokens, num_tokens = self._upload(state, batch.k)
            # Rows that do not run, padding's for one, still hold what was there before.
            used = torch.minimum(num_tokens[:count], batch.planned.num_draft)
            proposal = DraftProposal(tokens[:count], used)
        state.stage(batch, proposal.tokens)
        return proposal

    def observe(self, batch: RunningBatch, results: Sequence[RowResult | None]) -> None:
        """Passed on, as the public interface has it."""
        asked, self._asked = self._asked, None
        assert asked is not None, "a round is observed once"
        counts = [0 if result is None else result.num_accepted for result in results]
        self._drafter.observe(asked, torch.tensor(counts, dtype=torch.int32, device=batch.slots.device))

    def hear(self, sequence: HostSequence) -> None:
        """Passed on to a drafter that listens, unless it has heard."""
        if self._listener is None:
            return
        heard = self._heard.setdefault(sequence.sequence_id, _Heard())
        prompt = sequence.request.prompt_ids
        heard.tokens += (
            sequence.output_ids[len(heard.tokens) - len(prompt) :] if heard.tokens else sequence.token_ids
        )
        if heard.num_heard < len(heard.tokens):
            self._listener.hear(sequence.sequence_id, heard.tokens, len(heard.tokens) - heard.num_heard)
            heard.num_heard = len(heard.tokens)

    def release(self, sequence_id: int) -> None:
        """Passed on."""
        self._heard.pop(sequence_id, None)
        self._drafter.release(sequence_id)

    def first_written(self, sequence: HostSequence) -> int | None:
        """It has no keys and values."""
        return None

    def _upload(self, state: BatchState, k: int) -> tuple[Tensor, Tensor]:
        """The place of proposals of up to `k` tokens: `[slots, k]`, and their numbers `[slots]`."""
        if k not in self._uploads:
            new = state.seq_len.new_zeros
            self._uploads[k] = new(state.num_slots, k), new(state.num_slots)
        return self._uploads[k]
