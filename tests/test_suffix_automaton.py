"""The suffix automaton against a model that searches the whole text every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from specengine._C import SuffixAutomaton

Find = Callable[[Sequence[int], Sequence[int]], list[int]]


def places_of(pattern: Sequence[int], text: Sequence[int]) -> list[int]:
    """Where the pattern ends in the text."""
    size = len(pattern)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == pattern]


def places_of_one_too_few(pattern: Sequence[int], text: Sequence[int]) -> list[int]:
    """The planted fault."""
    return places_of(pattern, text)[1:]


class Model:
    """What the header says, by search. Suffixes are lists of tokens, where the automaton has states."""

    def __init__(self, max_tokens: int, find: Find = places_of) -> None:
        self.text: list[int] = []
        self._max_tokens = max_tokens
        self._find = find

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self.text) == self._max_tokens:
                self.text = self.text[len(self.text) - self._max_tokens // 2 :]
            self.text.append(token)

    def draft(self, limit: int) -> tuple[int, list[int]]:
        return self._follow(self._earlier_suffix(self.text), limit)

    def draft_after(self, context: Sequence[int], limit: int) -> tuple[int, list[int]]:
        starts = range(len(context) + 1)
        return self._follow(
            next(c for s in starts if (c := context[s:]) == [] or self._find(c, self.text)), limit
        )

    def draft_behind(self, limit: int, drafted: Sequence[int]) -> tuple[int, list[int]]:
        return self.draft_after([*self.text, *drafted], limit)

    def _earlier_suffix(self, suffix: list[int]) -> list[int]:
        """The longest suffix of it that ends at more places than it does."""
        num_places = len(self._find(suffix, self.text))
        return next(
            (s for i in range(1, len(suffix)) if len(self._find(s := suffix[i:], self.text)) > num_places), []
        )

    def _follow(self, match: list[int], limit: int) -> tuple[int, list[int]]:
        draft: list[int] = []
        at, share = match, 1.0
        while len(draft) < min(limit, len(match)):
            while at and not self._followers(at):
                at = self._earlier_suffix(at)
            if not at:
                break
            followers = self._followers(at)
            latest = {token: place for place, token in enumerate(followers)}
            token = max(latest, key=lambda token: (followers.count(token), latest[token]))
            share *= followers.count(token) / len(followers)
            if token < 0 or share < 0.1:
                break
            draft.append(token)
            at = [*at, token]
        return len(match), draft

    def _followers(self, pattern: list[int]) -> list[int]:
        return [self.text[end] for end in self._find(pattern, self.text) if end < len(self.text)]


def write_text(chance: random.Random, length: int) -> list[int]:
    """Random words in random order: repetitions of every length, now and then with a separator."""
    size = chance.choice((2, 3, 8))
    words = [chance.choices(range(size), k=chance.randint(1, 9)) for _ in range(4)] + [[-1]]
    text: list[int] = []
    while len(text) < length:
        text += chance.choice(words)
    return text[:length]


def check_one_text(seed: int, max_tokens: int, find: Find = places_of) -> int:
    """Appends a text in pieces; returns the number of tokens that were drafted."""
    chance = random.Random(seed)
    text, automaton, model = write_text(chance, 90), SuffixAutomaton(max_tokens), Model(max_tokens, find)
    num_drafted = at = 0
    while at < len(text):
        piece = text[at : at + chance.choice((0, 1, 1, 2, 11))]
        at += len(piece)
        automaton.append(piece)
        model.append(piece)
        limit = chance.choice((0, 1, 4, 50))
        drafted = automaton.draft(limit)
        assert drafted == model.draft(limit), f"seed {seed}, after {text[:at]}"
        context = write_text(chance, chance.randint(0, 12))
        behind = context[: chance.randint(1, 4)]
        if behind:
            found = automaton.draft(limit, behind)
            assert found == model.draft_behind(limit, behind), f"seed {seed}, {behind} behind {text[:at]}"
        found = automaton.draft_after(context, limit)
        assert found == model.draft_after(context, limit), f"seed {seed}, {context} after {text[:at]}"
        num_drafted += len(drafted[1])
    assert automaton.num_seen == len(text)
    assert automaton.num_tokens == len(model.text) <= max_tokens
    return num_drafted


@pytest.mark.parametrize("max_tokens", [2, 3, 24, 1000])
def test_it_finds_what_a_search_finds(max_tokens: int) -> None:
    assert sum(check_one_text(seed, max_tokens) for seed in range(25)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [2, 3, 7, 24, 61, 1000])
def test_it_finds_what_a_search_finds_in_many_texts(max_tokens: int) -> None:
    assert sum(check_one_text(seed, max_tokens) for seed in range(1000)) > 0


def test_a_model_that_misses_a_place_is_noticed() -> None:
    with pytest.raises(AssertionError, match="seed"):
        check_one_text(0, 1000, places_of_one_too_few)


@pytest.mark.parametrize("vocab_size", [1, 2, 50_000])
def test_memory_is_bounded(vocab_size: int) -> None:
    """Also where every token is another, and for one that is repeated for ever, whose suffixes are of many kinds."""
    max_tokens = 1500
    automaton = SuffixAutomaton(max_tokens)
    chance = random.Random(vocab_size)
    for _ in range(40):
        automaton.append(chance.choices(range(vocab_size), k=250))
        assert automaton.num_tokens <= max_tokens
        assert automaton.num_bytes <= max_tokens * SuffixAutomaton.MAX_BYTES_PER_TOKEN
    assert automaton.num_seen == 10_000


def test_a_repetition_goes_on() -> None:
    automaton = SuffixAutomaton(4000)
    automaton.append([7] * 300)
    assert automaton.draft(200) == (299, [7] * 200)
    automaton.append([1, 2, 3] * 100)
    assert automaton.draft(7) == (297, [1, 2, 3, 1, 2, 3, 1])


def test_the_continuation_that_was_seen_most_often_is_drafted_and_of_several_the_latest() -> None:
    automaton = SuffixAutomaton(100)
    automaton.append([5, 6, 1, 0, 5, 6, 2, 9, 5, 6, 2, 8, 5, 6, 3, 4, 5, 6])
    assert automaton.draft(1) == (2, [2])
    automaton.append([3, 7, 5, 6])
    assert automaton.draft(1) == (2, [3])


def test_sizes_that_cannot_be_are_refused() -> None:
    for size in (-1, 0, 1, 2**28 + 1):
        with pytest.raises(ValueError, match=f"max_tokens must be 2 … 268435456, got {size}"):
            SuffixAutomaton(size)
