"""The text side of a sequence: detokenisation, stop strings, and what may already be shown."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence

from specengine.outputs import StreamEvent, TokenSource
from specengine.tokenizer import IncrementalDetokenizer, Tokenizer

_FIRST_MARK, _MAX_NUM_MARKS = 0xD800, 0x800
_MARKS = re.compile("[\ud800-\udfff]")


class TextStream:
    """Turns tokens into text, finds stop strings, and holds back what might still become one.

    Special tokens are no part of the text, but a stop string may hold some: they are marked in it then, by half
    surrogate pairs, which no text holds. Without a tokenizer the text stays empty and stop strings cannot occur.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: list[int],
        *,
        stop: tuple[str, ...],
        include_stop: bool,
    ) -> None:
        self._marked = ""
        self._offsets: list[int] = []
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt_ids)
        self._stop = stop
        self._include_stop = include_stop
        self._marks = {} if tokenizer is None else _mark_special_tokens(tokenizer, stop)
        self._patterns = _patterns(stop, self._marks)
        self._is_closed = False

    @property
    def text(self) -> str:
        """The text so far, cut at a stop string."""
        return _without_marks(self._marked) if self._marks else self._marked

    def offsets(self, num_tokens: int) -> list[int]:
        """Where in the text each of the sequence's tokens begins. One that is inside a character, which a later one
        completes, begins and ends where that does; one that is not shown is at the text's end."""
        end = len(self.text)
        found = [
            len(_without_marks(self._marked[:at])) if self._marks else min(at, end) for at in self._offsets
        ]
        return found[:num_tokens] + [end] * (num_tokens - len(found))

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
        self._offsets.append(len(self._marked))
        if self._detokenizer is None:
            return None
        mark = self._marks.get(token_id, ("", ""))[1]
        return self._append(mark or self._detokenizer.push(token_id), may_stop=may_stop)

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
        if self._is_closed:
            return len(self.text)
        end = len(self._marked) - self._num_held_back()
        return len(_without_marks(self._marked[:end])) if self._marks else end

    def _append(self, piece: str, *, may_stop: bool) -> str | None:
        num_before = len(self._marked)
        self._marked += piece
        if not may_stop or not piece:
            return None
        matches = []
        for order, (pattern, string) in enumerate(self._patterns):
            at = self._marked.find(pattern, max(0, num_before - len(pattern) + 1))
            if at >= 0:
                matches.append((at, order, string))
        if not matches:
            return None
        at, _, matched = min(matches)
        self._marked = self._marked[:at] + (matched if self._include_stop else "")
        self._is_closed = True
        return matched

    def _num_held_back(self) -> int:
        longest = 0
        for pattern, _ in self._patterns:
            for length in range(min(len(pattern) - 1, len(self._marked)), longest, -1):
                if self._marked.endswith(pattern[:length]):
                    longest = length
                    break
        return longest


class TokenPainter:
    """Splits streamed text by the tokens it came from. The pieces add up to exactly the events' text.

    An event's text may lag behind its ids (a character needs all its bytes, a stop string may be held back),
    so the tokens are decoded here once more, and the text is dealt out to them in order.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int]) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt_ids)
        self._lengths: deque[tuple[int, TokenSource]] = deque()

    def split(self, event: StreamEvent) -> Iterator[tuple[str, TokenSource]]:
        """The event's new text in pieces, each with the source of the token that completed it."""
        self._note_tokens(event)
        rest = event.text_delta
        while rest:
            length, source = self._lengths.popleft() if self._lengths else (len(rest), "target")
            piece, rest = rest[:length], rest[length:]
            if length > len(piece):
                self._lengths.appendleft((length - len(piece), source))
            yield piece, source

    def _note_tokens(self, event: StreamEvent) -> None:
        if self._detokenizer is None:
            return
        for token_id, source in zip(event.token_ids, event.token_source, strict=True):
            text = self._detokenizer.push(token_id)
            if text:
                self._lengths.append((len(text), source))


def _mark_special_tokens(tokenizer: Tokenizer, stop: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """The special tokens that stop strings hold, by id: how they are written, and one character that marks each."""
    wanted = {
        token_id: content
        for token_id, content in tokenizer.special_tokens.items()
        if content and any(content in string for string in stop)
    }
    return {
        token_id: (content, chr(_FIRST_MARK + order))
        for order, (token_id, content) in enumerate(list(wanted.items())[:_MAX_NUM_MARKS])
    }


def _patterns(stop: tuple[str, ...], marks: dict[int, tuple[str, str]]) -> list[tuple[str, str]]:
    """What to look for, and the stop string that it is: as it is spelled, and with special tokens as marks."""
    found = []
    for string in stop:
        marked = string
        for content, mark in sorted(marks.values(), key=lambda item: -len(item[0])):
            marked = marked.replace(content, mark)
        found += [(string, string)] + ([(marked, string)] if marked != string else [])
    return found


def _without_marks(text: str) -> str:
    return _MARKS.sub("", text)
