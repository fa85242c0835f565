"""The text side of a sequence: detokenisation, stop strings, and what may already be shown."""

from __future__ import annotations

from specengine.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """Turns tokens into text, finds stop strings, and holds back what might still become one.

    Without a tokenizer the text stays empty and stop strings cannot occur.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: list[int],
        *,
        stop: tuple[str, ...],
        include_stop: bool,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt_ids)
        self._stop = stop
        self._include_stop = include_stop
        self._is_closed = False

    def rebuilt(self, token_ids: list[int]) -> TextStream:
        """A stream that has seen these tokens, none of which ended the text; this one is left as it is."""
        stream = TextStream(
            self._tokenizer, self._prompt_ids, stop=self._stop, include_stop=self._include_stop
        )
        for token_id in token_ids:
            stream.push(token_id, may_stop=False)
        return stream

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Appends a token's text; returns the stop string that it completes, after cutting the text there."""
        if self._detokenizer is None:
            return None
        return self._append(self._detokenizer.push(token_id), may_stop=may_stop)

    def close(self, *, may_stop: bool) -> str | None:
        """Flushes what the detokenizer held back; nothing is held back any more. Returns a completed stop string."""
        matched = None
        if self._detokenizer is not None and not self._is_closed:
            matched = self._append(self._detokenizer.finish(), may_stop=may_stop)
        self._is_closed = True
        return matched

    @property
    def num_final(self) -> int:
        """Leading characters of the text that may be shown: all but what might become a stop string."""
        return len(self.text) if self._is_closed else len(self.text) - self._num_held_back()

    def _append(self, piece: str, *, may_stop: bool) -> str | None:
        num_before = len(self.text)
        self.text += piece
        if not may_stop or not piece:
            return None
        matches = []
        for order, string in enumerate(self._stop):
            at = self.text.find(string, max(0, num_before - len(string) + 1))
            if at >= 0:
                matches.append((at, order, string))
        if not matches:
            return None
        at, _, matched = min(matches)
        self.text = self.text[: at + len(matched) if self._include_stop else at]
        self._is_closed = True
        return matched

    def _num_held_back(self) -> int:
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self.text)), longest, -1):
                if self.text.endswith(string[:length]):
                    longest = length
                    break
        return longest
