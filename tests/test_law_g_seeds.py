"""Law G: a seeded text depends on the prompt, the parameters and the seed, never on who else runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from law_helpers import Tally, assert_same, make_prompt, name_weights, plain, spec
from scripted_drafters import AdversarialDrafter, KnowingDrafter, PerfectDrafter, RandomDrafter

from conftest import CheckpointFactory, EngineFactory
from specengine import Engine, GenerationResult, SamplingParams, rng
from specengine.runtime import sequence as sequence_module
from specengine.runtime.state import BatchState

VOCAB = 64
K = 3
NUM_TOKENS = 20
PROMPT = make_prompt(9, seed=1)
REJECTION: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.97,
    "seed": 2**63 + 5,
    "acceptance": "rejection",
    "max_new_tokens": NUM_TOKENS,
    "num_speculative_tokens": K,
    "ignore_eos": True,
}
COUPLED = {**REJECTION, "acceptance": "coupled"}


@pytest.fixture
def models(
    checkpoint: CheckpointFactory, request: pytest.FixtureRequest
) -> tuple[list[Path], dict[str, str]]:
    """A target and its draft, and how an engine has their weights."""
    model_type, weights = getattr(request, "param", ("gpt2", {}))
    build = {"seed": 1, **(tiny_models.IN_GROUPS.get(model_type, {}) if weights else {})}
    return [checkpoint(model_type, **build), checkpoint(model_type, **build, noise=0.3)], weights


@pytest.fixture
def engine(models: tuple[list[Path], dict[str, str]], build_engine: EngineFactory) -> Engine:
    return build_engine(*models[0], **models[1])


@pytest.fixture
def tight_engine(models: tuple[list[Path], dict[str, str]], build_engine: EngineFactory) -> Engine:
    """Blocks for one and a half of the requests below."""
    return build_engine(*models[0], **models[1], num_blocks=13)


def other_requests(count: int, first: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Requests of other lengths, parameters and seeds."""
    for index in range(first, first + count):
        yield (
            make_prompt(2 + index % 11, seed=100 + index),
            SamplingParams(
                temperature=(0.0, 0.7, 1.3)[index % 3],
                seed=index,
                acceptance=("rejection", "coupled")[index % 2],
                max_new_tokens=3 + index % 9,
                num_speculative_tokens=index % 6,
            ),
        )


def run_with(
    engine: Engine, sampling: dict[str, Any], others: list[tuple[list[int], SamplingParams]], place: int
) -> GenerationResult:
    """Ours at `place` of one batch with the others."""
    requests = [*others[:place], (PROMPT, SamplingParams(**sampling)), *others[place:]]
    prompts, params = zip(*requests, strict=True)
    return engine.generate(list(prompts), list(params))[place]


def check_alone_is_everywhere(engine: Engine, tight_engine: Engine, sampling: dict[str, Any]) -> None:
    """Alone, in each slot of a batch of 8, after 100 others, preempted, twice in one batch."""
    alone = engine.generate(PROMPT, **sampling)
    for place in range(8):
        assert_same(run_with(engine, sampling, list(other_requests(7, place)), place), alone)
    engine.generate(*map(list, zip(*other_requests(100, 50), strict=True)))
    assert_same(engine.generate(PROMPT, **sampling), alone)
    for twin in engine.generate([PROMPT, PROMPT], **sampling):
        assert_same(twin, alone)
    crowd = [make_prompt(9, seed=seed) for seed in (5, 6)]
    results = tight_engine.generate([*crowd, PROMPT, PROMPT], **sampling)
    assert any(result.metrics.num_preemptions for result in results[2:]), "nothing was preempted"
    for preempted in results[2:]:
        assert_same(preempted, alone)


@pytest.mark.parametrize(
    "models",
    [
        ("gpt2", {}),
        ("llama", {"weight_dtype": "int4"}),
        ("qwen3", {"weight_dtype": "int4_min", "draft_weight_dtype": "int8_group"}),
    ],
    ids=["gpt2", "llama-int4", "qwen3-int4_min"],
    indirect=True,
)
@pytest.mark.parametrize("sampling", [REJECTION, COUPLED], ids=["rejection", "coupled"])
def test_a_seeded_text_is_the_same_everywhere(
    engine: Engine, tight_engine: Engine, tally: Tally, sampling: dict[str, Any]
) -> None:
    check_alone_is_everywhere(engine, tight_engine, sampling)
    tally.check()


