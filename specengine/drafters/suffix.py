"""The longest suffix of a text that occurred before, whatever its length, and what followed it most often.

`draft_model="suffix"` keeps a suffix automaton of each request's own text (csrc/core/suffix_automaton.h);
`"suffix:history"` also one of what earlier requests said, and follows the longer match of the two. A draft is at most
as long as its match, and ends where fewer than a tenth of the occurrences went on like it. Memory is bounded: a text
that outgrows its share forgets its older half.

With a history a request's drafts depend on earlier requests, and so does what `acceptance="rejection"` makes of a
seed; greedy and coupled output do not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specengine._C import SuffixAutomaton
from specengine.drafters.base import DrafterContext, DraftProposal
from specengine.models.decoder import DecoderSpec
from specengine.runtime.state import RunningBatch

_HISTORY = "history"
# Between two texts of the history; never drafted.
_SEPARATOR = -1
# How many tokens at a text's end are looked for in the history. As many stand there before an output, so that its
# first tokens can be found too.
_NUM_CONTEXT = 32


def check(argument: str, target: DecoderSpec | None) -> None:
    """Raises `ValueError` for what is no option."""
    if argument not in ("", _HISTORY):
        raise ValueError(f"what follows the colon must be {_HISTORY!r}")


def build(context: DrafterContext) -> SuffixDrafter:
    """The history gets half of the memory, the texts that run at a time the rest."""
    num_tokens = context.num_bytes // SuffixAutomaton.MAX_BYTES_PER_TOKEN
    history_size = num_tokens // 2 if context.argument == _HISTORY else 0
    text_size = min(context.max_seq_len, (num_tokens - history_size) // context.max_batch_size)
    return SuffixDrafter(text_size=max(2, text_size), history_size=history_size)


class SuffixDrafter:
    """Follows the end of each text as it went on before.

    text_size, history_size: tokens of a text, and of all earlier outputs, that are remembered; 0: no history
    """

    def __init__(self, *, text_size: int, history_size: int = 0) -> None:
        self.name = "suffix:history" if history_size else "suffix"
        self._text_size = text_size
        self._texts: dict[int, SuffixAutomaton] = {}
        self._history = _History(history_size) if history_size else None

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        text = self._texts.get(sequence_id)
        if text is None:
            text = self._texts[sequence_id] = SuffixAutomaton(self._text_size)
        text.append(tokens[text.num_seen :])
        if self._history is not None:
            self._history.hear(sequence_id, tokens)

    def propose(self, batch: RunningBatch) -> DraftProposal:
        rows = zip(batch.sequence_ids, batch.draft_limits, strict=True)
        drafts = [self.follow(sequence_id, (), limit) for sequence_id, limit in rows]
        return DraftProposal.from_lists(drafts, device=batch.slots.device)

    def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> list[int]:
        """Of equally long matches the text's own counts."""
        match_length, tokens = self._texts[sequence_id].draft(limit, drafted)
        if self._history is not None:
            history_length, history_tokens = self._history.draft(sequence_id, drafted, limit)
            if history_length > match_length:
                return history_tokens
        return tokens

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Nothing to do: it hears of every token."""

    def release(self, sequence_id: int) -> None:
        self._texts.pop(sequence_id, None)
        if self._history is not None:
            self._history.release(sequence_id)


class _History:
    """What ended sequences said, each after the end of what came before it."""

    def __init__(self, max_tokens: int) -> None:
        self._automaton = SuffixAutomaton(max_tokens)
        # Of a running sequence, how many tokens came before those that are kept, and these.
        self._running: dict[int, tuple[int, list[int]]] = {}

    def hear(self, sequence_id: int, tokens: Sequence[int]) -> None:
        """The first call comes with one new token. What a preempted sequence said before is history already."""
        start = max(0, len(tokens) - 1 - _NUM_CONTEXT)
        start, kept = self._running.setdefault(sequence_id, (start, []))
        kept += tokens[start + len(kept) :]

    def draft(self, sequence_id: int, drafted: Sequence[int], limit: int) -> tuple[int, list[int]]:
        """Length of the match with the end of the sequence and of `drafted`, and what followed it."""
        _, kept = self._running[sequence_id]
        return self._automaton.draft_after([*kept[-_NUM_CONTEXT:], *drafted][-_NUM_CONTEXT:], limit)

    def release(self, sequence_id: int) -> None:
        _, kept = self._running.pop(sequence_id, (0, []))
        if kept:
            self._automaton.append([*kept, _SEPARATOR])
