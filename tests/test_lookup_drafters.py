"""What the drafters that look things up propose: n-grams against a search, and a history of earlier outputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from law_helpers import CheckpointFactory, EngineFactory, Tally, assert_same, make_prompt, plain, spec

from specengine.drafters.ngram import NgramDrafter
from specengine.drafters.suffix import SuffixDrafter

K = 5


def ask(drafter: Any, *texts: Sequence[int], limit: int = K) -> list[list[int]]:
    """What it proposes for texts that it has heard of, as sequences 0, 1, …"""
    batch = SimpleNamespace(
        sequence_ids=list(range(len(texts))), draft_limits=[limit] * len(texts), slots=torch.zeros(1)
    )
    proposal = drafter.propose(batch)
    assert proposal.law is None
    rows = zip(proposal.tokens.tolist(), proposal.num_tokens.tolist(), strict=True)
    return [tokens[:count] for tokens, count in rows]


def tell(drafter: Any, *texts: Sequence[int]) -> None:
    for sequence_id, text in enumerate(texts):
        drafter.hear(sequence_id, list(text), len(text))


def search(text: list[int], shortest: int, longest: int, limit: int) -> list[int]:
    """Prompt lookup as it is defined, by looking at every place."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                repeated = list(text)
                for offset in range(limit):
                    repeated.append(repeated[start + length + offset])
                return repeated[len(text) :]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 4), (3, 3), (1, 6)])
def test_the_longest_match_counts_then_the_most_recent(shortest: int, longest: int) -> None:
    chance = random.Random(shortest * longest)
    num_found = num_missed = 0
    for vocab_size in (1, 2, 4, 9):
        text: list[int] = []
        drafter = NgramDrafter(shortest, longest)
        while len(text) < 60:
            new = chance.choices(range(vocab_size), k=chance.choice((1, 1, 3, 8)))
            text += new
            drafter.hear(0, text, len(new))
            limit = chance.randint(0, 7)
            expected = search(text, shortest, longest, limit)
            assert ask(drafter, text, limit=limit) == [expected]
            num_found += bool(expected)
            num_missed += not expected
    assert num_found
    assert num_missed


def test_what_is_drafted_is_looked_for_too_and_nothing_is_kept_of_it() -> None:
    for drafter in (
        NgramDrafter(2, 4),
        SuffixDrafter(text_size=50),
        SuffixDrafter(text_size=50, history_size=50),
    ):
        tell(drafter, [1, 2, 3, 4, 5, 6, 7, 1, 2])
        for _ in range(2):
            assert drafter.follow(0, (), 2) == [3, 4]
            assert drafter.follow(0, [3, 4], 2) == [5, 6]
            assert drafter.follow(0, [4, 5, 6], 1) == [7]
            assert drafter.follow(0, [8], 2) == []
            assert drafter.follow(0, [3], 0) == []
    history = SuffixDrafter(text_size=50, history_size=50)
    history.hear(0, [1, 9, 8, 7, 6], 4)
    history.release(0)
    tell(history, [2, 2, 9])
    assert history.follow(0, [8], 5) == [7, 6]
    assert history.follow(0, [8, *range(40, 80), 9, 8], 2) == [7, 6]


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 4), SuffixDrafter(text_size=50)])
def test_texts_are_kept_apart_and_forgotten_when_they_end(drafter: Any) -> None:
    tell(drafter, [1, 2, 3, 1, 2], [1, 2, 4, 1, 2])
    assert [draft[0] for draft in ask(drafter, [], [])] == [3, 4]
    for sequence_id in (0, 1, 7):
        drafter.release(sequence_id)
    tell(drafter, [1, 2])
    assert ask(drafter, []) == [[]]


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 4), SuffixDrafter(text_size=50, history_size=50)])
def test_what_is_told_twice_counts_once(drafter: Any) -> None:
    """As after an interruption."""
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 8, 1, 2, 3]
    for end in (5, 7, 7, 12, 15):
        drafter.hear(0, text[:end], 3)
    assert ask(drafter, text, limit=2) == [[8, 1]]


def test_a_text_that_outgrows_its_memory_forgets_its_beginning() -> None:
    drafter = SuffixDrafter(text_size=10)
    tell(drafter, [1, 2, 3, *range(20, 31), 1, 2])
    assert ask(drafter, []) == [[]]
    assert drafter._texts[0].num_tokens <= 10


def test_a_history_remembers_what_was_said_after_what_but_no_prompts() -> None:
    drafter = SuffixDrafter(text_size=100, history_size=100)
    prompt = [*range(100, 140)]
    for end in (41, 44):
        drafter.hear(0, [*prompt, 1, 2, 3, 4, 5][:end], 3)
    drafter.release(0)  # preempted: what follows is not said twice
    drafter.hear(0, [*prompt, 1, 2, 3, 4, 5], 45)
    drafter.release(0)
    tell(drafter, [7, 8, 138, 139], [9, 1, 2], [100, 101, 102], [3, 4, 5])
    assert ask(drafter, [], [], [], []) == [[1, 2], [3, 4], [], []]
    assert drafter._history is not None
    # 32 tokens of context each time, and a separator.
    assert drafter._history._automaton.num_tokens == (32 + 4 + 1) + (32 + 1 + 1)


def test_with_a_history_the_second_time_is_faster_and_the_same(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    reference, engine = (build_engine(checkpoint(seed=1), name) for name in (None, "suffix:history"))
    prompts = [make_prompt(6, seed) for seed in range(3)]
    for temperature in (0.0, 1.0):
        common = {"ignore_eos": True, "max_new_tokens": 30, "temperature": temperature, "seed": 3}
        expected = [plain(reference, prompt, **common) for prompt in prompts]
        first, second = (spec(engine, prompts, K, **common) for _ in range(2))
        for results in (first, second):
            for result, truth in zip(results, expected, strict=True):
                assert_same(result, truth)
        num_rounds = [
            sum(result.metrics.speculative_decoding.num_rounds for result in each) for each in (first, second)
        ]
        assert num_rounds[1] < num_rounds[0]
    tally.check()
