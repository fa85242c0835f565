"""Law P: what the engine says about its speculation is what happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from law_helpers import Tally, assert_same, check_rounds, make_prompt, plain, spec
from scripted_drafters import PerfectDrafter, ScriptedDrafter

from conftest import CheckpointFactory, EngineFactory
from specengine import Engine, GenerationResult, SamplingParams, metrics
from specengine.outputs import SpeculativeDecodingMetrics

VOCAB = 64
NUM_TOKENS = 23
PROMPT = make_prompt(7, seed=50)
GREEDY: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": NUM_TOKENS, "return_rounds": True}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 1.0, "seed": 4, "acceptance": "rejection"}


@dataclass
class Expected:
    """What a drafter that accepts counts[i % len(counts)] tokens in round i must be credited with."""

    num_rounds: int = 0
    num_trimmed: int = 0
    rounds: list[tuple[int, int]] = field(default_factory=list)  # (drafted, accepted), where drafted > 0

    @classmethod
    def of_script(cls, counts: Sequence[int], k: int, budget: int, emitted: int) -> Expected:
        """`emitted` tokens of a budget: fewer where a stop comes, in the last of them."""
        expected, done = cls(), 1
        while done < emitted:
            drafted = min(k, budget - done - 1)
            accepted = min(counts[expected.num_rounds % len(counts)], drafted)
            expected.num_rounds += 1
            kept = min(accepted + 1, emitted - done)
            done += kept
            if kept <= accepted:  # the stop is an accepted draft: what follows it was never needed
                expected.num_trimmed += 1
                drafted = accepted = kept
            if drafted:
                expected.rounds.append((drafted, accepted))
        return expected

    def check(self, found: SpeculativeDecodingMetrics, k: int) -> None:
        rounds = self.rounds
        longest = max((drafted for drafted, _ in rounds), default=0)
        positions = range(longest)
        assert found.num_spec_tokens == k
        assert found.num_rounds == self.num_rounds
        assert found.num_trimmed_tokens == self.num_trimmed
        assert found.num_spec_steps == len(rounds)
        assert found.num_draft_tokens == sum(drafted for drafted, _ in rounds)
        assert found.num_accepted_draft_tokens == sum(accepted for _, accepted in rounds)
        most = max((accepted for _, accepted in rounds), default=-1)
        histogram = [sum(accepted == j for _, accepted in rounds) for j in range(most + 1)]
        assert found.acceptance_histogram == histogram
        drafted_at = [sum(drafted > i for drafted, _ in rounds) for i in positions]
        accepted_at = [sum(accepted > i for _, accepted in rounds) for i in positions]
        assert found.num_drafted_by_position == drafted_at
        assert found.num_accepted_by_position == accepted_at
        assert found.acceptance_by_position == [a / d for a, d in zip(accepted_at, drafted_at, strict=True)]
        rejected_at = [sum(accepted == i < drafted for drafted, accepted in rounds) for i in positions]
        assert found.rejection_positions == rejected_at
        if self.num_rounds:
            total = sum(accepted for _, accepted in rounds)
            assert found.mean_acceptance_length == pytest.approx(1 + total / self.num_rounds)


def check_identity(result: GenerationResult) -> None:
    """emitted = 1 + accepted + rounds - trimmed for each sample, and the parts add up."""
    found = result.metrics.speculative_decoding
    emitted = sum(len(output.token_ids) for output in result.outputs)
    accepted, rounds = found.num_accepted_draft_tokens, found.num_rounds
    assert emitted == len(result.outputs) + accepted + rounds - found.num_trimmed_tokens
    assert emitted == result.metrics.num_generated_tokens
    sources = [source for output in result.outputs for source in output.token_source]
    assert len(sources) == emitted
    assert sources.count("draft") == accepted
    assert sum(found.acceptance_histogram) == found.num_spec_steps <= rounds
    assert sum(j * count for j, count in enumerate(found.acceptance_histogram)) == accepted
    assert sum(found.num_accepted_by_position) == accepted
    assert sum(found.num_drafted_by_position) == found.num_draft_tokens
    never_increase = sorted(found.num_accepted_by_position, reverse=True)
    assert found.num_accepted_by_position == never_increase, "acceptance by position increases"
    assert sum(found.rejection_positions) <= found.num_spec_steps
    assert 0.0 <= found.draft_acceptance_rate <= 1.0
    assert found.to_dict()["acceptance_by_position"] == found.acceptance_by_position
    check_rounds(result)


# -- scripted drafters give exactly known numbers ----------------------------------------------------------------

SCRIPTS = [(0,), (1,), (2,), (3, 0), (1, 2, 0, 5), (0, 8), (64,)]


def check_scripts(engine: Engine, drafter: ScriptedDrafter, sampling: dict[str, Any]) -> None:
    truth = plain(engine, PROMPT, **sampling)
    Expected(num_rounds=NUM_TOKENS - 1).check(truth.metrics.speculative_decoding, k=0)
    for counts in SCRIPTS:
        for k in (1, 2, 3, 4, 8, 30):
            drafter.forget()
            drafter.learn(truth, counts=counts)
            result = spec(engine, PROMPT, k, **sampling)
            expected = Expected.of_script(counts, k, NUM_TOKENS, NUM_TOKENS)
            expected.check(result.metrics.speculative_decoding, k)
            check_identity(result)
            assert result.metrics.num_target_forwards == 1 + expected.num_rounds


def check_stops(engine: Engine, drafter: ScriptedDrafter) -> None:
    """A stop at every index: what came after it in its round is not counted."""
    truth = plain(engine, PROMPT, **GREEDY)
    tokens = truth.token_ids
    for index in [index for index, token in enumerate(tokens) if token not in tokens[:index]]:
        for counts in ((64,), (2, 0), (1,)):
            drafter.forget()
            drafter.learn(truth, counts=counts)
            result = spec(engine, PROMPT, 4, **GREEDY, stop_token_ids=[tokens[index]])
            assert result.token_ids == tokens[: index + 1]
            expected = Expected.of_script(counts, 4, NUM_TOKENS, index + 1)
            expected.check(result.metrics.speculative_decoding, 4)
            check_identity(result)


@pytest.fixture
def scripted() -> ScriptedDrafter:
    return ScriptedDrafter(vocab_size=VOCAB)


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory, scripted: ScriptedDrafter) -> Engine:
    return build_engine(checkpoint(seed=1), scripted)


@pytest.mark.parametrize(
    "sampling", [GREEDY, {**SAMPLED, "acceptance": "coupled"}], ids=["greedy", "coupled"]
)
def test_scripted_drafters_give_exactly_known_numbers(
    engine: Engine, scripted: ScriptedDrafter, tally: Tally, sampling: dict[str, Any]
) -> None:
    check_scripts(engine, scripted, sampling)
    tally.check()


def test_what_a_stop_cut_off_is_not_counted(engine: Engine, scripted: ScriptedDrafter, tally: Tally) -> None:
    check_stops(engine, scripted)
    tally.check()


def test_each_request_of_a_batch_counts_its_own(
    engine: Engine, scripted: ScriptedDrafter, tally: Tally
) -> None:
    prompts = [make_prompt(length, seed=51) for length in (3, 4, 5, 8, 13)]
    scripts = SCRIPTS[:5]
    truths = plain(engine, prompts, **GREEDY)
    for truth, counts in zip(truths, scripts, strict=True):
        scripted.learn(truth, counts=counts)
    ks = (1, 2, 3, 5, 8)
    results = engine.generate(prompts, [SamplingParams(**GREEDY, num_speculative_tokens=k) for k in ks])
    for result, counts, k in zip(results, scripts, ks, strict=True):
        expected = Expected.of_script(counts, k, NUM_TOKENS, NUM_TOKENS)
        expected.check(result.metrics.speculative_decoding, k)
        check_identity(result)
    tally.check()


def test_a_perfect_drafter_is_never_rejected(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    drafter = PerfectDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1), drafter)
    drafter.learn(plain(engine, PROMPT, **GREEDY))
    found = spec(engine, PROMPT, 4, **GREEDY).metrics.speculative_decoding
    assert found.draft_acceptance_rate == 1.0
    assert sum(found.rejection_positions) == 0


# -- any drafter -------------------------------------------------------------------------------------------------


def check_any(engine: Engine, prompts: list[list[int]], **sampling: Any) -> None:
    """The identity for each of many requests, and the same numbers when asked again."""
    results = engine.generate(prompts, **sampling)
    for result in results:
        check_identity(result)
    again = engine.generate(prompts, **sampling)
    for result, twin in zip(results, again, strict=True):
        first, second = (each.metrics.speculative_decoding for each in (result, twin))
        assert first == second, "two equal calls give different statistics"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "rejection"])
@pytest.mark.parametrize("num_blocks", [None, 18])
def test_emitted_is_one_plus_accepted_plus_rounds_minus_trimmed(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
    sampling: dict[str, Any],
    k: int,
    n: int,
    num_blocks: int | None,
) -> None:
    """With a draft model, several samples, stops in the middle, preemption."""
    engine = build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.3), num_blocks=num_blocks)
    prompts = [make_prompt(length, seed=52) for length in (1, 4, 9, 12)]
    stops = {"stop_token_ids": list(range(0, VOCAB, 16)), "min_new_tokens": 5}
    check_any(engine, prompts, **sampling, **stops, n=n, num_speculative_tokens=k)
    tally.check()


# -- faults ------------------------------------------------------------------------------------------------------

Record = Callable[..., None]


def _mutated(change: Callable[[SpeculativeDecodingMetrics, dict[str, int]], dict[str, int]]) -> Any:
    def fault(record: Record) -> Record:
        return lambda found, **counts: record(found, **change(found, counts))

    return fault


def count_what_a_stop_cut_off(found: SpeculativeDecodingMetrics, counts: dict[str, int]) -> dict[str, int]:
    return {**counts, "num_kept": counts["num_accepted"] + 1}


def count_one_draft_more(found: SpeculativeDecodingMetrics, counts: dict[str, int]) -> dict[str, int]:
    return {**counts, "num_draft": counts["num_draft"] + 1}


def count_the_next_token_as_accepted(
    found: SpeculativeDecodingMetrics, counts: dict[str, int]
) -> dict[str, int]:
    accepted = min(counts["num_accepted"] + 1, counts["num_draft"])
    return {**counts, "num_accepted": accepted, "num_kept": counts["num_kept"]}


def count_the_prompt_as_a_round(found: SpeculativeDecodingMetrics, counts: dict[str, int]) -> dict[str, int]:
    found.num_rounds += found.num_rounds == 0
    return counts


def count_rounds_that_are_alike_once(
    found: SpeculativeDecodingMetrics, counts: dict[str, int]
) -> dict[str, int]:
    return {**counts, "count": 1}


FAULTS = [
    count_what_a_stop_cut_off,
    count_one_draft_more,
    count_the_next_token_as_accepted,
    count_the_prompt_as_a_round,
    count_rounds_that_are_alike_once,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_count_is_noticed(
    engine: Engine,
    scripted: ScriptedDrafter,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., dict[str, int]],
) -> None:
    mutant = _mutated(fault)(metrics.record_rounds)
    monkeypatch.setattr(metrics, "record_rounds", mutant)
    with pytest.raises(AssertionError):
        check_stops(engine, scripted)


def test_a_broken_identity_is_noticed(engine: Engine, scripted: ScriptedDrafter) -> None:
    result = plain(engine, PROMPT, **GREEDY)
    check_identity(result)
    found = result.metrics.speculative_decoding
    found.num_trimmed_tokens += 1
    with pytest.raises(AssertionError):
        check_identity(result)


def test_acceptance_that_increases_with_the_position_is_noticed(
    engine: Engine, scripted: ScriptedDrafter
) -> None:
    scripted.learn(plain(engine, PROMPT, **GREEDY), counts=(1, 2))
    result = spec(engine, PROMPT, 3, **GREEDY)
    check_identity(result)
    result.metrics.speculative_decoding.num_accepted_by_position.reverse()
    with pytest.raises(AssertionError, match="increases"):
        check_identity(result)


# -- lossy acceptance ---------------------------------------------------------------------------------------------

LOSSY = ("threshold", "typical")


@pytest.fixture
def drafted(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    return build_engine(checkpoint(seed=1), checkpoint(seed=1, noise=0.3))


@pytest.mark.parametrize("acceptance", LOSSY)
def test_lossy_acceptance_says_so_once_and_everywhere(acceptance: str, drafted: Engine) -> None:
    sampling = {**SAMPLED, "acceptance": acceptance, "acceptance_threshold": 0.05, "acceptance_delta": 0.5}
    with pytest.warns(UserWarning, match="lossy") as warned:
        results = spec(drafted, [PROMPT] * 3, 4, **sampling)
    assert [str(each.message) for each in warned] == [
        f"acceptance={acceptance!r}: lossy, what is generated is not distributed as the target says"
    ]
    assert warned[0].filename.endswith("law_helpers.py"), "it points to who called"
    for result in results:
        check_identity(result)
        assert not result.lossless
        assert not result.metrics.speculative_decoding.lossless
        assert result.to_dict()["metrics"]["speculative_decoding"]["lossless"] is False
        found = result.metrics.speculative_decoding
        assert 0 < found.num_accepted_draft_tokens < found.num_draft_tokens
    params = [SamplingParams(**{**sampling, "acceptance": each}) for each in (*LOSSY, *LOSSY, "block")]
    with pytest.warns(UserWarning, match="acceptance='threshold' and acceptance='typical': lossy") as warned:
        results = drafted.generate([PROMPT] * 5, params)
    assert len(warned) == 1
    assert [result.lossless for result in results] == [False] * 4 + [True]
    with pytest.warns(UserWarning, match="lossy") as warned:
        drafted.add_request(PROMPT, params[0])
    assert len(warned) == 1


@pytest.mark.parametrize("acceptance", ["block", *LOSSY])
def test_no_mode_loses_anything_where_nothing_can_be_lost(acceptance: str, drafted: Engine) -> None:
    """Greedy, where every mode keeps what the target would have said; and without drafts."""
    mode = {**GREEDY, "acceptance": acceptance}
    result, truth = spec(drafted, PROMPT, 4, **mode), plain(drafted, PROMPT, **GREEDY)
    assert_same(result, truth)
    assert result.metrics.speculative_decoding.num_accepted_draft_tokens > 0
    sampled = {**SAMPLED, "acceptance": acceptance}
    undrafted, expected = plain(drafted, PROMPT, **sampled), plain(drafted, PROMPT, **SAMPLED)
    assert_same(undrafted, expected)
    for each in (result, undrafted):
        assert each.lossless
        assert each.metrics.speculative_decoding.lossless


@pytest.mark.filterwarnings("ignore:acceptance=")
@pytest.mark.parametrize(("threshold", "count"), [(0.0, 64), (1.0, 0)])
def test_what_a_threshold_keeps_is_counted(
    threshold: float, count: int, engine: Engine, scripted: ScriptedDrafter
) -> None:
    """The target excludes nothing here: at 0 every draft is kept, whatever it is, at 1 none."""
    sampling = {**SAMPLED, "acceptance": "threshold", "acceptance_threshold": threshold}
    for k in (1, 3, 8):
        result = spec(engine, PROMPT, k, **sampling)
        Expected.of_script((count,), k, NUM_TOKENS, NUM_TOKENS).check(result.metrics.speculative_decoding, k)
        check_identity(result)


# -- forced acceptance, for timing --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_forced_acceptance_is_what_was_asked_for_and_says_that_it_is_not_the_models(
    rate: float, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    models = checkpoint("gpt2", seed=1, max_positions=512), checkpoint("gpt2", seed=2, max_positions=512)
    engine = build_engine(*models, forced_acceptance=rate)
    results = engine.generate([PROMPT] * 4, max_new_tokens=400, ignore_eos=True, num_speculative_tokens=4)
    for result in results:
        assert not result.lossless
        assert len(result.token_ids) == 400
        counts = result.metrics.speculative_decoding
        by_position = zip(counts.num_drafted_by_position, counts.num_accepted_by_position, strict=True)
        drafted, accepted = next(iter(by_position))
        assert abs(accepted / drafted - rate) < (0.12 if 0 < rate < 1 else 1e-9)
    assert engine.generate(PROMPT, max_new_tokens=5).lossless is False
    assert build_engine(*models).generate(PROMPT, max_new_tokens=5).lossless


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"logprobs": 1}, {"logit_bias": {3: 1.0}}, {"min_new_tokens": 2}]
)
def test_forced_acceptance_refuses_what_it_cannot_time(
    sampling: dict[str, Any], checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=1), checkpoint("gpt2", seed=2), forced_acceptance=0.5)
    with pytest.raises(ValueError, match="forced_acceptance"):
        engine.generate(PROMPT, **{"max_new_tokens": 5, **sampling})
    assert len(engine.generate(PROMPT, max_new_tokens=5, temperature=1.0, seed=3).token_ids) == 5
