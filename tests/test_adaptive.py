"""k chosen by measured costs: decisions with a clock that the test sets, and laws with k chosen at will."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from law_helpers import (
    BuildTwins,
    CheckpointFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
)
from scripted_drafters import ScriptedDrafter

from specengine.adaptive import Chooser
from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS, SamplingParams
from specengine.drafters.base import RowResult
from specengine.engine.times import Clock, RoundTimes
from specengine.round_costs import RoundCosts
from specengine.runtime.graphs import DRAFT_COUNTS
from specengine.runtime.sequence import RoundCounts

Cost = Callable[[int, int, int], float]


@dataclass(eq=False)
class Row:
    """A sequence as far as k is concerned. chance(n): that a draft after n tokens is accepted."""

    chance: Callable[[int], float]
    sequence_id: int
    has_auto_k: bool = True
    num_speculative_tokens: int = 4
    num_tokens: int = 1
    num_missed: int = 100
    remaining: int = 10**6
    max_rounds_unread: int = 1
    num_rounds_ahead: int = 0
    way: int = 0
    num_own_drafts: int = 0
    part: int | None = None
    output_ids: Any = (1,)
    rounds: list[RoundCounts] = field(default_factory=list)
    round_seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def max_draft_tokens(self) -> int:
        return self.num_speculative_tokens

    def may_use(self, part: int) -> bool:
        return self.part is None or self.part == part


class World:
    """Rounds that take what `cost(batch size, k, all drafts)` says, and what catching up with missed tokens takes."""

    def __init__(
        self,
        cost: Cost,
        *,
        draft: float | None = None,
        rounds_ahead: int = 0,
        catch_up: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.chooser = Chooser(hides_host=False)
        self.seconds = 0.0
        self.ks: list[int] = []
        self._cost, self._draft, self._catch_up = cost, draft, catch_up
        self._rounds_ahead = rounds_ahead
        self._rng = random.Random(seed)
        self._flights: deque[Any] = deque()

    def step(self, rows: list[Row]) -> None:
        self.chooser.choose(rows)  # type: ignore[arg-type]
        limits = [row.num_speculative_tokens for row in rows]
        k = max(limits)
        self.ks.append(k)
        missed = self._catch_up * sum(
            row.num_missed for row, limit in zip(rows, limits, strict=True) if limit
        )
        seconds = self._cost(len(rows), k, sum(limits)) + missed
        draft = None if self._draft is None else self._draft * k + missed
        accepted, lengths = [], [row.num_tokens for row in rows]
        for row, limit in zip(rows, limits, strict=True):
            count = 0
            while count < limit and self._rng.random() < row.chance(row.num_tokens):
                count += 1
            row.num_tokens += count + 1
            row.num_missed = 0 if limit else row.num_missed + 1
            accepted.append(count)
        self.seconds += seconds
        self._flights.append((list(rows), limits, accepted, lengths, seconds, draft))
        while len(self._flights) > self._rounds_ahead:
            self._read(*self._flights.popleft())

    def _read(
        self,
        rows: list[Any],
        limits: list[int],
        accepted: list[int],
        lengths: list[int],
        seconds: float,
        draft: float | None,
    ) -> None:
        for row, limit, count in zip(rows, limits, accepted, strict=True):
            row.rounds.append(RoundCounts(limit, count, count + 1))
        results = [
            RowResult(0, length, limit, count)
            for length, limit, count in zip(lengths, limits, accepted, strict=True)
        ]
        verify = None if draft is None else seconds - draft
        self.chooser.observe(rows, limits, results, device=seconds, draft=draft, verify=verify, host=0.0)

    def run(self, rows: list[Row], num_tokens: int) -> float:
        """Until each has so many tokens; returns tokens a second."""
        begun, before = self.seconds, sum(row.num_tokens for row in rows)
        while min(row.num_tokens for row in rows) < num_tokens:
            self.step(rows)
        return (sum(row.num_tokens for row in rows) - before) / (self.seconds - begun)


def linear(plain: float, jump: float, draft: float, row: float) -> Cost:
    """A plain round, the jump to one that drafts, a draft step of all sequences, a row of the target's forward."""
    return lambda size, k, num_drafts: plain + (jump if k else 0.0) + draft * k + row * num_drafts


CHEAP, MIDDLING, DEAR = (linear(1.0, 0.1, draft, 0.01) for draft in (0.05, 0.15, 0.5))


