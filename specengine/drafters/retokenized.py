"""A draft model that reads the target's text in tokens of its own, for two vocabularies that share too little.

What a sequence has said is turned into text, and the text into the draft's tokens. The model goes on with its likeliest
tokens, on keys and values of its own. Their text is cut into the target's tokens, which are proposed as they are (point
masses): verification is exact whatever they are, also where a request samples.

A draft depends on the committed tokens and on nothing else, so that alone, in a batch and after a preemption a sequence
drafts the same. Hence a text is cut into segments, at places that no later token moves, and each is encoded by itself.
A round encodes the last one only; what the cache holds of it stays as far as its tokens are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specengine.drafters.base import DraftProposal
from specengine.errors import VocabularyMismatchError
from specengine.kernels.types.program import DraftRows, DrawKeys, ForwardBatch
from specengine.kernels.types.rows import SamplingRows
from specengine.models.loader import LoadedModel
from specengine.runtime.batch import Feed, build_forward_batch
from specengine.runtime.kv_cache import KVCache
from specengine.runtime.model_runner import ModelRunner
from specengine.runtime.state import RunningBatch
from specengine.tokenizer import REPLACEMENT, IncrementalDetokenizer, Tokenizer, Vocabulary, num_usable_ids

# A segment of a text ends before the first space after a word from the former character on, or else at the latter.
_SEGMENT, _LONGEST_SEGMENT = 64, 256
_END_OF_WORD = re.compile(r"(?<=\S) ")
# The most tokens that a round draws of a sequence.
_MAX_DRAWS = 256
# How many of a text's last tokens show how what follows is cut.
_NUM_CONTEXT = 8
# How vocabularies spell a space.
_SPACES = ("\u2581", "\u0120")


class RetokenizedDrafter:
    """Drafts with a model of another vocabulary.

    draft, tokenizer: the model, and its own tokenizer
    target:           the target's tokenizer
    kv_cache:         of the draft alone; each slot owns its blocks. Of a text that is too long it reads the end
    vocab_size:       ids that may be proposed
    chunk_size:       the most tokens of a sequence in a forward that catches up
    """

    def __init__(
        self,
        draft: LoadedModel,
        tokenizer: Tokenizer,
        target: Tokenizer,
        kv_cache: KVCache,
        *,
        vocab_size: int,
        chunk_size: int,
    ) -> None:
        self.name = draft.name
        self.runner = ModelRunner(
            draft.decoder, kv_cache, model_index=0, vocab_size=num_usable_ids(draft.vocabulary)
        )
        self._draft = _Cutter(tokenizer, self.runner.vocab_size)
        self._target = _Cutter(target, vocab_size)
        self._chunk_size = chunk_size
        self._max_draws = min(_MAX_DRAWS, kv_cache.max_seq_len // 2)
        self._max_ids = kv_cache.max_seq_len - self._max_draws
        # Of each slot the tokens that it is fed, and behind them its draws.
        shape = kv_cache.block_table.shape[0], kv_cache.max_seq_len
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=kv_cache.device)
        self._texts: dict[int, _Text] = {}

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        """An interruption in between loses the text; it is heard from the start then."""
        text = self._texts.pop(sequence_id, None) or _Text(self._target, self._draft)
        text.append(tokens)
        self._texts[sequence_id] = text

    def propose(self, batch: RunningBatch) -> DraftProposal:
        rows = zip(batch.sequence_ids, batch.host_slots, batch.draft_limits, strict=True)
        turns = [self._plan(*row) for row in rows]
        self._draw([turn for turn in turns if turn is not None])
        drafts = [[] if turn is None else self._translate(turn) for turn in turns]
        return DraftProposal.from_lists(drafts, device=batch.slots.device)

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        """Nothing to do: it hears of every token."""

    def release(self, sequence_id: int) -> None:
        self._texts.pop(sequence_id, None)

    def _plan(self, sequence_id: int, slot: int, limit: int) -> _Turn | None:
        """What a sequence is fed and draws. From here on the cache holds what both texts begin with."""
        if limit <= 0 or not self._max_draws:  # a draft with one position draws nothing
            return None
        text = self._texts[sequence_id]
        ids = text.encode()
        if not ids:
            return None
        # As many as this many of the target's tokens took so far; one more, so that the last word is whole.
        num_draws = min(self._max_draws, 1 + math.ceil(limit * len(ids) / text.num_heard))
        fed = _last_of(self._draft.start, ids, self._max_ids)
        # The last token is fed again even where it is held: what follows it is wanted.
        del text.held[min(_common_length(text.held, fed), len(fed) - 1) :]
        return _Turn(text, slot, fed, limit, num_draws, [])

    def _draw(self, turns: list[_Turn]) -> None:
        """Feeds each turn what the cache lacks, and draws the likeliest tokens, one after the other."""
        if not turns:
            return
        for turn in turns:
            num_held = len(turn.text.held)
            self._tokens[turn.slot, num_held : len(turn.fed)] = self._ints(turn.fed[num_held:])
        rows = DraftRows(
            self._tokens,
            self.runner.kv_cache.device_block_table(),
            self._ints([turn.slot for turn in turns]),
            self._ints(self._fill(turns)),
            self._ints([len(turn.fed) for turn in turns]),
            self._ints([turn.num_draws for turn in turns]),
        )
        keys = DrawKeys(SamplingRows.empty(len(turns), self._tokens.device), has_filters=False)
        drawn = self.runner.decoder.draft(
            rows, self.runner.kv_cache.tensors[0], self.runner.vocab_size, keys
        ) or self._draw_one_by_one(rows, keys)
        for turn, tokens, errors in zip(turns, *(part.tolist() for part in drawn), strict=True):
            count = min(turn.num_draws, [*errors, 1].index(1))
            turn.drawn.extend(tokens[:count])
            turn.text.held = turn.fed + turn.drawn[:-1]

    def _fill(self, turns: list[_Turn]) -> list[int]:
        """Computes all but the last chunk of what the cache lacks, and returns where that begins."""
        starts = [len(turn.text.held) for turn in turns]
        while True:
            gaps = [len(turn.fed) - start for turn, start in zip(turns, starts, strict=True)]
            lengths = [self._chunk_size if gap > self._chunk_size else 0 for gap in gaps]
            if not any(lengths):
                return starts
            q_len = self._ints(lengths)
            feed = Feed(self._ints(starts), q_len, torch.zeros_like(q_len), sum(lengths), 0)
            self.runner.forward(self._build(self._ints([turn.slot for turn in turns]), feed))
            starts = [start + length for start, length in zip(starts, lengths, strict=True)]

    def _draw_one_by_one(self, rows: DraftRows, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        """As `Decoder.draft`, for backends that have it not. There is room for as many draws in every row."""
        count, one = rows.slots.numel(), torch.ones_like(rows.slots)
        kv, drawn = self.runner.kv_cache.tensors[0], []
        start, q_len = rows.start, rows.seq_len - rows.start
        for step in range(int(rows.limits.max())):
            batch = self._build(rows.slots, Feed(start, q_len, one, int(q_len.sum()), count))
            drawn.append(self.runner.decoder.draw(batch, kv, self.runner.vocab_size, keys))
            start, q_len = rows.seq_len + step, one
            self._tokens[rows.slots.long(), start.long()] = drawn[-1][0].int()
        tokens, errors = (torch.stack(part, dim=1) for part in zip(*drawn, strict=True))
        return tokens, errors

    def _build(self, slots: Tensor, feed: Feed) -> ForwardBatch:
        cache = self.runner.kv_cache
        where = (self._tokens, cache.device_block_table(), slots, feed)
        return build_forward_batch(self.runner.backend, *where, block_size=cache.block_size)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._tokens.device)

    def _translate(self, turn: _Turn) -> list[int]:
        """The target's tokens of what was drawn, and its end of text where the draft ends there."""
        detokenizer = IncrementalDetokenizer(self._draft.tokenizer, turn.fed)
        text, ends = "", []
        for token in turn.drawn:
            if token in self._draft.tokenizer.special_token_ids:
                ends = self._target.end if token in self._draft.end else []
                break
            text += detokenizer.push(token)
        return [*self._target.encode_after(turn.text.tail, text), *ends][: turn.limit]