def test_noise_keyed_by_the_slot_is_noticed(
    engine: Engine, tight_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = BatchState.admit

    def mutant(self: BatchState, sequence: Any) -> None:
        admit(self, sequence)
        self.rows.seeds[sequence.slot] += sequence.slot

    monkeypatch.setattr(BatchState, "admit", mutant)
    with pytest.raises(AssertionError):
        check_alone_is_everywhere(engine, tight_engine, REJECTION)


def test_noise_counted_by_the_round_is_noticed_under_preemption(
    engine: Engine, tight_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that a preempted sequence restarts."""
    admit = BatchState.admit

    def mutant(self: BatchState, sequence: Any) -> None:
        admit(self, sequence)
        self.rows.seeds[sequence.slot] += sequence.place.num_preemptions

    monkeypatch.setattr(BatchState, "admit", mutant)
    with pytest.raises(AssertionError):
        check_alone_is_everywhere(engine, tight_engine, REJECTION)


# -- samples -----------------------------------------------------------------------------------------------------


def check_samples_have_keys_of_their_own(engine: Engine, sampling: dict[str, Any]) -> None:
    """Sample j is what one request with the seed derived from (seed, j) gives."""
    result = engine.generate(PROMPT, **sampling, n=5)
    seeds = [rng.derive_seed(sampling["seed"], sample) for sample in range(5)]
    assert [output.seed for output in result.outputs] == seeds
    assert len({tuple(output.token_ids) for output in result.outputs}) == 5
    for output, seed in zip(result.outputs, seeds, strict=True):
        assert output.token_ids == engine.generate(PROMPT, **{**sampling, "seed": seed}).token_ids


@pytest.mark.parametrize("sampling", [REJECTION, COUPLED], ids=["rejection", "coupled"])
def test_each_sample_derives_its_own_key(engine: Engine, tally: Tally, sampling: dict[str, Any]) -> None:
    check_samples_have_keys_of_their_own(engine, sampling)
    tally.check()


def test_samples_that_share_a_key_are_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = property(lambda sequence: sequence.request.seed)
    monkeypatch.setattr(sequence_module.Sequence, "seed", shared)
    with pytest.raises(AssertionError):
        check_samples_have_keys_of_their_own(engine, REJECTION)


# -- no seed -----------------------------------------------------------------------------------------------------


def check_unseeded_requests_differ(engine: Engine) -> None:
    """20 equal requests do not all agree, and each reports the seed that repeats it."""
    sampling = {key: value for key, value in REJECTION.items() if key != "seed"}
    results = engine.generate([PROMPT] * 20, **sampling)
    assert len({tuple(result.token_ids) for result in results}) > 1, "20 unseeded requests agree"
    for result in results[:3]:
        assert engine.generate(PROMPT, **sampling, seed=result.seed).token_ids == result.token_ids


def test_unseeded_requests_do_not_all_agree(engine: Engine, tally: Tally) -> None:
    check_unseeded_requests_differ(engine)
    tally.check()


def test_a_seed_that_is_always_drawn_alike_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rng, "random_seed", lambda: 7)
    with pytest.raises(AssertionError, match="agree"):
        check_unseeded_requests_differ(engine)


# -- coupled -----------------------------------------------------------------------------------------------------

PLAIN_COUPLED = {
    **{key: value for key, value in COUPLED.items() if key != "num_speculative_tokens"},
    "logprobs": 2,
}


def check_coupled_equals_plain(engine: Engine, drafter: KnowingDrafter | None, ks: tuple[int, ...]) -> None:
    prompts = [PROMPT, make_prompt(4, seed=2), make_prompt(17, seed=3)]
    expected = plain(engine, prompts, **PLAIN_COUPLED)
    if drafter is not None:
        drafter.learn(*expected)
    for k in ks:
        for prompt, truth in zip(prompts, expected, strict=True):
            assert_same(spec(engine, prompt, k, **PLAIN_COUPLED), truth)
        for result, truth in zip(spec(engine, prompts, k, **PLAIN_COUPLED), expected, strict=True):
            assert_same(result, truth)


@pytest.mark.parametrize(
    "drafter",
    [
        PerfectDrafter(vocab_size=VOCAB),
        AdversarialDrafter(vocab_size=VOCAB, wrong_at=0),
        AdversarialDrafter(vocab_size=VOCAB, wrong_at=2),
        RandomDrafter(vocab_size=VOCAB),
    ],
    ids=["perfect", "wrong-at-0", "wrong-at-2", "random"],
)
def test_coupled_text_is_plains_for_every_scripted_drafter(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally, drafter: KnowingDrafter
) -> None:
    check_coupled_equals_plain(build_engine(checkpoint(seed=1), drafter), drafter, (1, 2, 3, 4, 5, 8, 17))
    tally.check(
        accepted=drafter.name in ("perfect", "random") or drafter.wrong_at > 0,
        rejected=drafter.name != "perfect",
    )


@pytest.mark.parametrize(
    ("model_type", "noise"), [("gpt2", 0.1), ("gpt2", 0.5), ("llama", 0.3), ("qwen2", 0.3)]
)
def test_coupled_text_is_plains_for_a_draft_model(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally, model_type: str, noise: float
) -> None:
    engine = build_engine(checkpoint(model_type, seed=1), checkpoint(model_type, seed=1, noise=noise))
    check_coupled_equals_plain(engine, None, (1, 2, 3, 4, 5, 8, 16))
    tally.check()


@pytest.mark.parametrize(
    ("model_type", "weights"),
    [
        ("llama", {"draft_weight_dtype": "int4"}),
        ("qwen3", {"weight_dtype": "int8_group", "draft_weight_dtype": "int4"}),
        ("gpt2", {"weight_dtype": "bfloat16", "draft_weight_dtype": "int4_min"}),
    ],
    ids=name_weights,
)
def test_text_is_plains_where_the_draft_is_the_target_with_fewer_bits(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
    model_type: str,
    weights: dict[str, str],
) -> None:
    """One checkpoint: the draft's groups alone make it disagree now and then."""
    path = checkpoint(model_type, seed=1, **tiny_models.IN_GROUPS.get(model_type, {}))
    engine = build_engine(path, path, **weights)
    check_coupled_equals_plain(engine, None, (1, 3, 4, 8))
    greedy: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": 2}
    prompts = [make_prompt(5, seed=seed) for seed in range(4)]
    for result, truth in zip(
        spec(engine, prompts, 4, **greedy), plain(engine, prompts, **greedy), strict=True
    ):
        assert_same(result, truth)
    tally.check()


def test_rejection_in_place_of_coupling_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SamplingParams, "rule", property(lambda params: "match" if params.is_greedy else "rejection")
    )
    with pytest.raises(AssertionError):
        check_coupled_equals_plain(engine, None, (3,))
