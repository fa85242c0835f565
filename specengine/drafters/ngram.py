"""Prompt lookup (Saxena, 2023): what followed the last occurrence of the text's last few tokens follows again.

`draft_model="ngram"` looks for the last 2 to 4 tokens, the longest first; `"ngram:3"` and `"ngram:1-5"` say which
lengths. Among equally long matches the most recent one counts. Each token costs a look-up and an entry a length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from specengine.drafters.base import DrafterContext, DraftProposal
from specengine.models.decoder import DecoderSpec
from specengine.runtime.state import RunningBatch

_MOST = 32
_DEFAULT = "2-4"


def check(argument: str, target: DecoderSpec | None) -> None:
    """Raises `ValueError` for what are no lengths."""
    _read_lengths(argument)


def build(context: DrafterContext) -> NgramDrafter:
    return NgramDrafter(*_read_lengths(context.argument))


class NgramDrafter:
    """Looks for the last tokens of each text in that text; the longest of shortest … longest tokens counts."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.name = f"ngram:{shortest}-{longest}"
        self._lengths = range(longest, shortest - 1, -1)
        self._texts: dict[int, _Text] = {}

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        text = self._texts.setdefault(sequence_id, _Text(self._lengths))
        text.append(tokens[len(text.tokens) :])

    def propose(self, batch: RunningBatch) -> DraftProposal:
        rows = zip(batch.sequence_ids, batch.draft_limits, strict=True)
        drafts = [self.follow(sequence_id, (), limit) for sequence_id, limit in rows]
        return DraftProposal.from_lists(drafts, device=batch.slots.device)

    def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> list[int]:
        """What is drafted is looked for, and nothing is looked for in it."""
        return self._texts[sequence_id].draft(drafted, limit)

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Nothing to do: it hears of every token."""

    def release(self, sequence_id: int) -> None:
        self._texts.pop(sequence_id, None)


class _Text:
    """A text, and where each of its n-grams was followed by something: the position of what followed last."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._lengths = lengths
        self._followed_at: dict[tuple[int, ...], int] = {}

    def append(self, tokens: Sequence[int]) -> None:
        """An interruption between two lines loses nothing: what was noted for a token is noted again."""
        for token in tokens:
            for length in self._lengths:
                if length <= len(self.tokens):
                    self._followed_at[tuple(self.tokens[-length:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, drafted: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens. A match that overlaps the end is a repetition, and goes on as one."""
        known, num_known = self.tokens, len(self.tokens)
        end = [*known[-self._lengths[0] :], *drafted] if drafted else known
        for length in self._lengths:
            start = self._followed_at.get(tuple(end[-length:]))
            if start is not None:
                period = num_known + len(drafted) - start
                places = [start + offset % period for offset in range(limit)]
                return [known[at] if at < num_known else drafted[at - num_known] for at in places]
        return []


def _read_lengths(argument: str) -> tuple[int, int]:
    """Of `"3"` or `"2-4"`, the shortest and the longest."""
    match = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", argument or _DEFAULT)
    shortest, longest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= shortest <= longest <= _MOST:
        raise ValueError(
            "the lengths of a match must be a number or two, as in 'ngram:3' or 'ngram:2-4', "
            f"from 1 to {_MOST}, the shorter one first"
        )
    return shortest, longest
