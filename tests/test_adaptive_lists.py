"""Which of several drafters drafts: with a clock and texts that the test sets, and in the engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from law_helpers import BuildTwins, CheckpointFactory, Tally, assert_idle, assert_same, plain
from test_adaptive import MODES, PROMPTS, Row, auto_params, scattered, wild_clock

from specengine import adaptive
from specengine.adaptive import Chooser
from specengine.drafters.base import ALONE, RowResult, Way
from specengine.engine.engine import Engine

__all__ = ["wild_clock"]

MODEL, LOOKUP, BOTH = range(3)
WAYS = (ALONE, Way(1), Way(0, 1))


class Text:
    """A text of which a lookup knows the next tokens with a chance that depends on where it is, and a model with
    another."""

    def __init__(self, seed: int, lookup: Callable[[int], float], model: Callable[[int], float]) -> None:
        self._rng, self._seed = random.Random(seed), seed
        self.lookup, self.model = lookup, model
        self.num_asked = 0

    def token(self, place: int) -> int:
        return random.Random(self._seed * 10**6 + place).randrange(10**6)

    def follow(self, row: Any, drafted: Any, limit: int) -> list[int]:
        self.num_asked += limit > 0
        start = len(row.output_ids) + len(drafted)
        right = self.count(self.lookup, start, limit)
        return [self.token(start + i) if i < right else -1 for i in range(limit)]

    def count(self, chance: Callable[[int], float], start: int, limit: int) -> int:
        right = 0
        while right < limit and self._rng.random() < chance(start + right):
            right += 1
        return right


def run(
    text: Text,
    ways: tuple[Way, ...],
    num_tokens: int,
    *,
    given: int | None = None,
    scatter: Callable[[], float] = lambda: 1.0,
    look: float = 0.0,
    unit: float = 0.001,
) -> float:
    """Tokens a unit of time of one sequence: a plain round takes one, a draft step 0.15, a row of the target 0.03.

    scatter: what each round's forward takes, of what it should
    look:    what a round takes longer after which the host looks; 0.0: it looks after each
    unit:    of time, in seconds
    """
    host = text if any(way.part == 1 for way in ways) or ways == () else None
    lookup_place = next((way.part for way in ways if ways == (Way(1),) or way.part == 1), 1)
    place = 0 if ways == (Way(1),) else lookup_place
    known = (ALONE,) if len(ways) == 1 else ways
    chooser = Chooser(hides_host=False, ways=known, lookups={place: host} if host else {})  # type: ignore[dict-item]
    row = Row(lambda _: 0.0, 0, has_auto_k=given is None, num_speculative_tokens=given or 0)
    row.output_ids, row.max_rounds_unread = [text.token(0)], 16 if look else 1
    seconds = 0.0
    while len(row.output_ids) < num_tokens:
        chooser.choose([row])  # type: ignore[list-item]
        limit, way = row.num_speculative_tokens, known[row.way]
        num_own = limit if way.tail is None else min(limit, row.num_own_drafts)
        num_rounds = chooser.max_rounds if look else 1
        chooser.go_on(num_rounds - 1)
        for host_seconds in [look] + [0.0] * (num_rounds - 1):
            start, is_lookup = len(row.output_ids), host is not None and way.part == place
            if is_lookup:
                drafts = text.follow(row, (), limit)
                num_draft, accepted = (
                    len(drafts),
                    next((i for i, t in enumerate(drafts) if t < 0), len(drafts)),
                )
                steps = 0
            else:
                steps, num_draft = num_own, limit
                accepted = text.count(text.model, start, num_own)
                if accepted == num_own < limit:
                    accepted += text.count(text.lookup, start + num_own, limit - num_own)
            draft, verify = 0.15 * steps, (1.0 + 0.03 * num_draft) * scatter()
            seconds += draft + verify + host_seconds
            row.output_ids += [text.token(start + i) for i in range(accepted + 1)]
            chooser.observe(
                [row],  # type: ignore[list-item]
                [limit],
                [RowResult(0, start, num_draft, accepted)],
                ways=[(row.way, row.num_own_drafts)],
                device=unit * (draft + verify),
                draft=unit * draft,
                verify=unit * verify,
                host=unit * host_seconds,
            )
    return (len(row.output_ids) - 1) / seconds


def flat(chance: float) -> Callable[[int], float]:
    return lambda _: chance


def in_turn(place: int) -> float:
    """200 tokens of copy, 200 of prose."""
    return 0.97 if place // 200 % 2 == 0 else 0.1


@pytest.mark.parametrize(
    ("lookup", "model"), [(0.97, 0.6), (0.1, 0.8), (0.0, 0.0), (0.6, 0.6), (0.9, 0.9)], ids=str
)
def test_a_list_is_as_good_as_the_better_of_its_parts(lookup: float, model: float) -> None:
    both, alone = 0.0, [0.0, 0.0]
    for seed in range(3):
        text = Text(seed, flat(lookup), flat(model))
        alone = [
            total + run(text, ways, 3000) for total, ways in zip(alone, ((ALONE,), (Way(1),)), strict=True)
        ]
        both += run(text, WAYS, 3000)
    assert both > 0.93 * max(alone), (both, alone)


def test_a_list_is_better_than_each_on_a_text_that_is_half_copied() -> None:
    text = Text(4, in_turn, flat(0.75))
    alone = [run(text, ways, 4000) for ways in ((ALONE,), (Way(1),))]
    assert run(text, WAYS, 4000) > 1.05 * max(alone), alone


@pytest.mark.parametrize(("unit", "rounds"), [(0.001, 16), (0.01, 7), (0.1, 1)])
def test_a_lookup_that_is_of_no_use_is_asked_rarely(unit: float, rounds: int) -> None:
    """A few times at the beginning, then less and less often: once in sixteen rounds, or in 64 ms."""
    text = Text(6, flat(0.0), flat(0.0))
    run(text, (Way(1),), 2000, unit=unit)
    assert 1990 / rounds < text.num_asked < 2600 / rounds


def test_asking_less_often_costs_little_where_copies_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rarely = [run(Text(seed, in_turn, flat(0.0)), (Way(1),), 4000) for seed in range(3)]
    monkeypatch.setattr(adaptive, "_IDLE_MOST", 0)
    always = [run(Text(seed, in_turn, flat(0.0)), (Way(1),), 4000) for seed in range(3)]
    assert sum(rarely) > 0.97 * sum(always), (rarely, always)


def test_on_a_busy_machine_a_lookup_is_used_however_long_it_was_of_no_use() -> None:
    """A copy after 3,000 tokens of which nothing could be looked up, and no round with drafts to measure."""

    def copies_late(place: int) -> float:
        return 0.0 if place < 3000 else 0.97

    for seed in range(5):
        rng, text = random.Random(seed), Text(seed, copies_late, flat(0.0))
        speed = run(text, (Way(1),), 4000, scatter=partial(scattered, rng))
        alone = run(text, (ALONE,), 4000, given=0, scatter=partial(scattered, random.Random(seed)))
        assert speed > 1.2 * alone, (seed, speed / alone)


def test_a_lookup_that_is_worth_a_row_but_no_look_is_not_used() -> None:
    """Now and then a draft is accepted: rounds that run in a row are worth more."""
    for chance in (0.0, 0.05, 0.1, 0.15):
        text = Text(8, flat(chance), flat(0.0))
        speed = run(text, (Way(1),), 3000, look=0.15)
        assert speed > 0.97 * run(text, (ALONE,), 3000, given=0, look=0.15), chance
    text = Text(9, flat(0.9), flat(0.0))
    assert run(text, (Way(1),), 3000, look=0.15) > 2.0


def test_with_a_given_number_the_drafter_is_still_chosen() -> None:
    text = Text(5, flat(0.97), flat(0.5))
    model, lookup = (run(text, ways, 2000, given=4) for ways in ((ALONE,), (Way(1),)))
    assert lookup > model
    assert run(text, WAYS, 2000, given=4) > 0.95 * lookup


@pytest.mark.parametrize("rounds_ahead", [0, 2])
def test_lists_chosen_by_clocks_give_the_bits_of_plain_decoding(
    rounds_ahead: int,
    checkpoint: CheckpointFactory,
    build_twins: BuildTwins,
    tally: Tally,
    wild_clock: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: set[int] = set()
    observe = Chooser.observe

    def watched(chooser: Chooser, *what: Any, ways: Any, **times: Any) -> None:
        used.update(number for number, _ in ways)
        observe(chooser, *what, ways=ways, **times)

    monkeypatch.setattr(Chooser, "observe", watched)
    drafters = [checkpoint(seed=1, noise=0.1), "suffix", "self:1", "ngram:1-3"]
    for engine in build_twins(checkpoint(seed=1), drafters, rounds_ahead=rounds_ahead):
        # Not ways at random, as other tests have them.
        engine._stepper.chooser = chooser = Chooser.of(engine._drafter, hides_host=False)
        check_bits(engine)
        assert chooser._rows == {}
    assert len(used) >= 3
    tally.check()


def check_bits(engine: Engine) -> None:
    num_free = engine.num_free_blocks
    prompts = [[*prompt, *prompt] for prompt in PROMPTS]
    expected = [
        plain(engine, prompt, max_new_tokens=60, ignore_eos=True, **mode)
        for prompt, mode in zip(prompts, MODES, strict=True)
    ]
    for result, truth in zip(engine.generate(prompts, auto_params()), expected, strict=True):
        assert_same(result, truth)
    assert_idle(engine, num_free)
