"""Law N: preemption, forks and shared prefixes change nothing but the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from law_helpers import Tally, assert_idle, assert_same, make_prompt, spec
from scripted_drafters import RandomDrafter

from conftest import CheckpointFactory, EngineFactory
from specengine import Engine, SamplingParams, StreamEvent, rng
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.engine.scheduler import Scheduler
from specengine.runtime.kv_cache import DRAFT, TARGET, KVCache
from specengine.runtime.state import BatchState

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
BLOCK = 4
K = 3
NUM_TOKENS = 22
GREEDY: dict[str, Any] = {"ignore_eos": True, "logprobs": 2, "max_new_tokens": NUM_TOKENS}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "coupled": {**GREEDY, "temperature": 1.0, "seed": 3, "acceptance": "coupled"},
    "rejection": {**GREEDY, "temperature": 1.0, "seed": 3, "acceptance": "rejection", "top_p": 0.95},
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
BuildPair = Callable[..., Engine]


@pytest.fixture
def build_pair(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> BuildPair:
    """build_pair(**config): the tiny target and a draft that agrees with it now and then."""

    def build(**config: Any) -> Engine:
        target, draft = checkpoint(seed=1), checkpoint(seed=1, noise=0.3)
        return build_engine(target, draft, **{"block_size": BLOCK, **config})

    return build


# -- preemption --------------------------------------------------------------------------------------------------

# 10 + 22 tokens take 8 blocks: 12 of them and the scratch block hold one and a half requests.
TIGHT = {"num_blocks": 13}
PROMPTS = [make_prompt(length, seed=length) for length in (10, 9, 10, 8)]


def check_preemption(roomy: Engine, tight: Engine, sampling: dict[str, Any]) -> None:
    num_free = tight.num_free_blocks
    alone = [spec(roomy, prompt, K, **sampling, prompt_logprobs=1) for prompt in PROMPTS]
    together = spec(tight, PROMPTS, K, **sampling, prompt_logprobs=1)
    assert sum(result.metrics.num_preemptions for result in together) > 0, "nothing was preempted"
    for result, expected in zip(together, alone, strict=True):
        assert_same(result, expected)
    assert_idle(tight, num_free)
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        assert_same(spec(tight, prompt, K, **sampling, prompt_logprobs=1), expected)


@each_sampling
@pytest.mark.parametrize("chunk", [512, 3])
def test_four_requests_in_a_pool_for_one_and_a_half_are_as_alone(
    build_pair: BuildPair, tally: Tally, sampling: dict[str, Any], chunk: int
) -> None:
    check_preemption(build_pair(), build_pair(**TIGHT, prefill_chunk_size=chunk), sampling)
    tally.check()


@each_sampling
def test_four_requests_in_a_tight_pool_without_a_prefix_cache_are_as_alone(
    build_pair: BuildPair, tally: Tally, sampling: dict[str, Any]
) -> None:
    check_preemption(build_pair(), build_pair(**TIGHT, enable_prefix_cache=False), sampling)
    tally.check()


def test_samples_that_do_not_fit_together_are_as_alone(build_pair: BuildPair, tally: Tally) -> None:
    roomy, tight = build_pair(), build_pair(**TIGHT)
    num_free = tight.num_free_blocks
    sampling = SAMPLINGS["rejection"]
    result = spec(tight, PROMPTS[0], K, **sampling, n=4)
    assert result.metrics.num_preemptions > 0
    assert_same(result, spec(roomy, PROMPTS[0], K, **sampling, n=4))
    assert_idle(tight, num_free)
    tally.check()


def forget_outputs(patch: pytest.MonkeyPatch) -> None:
    """A preempted sequence comes back with its prompt alone in the state's token row."""
    admit = BatchState.admit

    def mutant(self: BatchState, sequence: Any) -> None:
        admit(self, sequence)
        self.tokens[sequence.slot, len(sequence.request.prompt_ids) + 1 :] = 0

    patch.setattr(BatchState, "admit", mutant)


def resume_without_computing(patch: pytest.MonkeyPatch) -> None:
    """A preempted sequence is taken as computed although its KV is gone."""
    reserve = KVCache.reserve

    def mutant(self: KVCache, slot: int, first_position: int, num_tokens: int) -> None:
        reserve(self, slot, first_position, num_tokens)
        if self.num_computed(slot, 0) == 0 and num_tokens > 12:
            self.manager.set_computed(slot, 0, num_tokens - 1)

    patch.setattr(KVCache, "reserve", mutant)