class _Turn(NamedTuple):
    """What a sequence does in a round.

    fed:       the draft's tokens up to here, or the last of them
    limit:     tokens of the target's that it may propose
    num_draws: tokens that the draft is to draw
    drawn:     those that it has drawn
    """

    text: _Text
    slot: int
    fed: list[int]
    limit: int
    num_draws: int
    drawn: list[int]


class _Cutter:
    """How a text is cut into a model's tokens, segment by segment.

    tokenizer:  the model's
    num_ids:    ids that it has
    start, end: the token that a text begins with, if any, and the one that ends it
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        self.tokenizer = tokenizer
        self._num_ids = num_ids
        first = tokenizer.encode_piece("a")
        self._adds_space = bool(first) and tokenizer.token(first[0]).startswith(_SPACES)
        self.start = [token for token in tokenizer.encode("")[:1] if token < num_ids]
        self.end = [token for token in [tokenizer.eos_token_id] if token is not None and token < num_ids]

    def encode(self, segment: str) -> list[int]:
        """Its tokens. A tokenizer that puts a space before a text gets it without its own."""
        piece = self.tokenizer.encode_piece(segment.removeprefix(" ") if self._adds_space else segment)
        return [token for token in piece if token < self._num_ids]

    def encode_after(self, tail: list[int], text: str) -> list[int]:
        """The tokens of `text` after a text whose last tokens are `tail`."""
        if not text:
            return []
        before = self.tokenizer.decode(tail)
        is_split = before.endswith(REPLACEMENT)  # in the middle of a character, which `text` begins with
        before = before.strip(REPLACEMENT)
        ids = self.encode(before + text)
        for known in [tail] if is_split else [tail, self.encode(before)]:
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return [] if is_split else self.encode(text)


class _Text:
    """A sequence's text in the draft's tokens.

    num_heard: tokens of the target's that it is made of
    tail:      the last of them, without special ones
    held:      tokens whose keys and values the draft's cache holds
    """

    def __init__(self, target: _Cutter, draft: _Cutter) -> None:
        self.num_heard = 0
        self.tail: list[int] = []
        self.held: list[int] = []
        self._special = target.tokenizer.special_token_ids
        self._draft = draft
        self._detokenizer = IncrementalDetokenizer(target.tokenizer)
        self._settled: list[int] = []
        self._open = ""

    def append(self, tokens: Sequence[int]) -> None:
        """All of the sequence's tokens, of which the last ones are new. A character counts when it is whole."""
        self._open += "".join(map(self._detokenizer.push, tokens[self.num_heard :]))
        self.num_heard = len(tokens)
        last = tokens[-4 * _NUM_CONTEXT :]
        self.tail = [token for token in last if token not in self._special][-_NUM_CONTEXT:]
        while end := _segment_end(self._open):
            self._settled += self._draft.encode(self._open[:end])
            self._open = self._open[end:]

    def encode(self) -> list[int]:
        return self._settled + self._draft.encode(self._open)