def build_rows(*chances: float) -> list[Row]:
    return [Row(lambda _, chance=chance: chance, index) for index, chance in enumerate(chances)]  # type: ignore[misc]


def best_fixed(cost: Cost, chance: float, size: int = 1) -> tuple[int, float]:
    """The k with the most tokens a second, and how many: 1 + sum over j of the first j acceptances' product."""

    def rate(k: int) -> float:
        return size * sum(chance**j for j in range(k + 1)) / cost(size, k, size * k)

    best = max(DRAFT_COUNTS, key=rate)
    return best, rate(best)


# -- decisions, by a clock that the test sets ---------------------------------------------------------------------


@pytest.mark.parametrize("knows_parts", [False, True])
def test_a_cheap_draft_that_is_always_right_drafts_as_much_as_it_may(knows_parts: bool) -> None:
    """It begins with as few rounds as show what rounds take: two of a kind, one where their parts are known."""
    world, num_first = World(CHEAP, draft=0.05 if knows_parts else None), 1 if knows_parts else 2
    world.run(build_rows(1.0), 600)
    assert world.ks[: 2 * num_first + 1] == [*[0] * num_first, *[AUTO_NUM_SPECULATIVE_TOKENS] * num_first, 8]
    assert set(world.ks[12:]) == {64}
    assert world.ks.count(0) == num_first


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("rounds_ahead", [0, 4])
@pytest.mark.parametrize("knows_parts", [False, True])
def test_close_to_the_best_constant_whatever_is_accepted(
    size: int, rounds_ahead: int, knows_parts: bool
) -> None:
    for cost, draft in ((CHEAP, 0.05), (MIDDLING, 0.15), (DEAR, 0.5)):
        for chance in (0.0, 0.3, 0.6, 0.8, 0.9):
            best, rate = best_fixed(cost, chance, size)
            world = World(cost, draft=draft if knows_parts else None, rounds_ahead=rounds_ahead)
            found = world.run(build_rows(*[chance] * size), 3000)
            assert found > 0.93 * rate, (
                f"{found / rate:.3f} of k = {best}, acceptance {chance}: {world.ks[:40]}"
            )


@pytest.mark.parametrize("cost", [CHEAP, MIDDLING, DEAR])
def test_a_hopeless_draft_is_probed_at_doubling_distances_and_costs_little(cost: Cost) -> None:
    world, plain = World(cost, catch_up=0.02), 1.0
    rate = world.run(build_rows(0.0), 2000)
    assert rate > 0.97 * plain
    at = [index for index in range(12, len(world.ks)) if world.ks[index] and not world.ks[index - 1]]
    distances = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert len(distances) >= 5
    assert distances == sorted(distances)
    assert distances[-1] > 500
    if cost is CHEAP:  # else they are as far apart as what they take demands
        assert distances[-5:] == pytest.approx([33, 65, 129, 257, 513], abs=2)
    assert {world.ks[index] for place in at for index in (place, place + 1)} == {1}
    assert sum(world.ks) < 80


def test_probes_that_take_long_come_rarely() -> None:
    """A draft model computes in its first round all that it missed: not more often than 2 % of the time allow."""
    world = World(MIDDLING, catch_up=0.2)
    world.run(build_rows(0.0), 6000)
    at = [index for index in range(40, len(world.ks)) if world.ks[index] and not world.ks[index - 1]]
    for earlier, later in itertools.pairwise(at):
        assert later - earlier > 2 * (earlier - at[at.index(earlier) - 1] if earlier != at[0] else 20)


@pytest.mark.parametrize("rounds_ahead", [0, 4])
def test_it_drafts_again_when_the_text_becomes_predictable(rounds_ahead: int) -> None:
    world = World(MIDDLING, catch_up=0.01, rounds_ahead=rounds_ahead)
    row = Row(lambda num_tokens: 0.95 if 700 <= num_tokens < 1500 else 0.0, 0)
    world.run([row], 690)
    assert not any(world.ks[100:120])
    world.run([row], 700)
    first = len(world.ks)
    world.run([row], 1500)
    assert max(world.ks[first:]) >= 8
    assert len(world.ks) - first < 700  # of 800 tokens; before it noticed a round each
    second = len(world.ks)
    world.run([row], 2000)
    assert sum(1 for k in world.ks[second:] if k) < 50