def keep_a_block(patch: pytest.MonkeyPatch) -> None:
    """One block of the first sequence that is preempted stays referenced."""
    release, kept = Scheduler._release, []

    def mutant(self: Scheduler, sequence: Any) -> None:
        if not kept and not sequence.is_finished:
            kept.append(self._manager.fork(sequence.slot, 1))
        release(self, sequence)

    patch.setattr(Scheduler, "_release", mutant)


@pytest.mark.parametrize("fault", [forget_outputs, resume_without_computing, keep_a_block])
def test_a_faulty_preemption_is_noticed(
    build_pair: BuildPair, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    roomy, tight = build_pair(), build_pair(**TIGHT, enable_prefix_cache=False)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_preemption(roomy, tight, SAMPLINGS["greedy"])


# -- abort -------------------------------------------------------------------------------------------------------


def collect(engine: Engine, *, until: Callable[[int], bool] = lambda step: False) -> list[StreamEvent]:
    """Steps until nothing is left, or until said."""
    events: list[StreamEvent] = []
    for step in range(1000):
        if not engine.has_work or until(step):
            return events
        events += engine.step()
    raise AssertionError("the engine did not finish in 1000 steps")


@each_sampling
def test_an_abort_at_any_step_leaves_the_others_as_alone(
    build_pair: BuildPair, tally: Tally, sampling: dict[str, Any]
) -> None:
    roomy = build_pair()
    alone = [spec(roomy, prompt, K, **sampling) for prompt in PROMPTS]
    for config in (TIGHT, {}):
        engine = build_pair(**config)
        num_free = engine.num_free_blocks
        params = SamplingParams(**sampling, num_speculative_tokens=K)
        for abort_after in (0, 1, 2, 5):
            ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
            events = collect(engine, until=lambda step, last=abort_after: step == last)
            engine.abort(ids[1])
            events += collect(engine)
            results = {event.index: event.result for event in events if event.result is not None}
            assert results[ids[1]].finish_reason == "abort"
            cut = results[ids[1]].token_ids
            assert cut == alone[1].token_ids[: len(cut)]
            for place in (0, 2, 3):
                assert_same(results[ids[place]], alone[place])
            assert_idle(engine, num_free)
    tally.check()


class Meddler(RandomDrafter):
    """Does something to the engine in the middle of its fourth round."""

    def meddle(self) -> None:
        raise NotImplementedError

    def propose(self, batch: Any) -> Any:
        self.num_rounds = getattr(self, "num_rounds", 0) + 1
        if self.num_rounds == 4:
            self.meddle()
        return super().propose(batch)


@each_sampling
@pytest.mark.parametrize("how", ["abort", "close"])
def test_an_abort_in_the_middle_of_a_round_leaves_the_others_as_alone(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
    sampling: dict[str, Any],
    how: str,
) -> None:
    """By a drafter or a signal handler, or by the garbage collector, which closes an abandoned stream."""
    drafter = Meddler(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1), drafter)
    num_free = engine.num_free_blocks
    params = SamplingParams(**sampling, num_speculative_tokens=K)
    stream = engine.stream([PROMPTS[1]], params)
    next(stream)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    drafter.meddle = stream.close if how == "close" else lambda: engine.abort(ids[1])
    events = collect(engine)
    results = {event.index: event.result for event in events if event.result is not None}
    assert results[ids[1]].finish_reason == ("abort" if how == "abort" else "length")
    stream.close()
    drafter.num_rounds = 99
    for place in (0, 2, 3):
        assert_same(results[ids[place]], spec(engine, PROMPTS[place], K, **sampling))
    assert_idle(engine, num_free)
    tally.check()


class Interruption(BaseException):
    """What Ctrl-C is."""


@each_sampling
@pytest.mark.parametrize("method", ["prepare", "propose", "observe"])
def test_an_interrupted_round_is_as_if_it_had_never_begun(
    build_pair: BuildPair,
    tally: Tally,
    monkeypatch: pytest.MonkeyPatch,
    sampling: dict[str, Any],
    method: str,
) -> None:
    """Before it, at the drafting, and after the commit on the device."""
    engine = build_pair()
    alone = [spec(engine, prompt, K, **sampling) for prompt in PROMPTS]
    num_free = engine.num_free_blocks
    original, num_calls = getattr(DraftModelDrafter, method), 0

    def interrupt(self: DraftModelDrafter, *arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls % 3 == 0:
            raise Interruption
        return original(self, *arguments)

    monkeypatch.setattr(DraftModelDrafter, method, interrupt)
    params = SamplingParams(**sampling, num_speculative_tokens=K)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    events: list[StreamEvent] = []
    while engine.has_work:
        with contextlib.suppress(Interruption):
            events += engine.step()
        engine._kv_cache.manager.check_invariants()
    results = {event.index: event.result for event in events if event.result is not None}
    assert num_calls >= 3
    for request_id, expected in zip(ids, alone, strict=True):
        assert_same(results[request_id], expected)
    assert_idle(engine, num_free)
    tally.check()


# -- shared prefixes ---------------------------------------------------------------------------------------------

SHARED = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1)