def check_texts(target: Vocabulary, draft: Vocabulary) -> None:
    """Raises `VocabularyMismatchError` naming both models where the draft can write no text of the target's."""
    mine, other = target.tokenizer, draft.tokenizer
    assert mine is not None, "a text has a tokenizer"
    assert other is not None, "a text has a tokenizer"
    num_ids = num_usable_ids(draft)
    for token in range(num_usable_ids(target)):
        text = mine.decode((token,))
        ids = other.encode_piece(text) if text.strip() and REPLACEMENT not in text else ()
        is_same = bool(ids) and max(ids) < num_ids and other.decode(ids).strip() == text.strip()
        if is_same and mine.encode_piece(text):
            return
    raise VocabularyMismatchError(
        f"target {target.name!r} and draft {draft.name!r} have hardly a token in common "
        f"({mine.difference_from(other)}), and the draft's tokenizer can write no text of the target's"
    )


def _segment_end(text: str) -> int:
    """Where its first segment ends, whatever follows; 0: that is open."""
    space = _END_OF_WORD.search(text, _SEGMENT, _LONGEST_SEGMENT)
    if space is not None:
        return space.start()
    return _LONGEST_SEGMENT if len(text) >= _LONGEST_SEGMENT else 0


def _last_of(start: list[int], ids: list[int], most: int) -> list[int]:
    """A text's start and its last ids, `most` in all. What is left out grows by half of that at a time, so that a text
    that grows is seldom computed again."""
    room = most - len(start)
    if len(ids) > room:
        step = max(1, room // 2)
        ids = ids[-(-(len(ids) - room) // step) * step :]
    return start + ids


def _common_length(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with. By halves: slices are compared fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
