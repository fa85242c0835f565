"""Drafters that cost no model and do exactly what they are told. All are deterministic and propose point masses.

    drafter = PerfectDrafter(vocab_size=64)
    engine = build_engine(path, drafter)                     # the fixture of conftest.py
    drafter.learn(plain(engine, prompt))                     # prompt + plain's continuation
    spec(engine, prompt, 4)                                  # everything is accepted

A drafter drafts from the known text that starts with what a sequence has committed; where there is none (or it
has ended), from a stream that depends on the committed tokens only, so alone and in a batch it says the same.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from specengine.drafters.base import DraftProposal
from specengine.outputs import GenerationResult
from specengine.runtime.state import RunningBatch


@dataclass(frozen=True)
class Known:
    """A text to draft from. counts: how many tokens its rounds accept, in turn (`ScriptedDrafter` only)."""

    token_ids: tuple[int, ...]
    counts: tuple[int, ...] = ()


class KnowingDrafter:
    """The base: subclasses say what they make of the true continuation.

    proposed: every non-empty proposal, in order; accepted: what `observe` was told for it; released: sequence ids
    """

    name = "knowing"

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.proposed: list[list[int]] = []
        self.accepted: list[int] = []
        self.released: list[int] = []
        self._texts: list[Known] = []
        self._num_rounds: Counter[int] = Counter()

    def learn(
        self,
        *texts: GenerationResult | Sequence[GenerationResult] | Sequence[int],
        counts: Iterable[int] = (),
    ) -> None:
        """Adds texts: results (prompt and every sample's continuation) or lists of token ids."""
        for text in texts:
            if isinstance(text, GenerationResult):
                for output in text.outputs:
                    whole = (*text.prompt_token_ids, *output.token_ids)
                    self._texts.append(Known(whole, tuple(counts)))
            elif text and isinstance(text[0], GenerationResult):
                self.learn(*text, counts=counts)
            else:
                self._texts.append(Known(tuple(text), tuple(counts)))

    def forget(self) -> None:
        """Back to knowing nothing, with empty records."""
        for record in (self.proposed, self.accepted, self.released, self._texts, self._num_rounds):
            record.clear()

    def propose(self, batch: RunningBatch) -> DraftProposal:
        drafts = []
        for index, (sequence_id, limit) in enumerate(
            zip(batch.sequence_ids, batch.draft_limits, strict=True)
        ):
            committed = batch.committed(index)
            known = self._find(committed)
            truth = list(known.token_ids[len(committed) :])[:limit]
            draft = self.draft(truth, committed, limit, known, self._num_rounds[sequence_id])[:limit]
            self._num_rounds[sequence_id] += 1
            drafts.append(draft)
        self.proposed += [draft for draft in drafts if draft]
        self._was_drafted = [bool(draft) for draft in drafts]
        return DraftProposal.from_lists(drafts, device=batch.seq_len.device)

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        counts = zip(num_accepted.tolist(), self._was_drafted, strict=True)
        self.accepted += [count for count, was_drafted in counts if was_drafted]

    def release(self, sequence_id: int) -> None:
        self.released.append(sequence_id)
        self._num_rounds.pop(sequence_id, None)

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        """The proposal, given what is known to follow (at most `limit` tokens, fewer where the text ends)."""
        raise NotImplementedError

    def _find(self, committed: list[int]) -> Known:
        """The longest known text that starts with what is committed."""
        matches = [known for known in self._texts if list(known.token_ids[: len(committed)]) == committed]
        return max(matches, key=lambda known: len(known.token_ids), default=Known(()))

    def _noise(self, committed: list[int], count: int) -> list[int]:
        """Pseudo-random ids that depend on the committed tokens only."""
        return random.Random(repr(committed)).choices(range(self.vocab_size), k=count)

    def _wrong(self, token: int) -> int:
        return (token + 1) % self.vocab_size


class PerfectDrafter(KnowingDrafter):
    """PERFECT: proposes the known continuation, and nothing where it ends."""

    name = "perfect"

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        return truth


class AdversarialDrafter(KnowingDrafter):
    """ADVERSARIAL: right up to position `wrong_at` of every proposal, wrong there and right again after it.

    Exactly min(wrong_at, k) tokens are accepted. Noise where nothing is known.
    """

    name = "adversarial"

    def __init__(self, *, vocab_size: int, wrong_at: int = 0) -> None:
        super().__init__(vocab_size=vocab_size)
        self.wrong_at = wrong_at

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        draft = truth + self._noise(committed, limit - len(truth))
        if self.wrong_at < len(truth):
            draft[self.wrong_at] = self._wrong(draft[self.wrong_at])
        return draft


class ScriptedDrafter(KnowingDrafter):
    """Round i of a sequence accepts exactly counts[i % len(counts)] tokens (or k, if that is less).

    counts: for texts that were learned without counts of their own. Noise where nothing is known.
    """

    name = "scripted"

    def __init__(self, *, vocab_size: int, counts: Iterable[int] = (0,)) -> None:
        super().__init__(vocab_size=vocab_size)
        self.counts = tuple(counts)

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        counts = known.counts or self.counts
        wrong_at = counts[round_index % len(counts)]
        draft = truth + self._noise(committed, limit - len(truth))
        return [token if index < wrong_at else self._wrong(token) for index, token in enumerate(draft)]


class RandomDrafter(KnowingDrafter):
    """RANDOM: pseudo-random ids, the same for the same committed tokens."""

    name = "random"

    def draft(
        self, truth: list[int], committed: list[int], limit: int, known: Known, round_index: int
    ) -> list[int]:
        return self._noise(committed, limit)
