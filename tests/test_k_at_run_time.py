"""k of every row changes while it runs, whatever is recorded and however far the host lags: laws A, G, J and L hold."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_helpers import (
    BuildTwins,
    CheckpointFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    generate_with_k,
    make_prompt,
    plain,
    run_part_by_part,
)
from scripted_drafters import ScriptedDrafter

from specengine.config import SamplingParams
from specengine.engine import times
from specengine.engine.times import NUM_TIMES, Clock, RoundTimes
from specengine.runtime.state import BatchState

VOCAB = 64
MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "acceptance": "coupled"},
    {"temperature": 1.1, "seed": 5, "acceptance": "coupled", "top_k": 12, "top_p": 0.9},
    {"logprobs": 2},
    {"temperature": 0.7, "seed": 9, "acceptance": "coupled", "logprobs": 0},
]
PROMPTS = [make_prompt(3 + 2 * row, row, VOCAB) for row in range(len(MODES))]


def at_random(seed: int) -> Callable[[int, int], int]:
    """Any k for any row in any step: none, one, a few, more than a block."""
    return lambda step, row: random.Random(f"{seed},{step},{row}").choice((0, 0, 1, 2, 3, 5, 9))


def params_of(modes: list[dict[str, Any]], num_tokens: int = 40) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, **mode) for mode in modes]


# Whose log-probabilities are wanted is read before the next round: no lag there.
@pytest.mark.parametrize("num_rows", [3, 5], ids=["lagging", "with log-probabilities"])
@pytest.mark.parametrize("rounds_ahead", [0, 1, 2, 4])
def test_any_k_in_any_round_gives_the_bits_of_plain_decoding(
    rounds_ahead: int, num_rows: int, checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    prompts, modes = PROMPTS[:num_rows], MODES[:num_rows]
    models = checkpoint(seed=1), checkpoint(seed=1, noise=0.1)
    for seed, engine in enumerate(build_twins(*models, rounds_ahead=rounds_ahead)):
        num_free = engine.num_free_blocks
        expected = [
            plain(engine, prompt, max_new_tokens=40, ignore_eos=True, **mode)
            for prompt, mode in zip(prompts, modes, strict=True)
        ]
        results = generate_with_k(engine, prompts, params_of(modes), at_random(seed), joins_every=2 * seed)
        for result, truth in zip(results, expected, strict=True):
            assert_same(result, truth)
        assert_idle(engine, num_free)
    tally.check()


def test_a_host_drafter_follows_k_too(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB, counts=(2, 0, 4))
    for seed, engine in enumerate(build_twins(checkpoint(seed=1), drafter, rounds_ahead=2)):
        expected = [
            plain(engine, prompt, max_new_tokens=40, ignore_eos=True, **mode)
            for prompt, mode in zip(PROMPTS, MODES, strict=True)
        ]
        drafter.learn(expected)
        for result, truth in zip(
            generate_with_k(engine, PROMPTS, params_of(MODES), at_random(seed)), expected, strict=True
        ):
            assert_same(result, truth)
    tally.check()


@pytest.mark.parametrize("rounds_ahead", [1, 2, 4])
@pytest.mark.parametrize("mode", [{}, {"temperature": 0.9, "seed": 3, "acceptance": "rejection"}], ids=str)
def test_the_hosts_lag_changes_no_draft(
    mode: dict[str, Any], rounds_ahead: int, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """With the same k in the same rounds, a draft that is right now and then is right in the same places."""
    models = checkpoint(seed=1), checkpoint(seed=1, noise=0.1)
    results = [
        generate_with_k(
            build_engine(*models, rounds_ahead=ahead), PROMPTS[2:3], params_of([mode], 90), at_random(7)
        )[0]
        for ahead in (0, rounds_ahead)
    ]
    assert_same(*results)
    ours, theirs = (result.metrics.speculative_decoding for result in results)
    assert ours == theirs
    assert 0 < ours.num_accepted_draft_tokens < ours.num_draft_tokens


def test_a_k_that_the_device_does_not_hear_of_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchState, "_set_num_speculative", lambda *_: None)
    engine = build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.1))
    (result,) = generate_with_k(engine, PROMPTS[:1], params_of(MODES[:1]), lambda step, row: 3)
    assert result.metrics.speculative_decoding.num_draft_tokens == 0


# -- times --------------------------------------------------------------------------------------------------------


def test_each_round_leaves_its_times(checkpoint: CheckpointFactory, build_twins: BuildTwins) -> None:
    direct, replayed = build_twins(checkpoint(seed=1), checkpoint(seed=1, noise=0.1))
    pattern = (4, 0, 2)
    for engine in (direct, replayed):
        (result,) = generate_with_k(
            engine, PROMPTS[:1], params_of(MODES[:1]), lambda step, row: pattern[step % 3]
        )
        noted = list(engine._rounds.times)
        assert len(noted) == result.metrics.speculative_decoding.num_rounds
        assert {(each.batch_size, each.k) for each in noted[:-3]} == {(1, 4), (1, 0), (1, 2)}
        for each in noted:
            assert each.device > 0
            assert each.host > 0
            parts = (each.draft, each.verify, each.commit)
            if engine is direct:
                assert all(part is not None and part > 0 for part in parts)
                assert sum(part or 0.0 for part in parts) == pytest.approx(each.device)
            else:
                assert parts == (None, None, None)


def test_only_the_latest_times_are_kept(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> None:
    engine = build_engine(checkpoint(seed=1))
    assert engine._rounds.times.maxlen == NUM_TIMES
    engine._rounds.times = times_before = deque(maxlen=3)
    plain(engine, PROMPTS[0], max_new_tokens=9)
    assert len(times_before) == 3


class FakeEvent:
    """A CUDA event on a device whose clock ticks once a record; to read one that is not there yet is an error."""

    ticks = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self) -> None:
        FakeEvent.ticks += 1
        self.at = FakeEvent.ticks

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1000.0 * (other.at - self.at)


def test_on_cuda_events_are_read_later_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeEvent] = []

    def make(**options: Any) -> FakeEvent:
        made.append(FakeEvent(**options))
        return made[-1]

    monkeypatch.setattr(times.torch.cuda, "Event", make)
    clock = Clock(torch.device("cuda"))
    for _ in range(5):
        first, second = clock.start(2, 4), clock.start(3, 0)
        for _ in range(3):
            first.mark()
        second.mark()
        for watch in (first, second):
            watch.begin_host()
        one, other = clock.stop(first), clock.stop(second)
        assert isinstance(one, RoundTimes)
        assert (one.batch_size, one.k, one.draft, one.verify, one.commit, one.device) == (2, 4, 2, 1, 1, 4)
        assert (other.draft, other.verify, other.commit, other.device) == (None, None, None, 4)
    assert len(made) == 6


# -- blocks -------------------------------------------------------------------------------------------------------


def test_a_draft_that_catches_up_writes_no_shared_block(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where it begins to write: blocks that only the target had computed are copied first."""
    engine = build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.1))
    runner: Any = engine._drafter
    build, manager = runner.runner.build, engine._kv_cache.manager
    written: list[int] = []

    def checked(batch: Any, feed: Any) -> Any:
        rows = build(batch, feed)
        blocks = set((rows.kv_slots[rows.kv_slots >= 0] // 4).tolist())
        written.extend(manager.reference_count(block) for block in blocks)
        return rows

    monkeypatch.setattr(runner.runner, "build", checked)
    run_part_by_part(monkeypatch)
    shared = make_prompt(17, 1, VOCAB)
    prompts = [shared, [*shared, 5], [*shared, 7, 8]]
    drawn = [
        {"temperature": 1.0, "seed": 1, "acceptance": "rejection"}
    ] * 3  # drafts are built row by row then
    generate_with_k(
        engine, prompts, params_of(drawn), lambda step, row: 3 * (step > 5 or row == 1), joins_every=2
    )
    assert len(written) > 10
    assert set(written) == {1}