def test_a_new_request_is_given_a_chance_before_long() -> None:
    world = World(CHEAP, catch_up=0.001)
    world.run(build_rows(0.0), 3000)
    row = Row(lambda _: 0.95, 1)
    first = len(world.ks)
    world.run([row], 300)
    assert max(world.ks[first : first + 40]) >= 2
    assert max(world.ks[first:]) >= 8


def test_each_row_of_a_batch_has_its_own_k() -> None:
    """A draft step is every row's; a row of the target's forward is the one sequence's that drafts."""
    rows, given = (
        build_rows(0.95, 0.95, 0.0),
        Row(lambda _: 0.5, 7, has_auto_k=False, num_speculative_tokens=3),
    )
    world = World(linear(1.0, 0.0, 0.02, 0.04), draft=0.02)
    for _ in range(150):
        world.step([*rows, given])
    assert rows[2].num_speculative_tokens == 1
    assert rows[0].num_speculative_tokens == rows[1].num_speculative_tokens > 3
    assert given.num_speculative_tokens == 3
    assert world.chooser.costs.row() * world.chooser.costs.pace == pytest.approx(0.04, rel=0.25)


def test_the_same_measurements_give_the_same_choices() -> None:
    worlds = [World(MIDDLING, seed=3) for _ in range(2)]
    for world in worlds:
        world.run(build_rows(0.6, 0.3), 500)
    assert worlds[0].ks == worlds[1].ks
    assert len(set(worlds[0].ks)) > 3


def test_a_machine_that_slows_down_changes_no_choice_and_one_slow_round_neither() -> None:
    slowness = [1.0]
    world = World(lambda *kind: slowness[0] * MIDDLING(*kind))
    row = build_rows(1.0)
    world.run(row, 600)
    before = world.ks[-1]
    for factor in (2.5, 0.7, 40.0, 1.0):
        slowness[0] = factor
        world.run(row, row[0].num_tokens + (70 if factor == 40.0 else 1500))
        assert world.ks[-1] >= before // 2
    assert world.ks[-1] == before


@pytest.mark.parametrize("knows_parts", [False, True])
def test_a_slow_first_measurement_is_made_again(knows_parts: bool) -> None:
    """The first round of a kind may compile, or page in: 100 times what it takes."""
    seen: set[int] = set()

    def cost(size: int, k: int, num_drafts: int) -> float:
        factor = 1.0 if k in seen else 100.0
        seen.add(k)
        return factor * CHEAP(size, k, num_drafts)

    world = World(cost, draft=0.05 if knows_parts else None)
    world.run(build_rows(0.9), 4000)
    best, _ = best_fixed(CHEAP, 0.9)
    assert best / 2 <= sum(world.ks[-60:]) / 60 <= best * 2


def test_what_it_saved_is_measured() -> None:
    world, (row,) = World(CHEAP), build_rows(1.0)
    world.run([row], 2000)
    assert row.plain_seconds / row.round_seconds == pytest.approx(65 / CHEAP(1, 64, 64), rel=0.1)


# -- in the engine, with costs that drive k anywhere --------------------------------------------------------------

VOCAB = 64
MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "acceptance": "coupled"},
    {"temperature": 1.1, "seed": 5, "acceptance": "coupled", "top_k": 12, "top_p": 0.9},
    {},
    {"logprobs": 1},
]
PROMPTS = [make_prompt(3 + 2 * row, row, VOCAB) for row in range(len(MODES))]