def prompts_sharing(num_shared: int) -> list[list[int]]:
    """Two prompts of 11 tokens with exactly `num_shared` first tokens in common, and the first one's double."""
    first = make_prompt(11, seed=20)
    second = first[:num_shared] + [(token + 1) % (VOCAB - 1) + 1 for token in first[num_shared:]]
    assert first[:num_shared] == second[:num_shared]
    assert first[num_shared] != second[num_shared]
    return [first, second, list(first)]


def check_shared_prefix(
    build_pair: BuildPair, sampling: dict[str, Any], num_shared: int, *, n: int = 1
) -> None:
    """One after the other and all at once: each as in an engine of its own, and as much reused as can be."""
    fresh = build_pair(enable_prefix_cache=False)
    prompts = prompts_sharing(num_shared)
    expected = [spec(fresh, prompt, K, **sampling, n=n) for prompt in prompts]
    engine = build_pair()
    num_free = engine.num_free_blocks
    results = [spec(engine, prompt, K, **sampling, n=n) for prompt in prompts]
    for result, truth in zip(results, expected, strict=True):
        assert_same(result, truth)
    own = (n - 1) * (len(prompts[0]) - 1)  # forks share the prompt but for its last token
    cached = [result.metrics.num_cached_tokens - own for result in results]
    assert cached == [0, num_shared // BLOCK * BLOCK, (len(prompts[0]) - 1) // BLOCK * BLOCK]
    assert_idle(engine, num_free)
    engine._kv_cache.manager.reset_prefix_cache()
    for result, truth in zip(spec(engine, prompts, K, **sampling, n=n), expected, strict=True):
        assert_same(result, truth)
    assert_idle(engine, num_free)
    first, again = results[0].metrics.speculative_decoding, results[2].metrics.speculative_decoding
    assert again.draft_acceptance_rate >= first.draft_acceptance_rate, "the second run accepts less"
    assert again == first


@each_sampling
@pytest.mark.parametrize("num_shared", SHARED)
def test_prompts_that_share_a_prefix_are_as_alone(
    build_pair: BuildPair, tally: Tally, sampling: dict[str, Any], num_shared: int
) -> None:
    check_shared_prefix(build_pair, sampling, num_shared)
    tally.check()


@pytest.mark.parametrize("num_shared", [1, BLOCK, BLOCK + 1])
def test_samples_that_share_a_prefix_are_as_alone(
    build_pair: BuildPair, tally: Tally, num_shared: int
) -> None:
    check_shared_prefix(build_pair, SAMPLINGS["rejection"], num_shared, n=3)
    tally.check()


def check_forks(engine: Engine, sampling: dict[str, Any], length: int) -> None:
    """Each of n samples, forked from one prompt, is what it is alone: a shared block is copied before a write."""
    num_free = engine.num_free_blocks
    prompt = make_prompt(length, seed=30)
    result = spec(engine, prompt, K, **sampling, n=4)
    assert_idle(engine, num_free)
    for output in result.outputs:
        own = {**sampling, "seed": rng.derive_seed(sampling["seed"], output.index)}
        alone = spec(engine, prompt, K, **own).outputs[0]
        assert (output.token_ids, output.logprobs) == (alone.token_ids, alone.logprobs)
    engine._kv_cache.manager.check_invariants()


@pytest.mark.parametrize("length", range(1, 2 * BLOCK + 2))
@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_forked_samples_are_as_alone(build_pair: BuildPair, tally: Tally, mode: str, length: int) -> None:
    check_forks(build_pair(enable_prefix_cache=False), SAMPLINGS[mode], length)
    tally.check()


def test_the_second_run_finds_what_the_first_one_generated(build_pair: BuildPair, tally: Tally) -> None:
    """A chat's next turn: the prompt and the continuation are both found, and the draft loses nothing."""
    engine = build_pair()
    prompt = make_prompt(9, seed=40)
    first = spec(engine, prompt, K, **GREEDY)
    turn = prompt + first.token_ids[:-2]
    again = spec(engine, turn, K, **{**GREEDY, "max_new_tokens": 8})
    fresh = spec(build_pair(), turn, K, **{**GREEDY, "max_new_tokens": 8})
    assert again.metrics.num_cached_tokens == (len(turn) - 1) // BLOCK * BLOCK
    assert_same(again, fresh)
    assert again.metrics.speculative_decoding == fresh.metrics.speculative_decoding
    tally.check()


def check_caught_up(build_pair: BuildPair, sampling: dict[str, Any]) -> None:
    """A prefix that only the target has computed: the draft computes it too, and accepts as much as without it."""
    engine, fresh = build_pair(), build_pair()
    prompt = make_prompt(17, seed=41)
    engine.generate(prompt, num_speculative_tokens=0, **{**sampling, "max_new_tokens": 1})
    # What is there must not be read; where it is, not the same here and there, whatever memory was used for before.
    for each, value in ((engine, 3.0), (fresh, -2.0)):
        each._kv_cache.tensors[DRAFT].fill_(value)
    again, expected = spec(engine, prompt, K, **sampling), spec(fresh, prompt, K, **sampling)
    assert again.metrics.num_cached_tokens == 16
    assert_same(again, expected)
    assert again.metrics.speculative_decoding == expected.metrics.speculative_decoding


@each_sampling
def test_a_prefix_that_only_the_target_computed_is_caught_up_by_the_draft(
    build_pair: BuildPair, tally: Tally, sampling: dict[str, Any]
) -> None:
    check_caught_up(build_pair, sampling)
    tally.check()


def copy_nothing(patch: pytest.MonkeyPatch) -> None:
    """Copy on write gives a new block, and leaves it empty."""

    def mutant(self: KVCache, slot: int, first_position: int, num_tokens: int) -> None:
        self.manager.extend(slot, first_position, num_tokens)

    patch.setattr(KVCache, "reserve", mutant)


def write_shared_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks are made writable from the wrong position on: the shared last one is written in place."""
    reserve = KVCache.reserve

    def mutant(self: KVCache, slot: int, first_position: int, num_tokens: int) -> None:
        reserve(self, slot, min(first_position + BLOCK, num_tokens), num_tokens)

    patch.setattr(KVCache, "reserve", mutant)


def publish_other_tokens(patch: pytest.MonkeyPatch) -> None:
    """Blocks are found by their first token alone."""

    def mutant(self: Scheduler, sequence: Any) -> None:
        tokens = np.asarray(sequence.token_ids, dtype=np.int32)
        self._manager.publish(sequence.slot, tokens // 8 * 8)

    share = Scheduler._share_prefix

    def sharing(self: Scheduler, sequence: Any) -> int:
        if sequence.output_ids or sequence.sample_index:
            return share(self, sequence)
        tokens = np.asarray(sequence.token_ids, dtype=np.int32) // 8 * 8
        return int(self._manager.allocate(tokens, sequence.num_tokens - 1))

    patch.setattr(Scheduler, "publish", mutant)
    patch.setattr(Scheduler, "_share_prefix", sharing)


@pytest.mark.parametrize("fault", [copy_nothing, write_shared_blocks])
def test_a_faulty_fork_is_noticed(
    build_pair: BuildPair, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    engine = build_pair(enable_prefix_cache=False)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_forks(engine, SAMPLINGS["coupled"], 7)


def test_a_prefix_found_by_a_weak_key_is_noticed(
    build_pair: BuildPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_other_tokens(monkeypatch)
    with pytest.raises(AssertionError):
        check_shared_prefix(build_pair, GREEDY, 0)


def test_a_draft_that_trusts_the_targets_watermark_is_noticed(
    build_pair: BuildPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact all the same, but it accepts less: the bug of a silent slowdown."""
    num_computed = KVCache.num_computed
    monkeypatch.setattr(KVCache, "num_computed", lambda self, slot, _: num_computed(self, slot, TARGET))
    with pytest.raises(AssertionError):
        check_caught_up(build_pair, SAMPLINGS["coupled"])


def test_a_drafter_is_told_when_a_sequence_is_preempted(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = RandomDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1), drafter, **TIGHT)
    results = spec(engine, PROMPTS, K, **GREEDY)
    num_preemptions = sum(result.metrics.num_preemptions for result in results)
    assert num_preemptions > 0
    assert len(drafter.released) == num_preemptions + len(PROMPTS)
    tally.check(accepted=False)