@pytest.fixture
def wild_clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds take what a generator says, not what they took, so that the best k changes all the time. Returns the k
    of every round."""
    rng, ks, stop = random.Random(5), list[int](), Clock.stop

    def stopped(clock: Clock, watch: Any) -> RoundTimes:
        times = stop(clock, watch)
        seconds = rng.choice((0.2, 1.0, 3.0)) * (1.0 + 0.1 * rng.random() * times.k)
        ks.append(times.k)
        draft = None if times.draft is None else 0.1 * times.k
        verify = None if draft is None else seconds - draft
        return times._replace(draft=draft, verify=verify, device=seconds, host=0.0)

    monkeypatch.setattr(Clock, "stop", stopped)
    return ks


def auto_params(num_tokens: int = 60, **common: Any) -> list[SamplingParams]:
    """Every mode with "auto", but for the last but one, whose k is 3."""
    return [
        SamplingParams(
            max_new_tokens=num_tokens,
            ignore_eos=True,
            num_speculative_tokens=3 if row == 3 else "auto",
            **mode,
            **common,
        )
        for row, mode in enumerate(MODES)
    ]


@pytest.mark.parametrize("num_rows", [3, 5], ids=["lagging", "with log-probabilities"])
@pytest.mark.parametrize("rounds_ahead", [0, 1, 2, 3, 4])
def test_auto_gives_the_bits_of_plain_decoding(
    rounds_ahead: int,
    num_rows: int,
    checkpoint: CheckpointFactory,
    build_twins: BuildTwins,
    tally: Tally,
    wild_clock: list[int],
) -> None:
    for engine in build_twins(checkpoint(seed=1), checkpoint(seed=1, noise=0.1), rounds_ahead=rounds_ahead):
        num_free = engine.num_free_blocks
        expected = [
            plain(engine, prompt, max_new_tokens=60, ignore_eos=True, **mode)
            for prompt, mode in zip(PROMPTS[:num_rows], MODES[:num_rows], strict=True)
        ]
        for _ in range(2):
            results = engine.generate(PROMPTS[:num_rows], auto_params()[:num_rows])
            for result, truth in zip(results, expected, strict=True):
                assert_same(result, truth)
        assert_idle(engine, num_free)
        assert engine._stepper.chooser._rows == {}
    assert len(set(wild_clock)) >= 3
    tally.check()


def test_a_host_drafter_and_preemption_and_aborts(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally, wild_clock: list[int]
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB, counts=(2, 0, 9, 1))
    for engine in build_twins(checkpoint(seed=1), drafter, rounds_ahead=2, num_blocks=60):
        num_free = engine.num_free_blocks
        expected = [
            plain(engine, prompt, max_new_tokens=60, ignore_eos=True, **mode)
            for prompt, mode in zip(PROMPTS, MODES, strict=True)
        ]
        drafter.learn(expected)
        given_up = engine.add_request(PROMPTS[0], auto_params()[0])
        for _ in range(5):
            engine.step()
        engine.abort(given_up)
        results = engine.generate(PROMPTS, auto_params())
        for result, truth in zip(results, expected, strict=True):
            assert_same(result, truth)
        assert sum(result.metrics.num_preemptions for result in results) > 0
        engine.step()
        assert_idle(engine, num_free)
        assert engine._stepper.chooser._rows == {}
    assert len(set(wild_clock)) >= 3
    tally.check()


def test_a_number_is_left_alone_beside_auto(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, wild_clock: list[int]
) -> None:
    engine = build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.1))
    alone = engine.generate(PROMPTS[3], auto_params()[3]).metrics.speculative_decoding
    beside = engine.generate(PROMPTS, auto_params())[3].metrics.speculative_decoding
    assert alone == beside
    assert (beside.round_seconds, beside.estimated_speedup) == (0.0, None)


def test_the_result_says_which_k_were_used_and_what_it_brought(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, launched = Clock.stop, list[int]()

    def stopped(clock: Clock, watch: Any) -> RoundTimes:
        times = stop(clock, watch)
        launched.append(times.k)
        draft, seconds = 0.05 * times.k, CHEAP(1, times.k, times.k)
        return times._replace(draft=draft, verify=seconds - draft, device=seconds, host=0.0)

    monkeypatch.setattr(Clock, "stop", stopped)
    model = checkpoint(seed=1)
    engine = build_engine(model, model, max_seq_len=64)
    found = engine.generate(PROMPTS[0], max_new_tokens=60, ignore_eos=True).metrics.speculative_decoding
    assert found.num_rounds_by_num_draft == [launched.count(k) for k in range(max(launched) + 1)]
    assert sum(found.num_rounds_by_num_draft) == found.num_rounds == len(launched)
    assert found.num_undrafted_rounds == launched.count(0) >= 1
    assert found.mean_num_draft_tokens == pytest.approx(sum(launched) / len(launched))
    assert found.estimated_speedup is not None
    assert found.estimated_speedup > 1.5
    described = found.to_dict()
    assert described["estimated_speedup"] == found.estimated_speedup
    assert json.loads(json.dumps(described)) == described


# -- what a choice may depend on ----------------------------------------------------------------------------------


def test_a_choice_depends_on_counts_and_clocks_alone(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    wild_clock: list[int],
) -> None:
    """In rejection mode, too: told again what it was told, without any token, it chooses the same."""
    choose, observe, go_on = Chooser.choose, Chooser.observe, Chooser.go_on
    told: list[tuple[Any, ...]] = []

    def recorded_choose(chooser: Chooser, running: Any) -> None:
        known = [(s.sequence_id, len(s.output_ids), s.remaining, s.num_rounds_ahead) for s in running]
        choose(chooser, running)
        told.append(("choose", known, [s.num_speculative_tokens for s in running]))

    def recorded_observe(chooser: Chooser, sequences: Any, *rest: Any, **times: Any) -> None:
        observe(chooser, sequences, *rest, **times)
        told.append(("observe", [s.sequence_id for s in sequences], rest, times))

    def recorded_go_on(chooser: Chooser, num_rounds: int) -> None:
        go_on(chooser, num_rounds)
        told.append(("go on", num_rounds))

    monkeypatch.setattr(Chooser, "choose", recorded_choose)
    monkeypatch.setattr(Chooser, "observe", recorded_observe)
    monkeypatch.setattr(Chooser, "go_on", recorded_go_on)
    engine = build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.1), rounds_ahead=2)
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 4, "acceptance": "rejection", "ignore_eos": True}
    engine.generate(PROMPTS, max_new_tokens=60, **sampling)
    tally.check()
    again, rows = Chooser(hides_host=True), dict[int, Row]()
    for what, entries, *rest in told:
        if what == "choose":
            running = []
            for sequence_id, num_tokens, remaining, num_rounds_ahead in entries:
                row = rows.setdefault(sequence_id, Row(lambda _: 0.0, sequence_id))
                row.output_ids = (0,) * min(1, num_tokens)
                row.remaining, row.num_rounds_ahead = remaining, num_rounds_ahead
                running.append(row)
            choose(again, running)  # type: ignore[arg-type]
            assert [row.num_speculative_tokens for row in running] == rest[0]
        elif what == "go on":
            go_on(again, entries)
        else:
            counts, times = rest
            observe(again, [rows[sequence_id] for sequence_id in entries], *counts, **times)  # type: ignore[misc]
    assert len(set(wild_clock)) >= 3


def test_more_rows_never_seem_cheaper_than_fewer() -> None:
    """Rounds without drafts were measured when the machine was slow, others when it was not."""
    costs = RoundCosts()
    for _ in range(40):
        costs.note(1, 0, 1, 2.0, draft=0.0, verify=2.0)
    for _ in range(8):
        costs.note(1, 2, 3, 1.3, draft=0.2, verify=1.1)
    assert costs.verify(1, 1) <= costs.verify(3, 1)


def scattered(rng: random.Random) -> float:
    """What a round takes on a busy machine, of what it takes: a little more or less, now and then twice or thrice."""
    return rng.gauss(1.0, 0.08) * (rng.choice((2.0, 3.0)) if rng.random() < 0.05 else 1.0)


@pytest.mark.parametrize("knows_parts", [False, True])
def test_rounds_that_scatter_make_nothing_seem_dearer_that_is_not_measured(knows_parts: bool) -> None:
    """Thousands of rounds without drafts: those with drafts still take what they took beside them, and so does the
    machine."""
    for seed in range(5):
        rng, costs = random.Random(seed), RoundCosts()

        def note(k: int, rng: random.Random = rng, costs: RoundCosts = costs) -> None:
            draft, verify = 0.1 * k * scattered(rng), (1.0 + 0.15 * k) * scattered(rng)
            if knows_parts:
                costs.note(1, k, k + 1, draft + verify, draft=draft, verify=verify)
            else:
                costs.note(1, k, k + 1, draft + verify)

        def slower(costs: RoundCosts = costs) -> float:
            return (costs.verify(5, 1) + costs.draft(1)(4)) / costs.verify(1, 1)

        for _ in range(60):
            note(0)
            note(4)
        assert slower() == pytest.approx(2.0, rel=0.2)
        before, pace = slower(), costs.pace
        for _ in range(4000):
            note(0)
        assert 1.0 < slower() < 1.2 * before
        assert costs.pace == pytest.approx(pace, rel=0.5)


def test_one_slow_round_is_not_what_a_row_costs() -> None:
    """The only one with drafts so far: what seems dear would never be tried again."""
    costs = RoundCosts()
    for _ in range(40):
        costs.note(1, 0, 1, 1.0, draft=0.0, verify=1.0)
    costs.note(1, 4, 5, 50.0, draft=0.0, verify=50.0)
    assert costs.row() * costs.pace < 0.1
    for _ in range(2):
        costs.note(1, 4, 5, 1.8, draft=0.0, verify=1.8)
    assert costs.row() * costs.pace == pytest.approx(0.2, rel=0.1)
