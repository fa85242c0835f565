"""Law K: a draft with another vocabulary is translated or refused by name; no id beyond the tokenizer is emitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokenizers
import torch
from kernel_cases import DEVICE
from law_helpers import BuildTwins, EngineFactory, Tally, assert_idle, assert_same, make_prompt, plain, spec
from test_law_b_full_acceptance import COUPLED, FILTERED, GREEDY, REJECTION, check_everything_is_accepted
from tokenizers import models

from specengine import SamplingParams, tokenizer
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.engine import Engine, assembly
from specengine.errors import VocabularyMismatchError
from specengine.outputs import GenerationResult
from specengine.translation import Translation

SIZE = 300
MODES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "acceptance": "coupled"},
    {"temperature": 1.0, "seed": 3, "acceptance": "rejection"},
    {"temperature": 2.0, "seed": 4, "acceptance": "rejection", "top_p": 0.95},
]


def padded_model(num_rows: int, *, noise: float = 0.0, seed: int = 7) -> torch.nn.Module:
    """A model of SIZE real ids whose further rows, if any, would win every draw that does not mask them."""
    base = tiny_models.build_model(vocab_size=max(SIZE, num_rows), seed=seed, tie_word_embeddings=False)
    if noise:
        base = tiny_models.perturbed(base, noise=noise)
    model = tiny_models.build_model(vocab_size=num_rows, seed=seed, tie_word_embeddings=False)
    state = {name: value[:num_rows] if value.ndim == 2 and value.shape[0] > num_rows else value
             for name, value in base.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0  # feature 0 is always 1
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[SIZE:, 0] = 100.0
    return model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(
        name: str,
        num_rows: int,
        own_tokenizer: tokenizers.Tokenizer | None = None,
        *,
        has_tokenizer: bool = True,
        noise: float = 0.0,
    ) -> Path:
        chosen = own_tokenizer or tiny_models.build_tokenizer(SIZE) if has_tokenizer else None
        model = padded_model(num_rows, noise=noise)
        return tiny_models.save_checkpoint(tmp_path / name, model, tokenizer=chosen)

    return save


def check_refused(build_engine: EngineFactory, target: Path, draft: Path) -> None:
    """The error names both models, and comes before anything is generated."""
    with pytest.raises(VocabularyMismatchError) as caught:
        build_engine(target, draft)
    assert "the-target" in str(caught.value)
    assert "the-draft" in str(caught.value)


@pytest.mark.parametrize("num_rows", [SIZE - 1, SIZE + 7])
def test_another_size_without_tokenizers_is_refused_with_both_names(
    num_rows: int, save: Callable[..., Path], build_engine: EngineFactory
) -> None:
    target = save("the-target", SIZE, has_tokenizer=False)
    check_refused(build_engine, target, save("the-draft", num_rows, has_tokenizer=False))


def test_a_draft_that_lacks_an_id_of_the_tokenizer_is_refused_with_both_names(
    save: Callable[..., Path], build_engine: EngineFactory
) -> None:
    check_refused(build_engine, save("the-target", SIZE), save("the-draft", SIZE - 1))


def test_vocabularies_with_nothing_in_common_are_refused_with_both_names(
    save: Callable[..., Path], build_engine: EngineFactory
) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({f"word {index}": index for index in range(SIZE)}))
    check_refused(build_engine, save("the-target", SIZE), save("the-draft", SIZE, words))


def watch_proposals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every token that a draft model proposes from here on."""
    proposed: list[int] = []
    propose = DraftModelDrafter.propose

    def spy(self: DraftModelDrafter, batch: Any, state: Any) -> Any:
        proposal = propose(self, batch, state)
        for row, count in enumerate(proposal.num_tokens.tolist()):
            proposed.extend(proposal.tokens[row, :count].tolist())
        return proposal

    monkeypatch.setattr(DraftModelDrafter, "propose", spy)
    return proposed


def check_shared_size(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at or above SIZE is emitted, proposed or reported, and speculation changes nothing."""
    num_free = engine.num_free_blocks
    proposed = watch_proposals(monkeypatch)
    prompts = [make_prompt(length, vocab_size=SIZE) for length in (1, 4, 9)]
    for mode in MODES:
        sampling = {**mode, "max_new_tokens": 20, "ignore_eos": True, "logprobs": 20}
        expected = plain(engine, prompts, **sampling)
        results = spec(engine, prompts, 4, **sampling)
        for result, truth in zip(results, expected, strict=True):
            for one in (result, truth):
                entries = one.outputs[0].logprobs
                ids = {*one.token_ids, *(token for entry in entries for token in entry.top)}
                assert max(ids) < SIZE, f"id {max(ids)} is beyond the tokenizer's {SIZE}"
                assert sum(map(_probability, entries[0].top.values())) <= 1.0 + 1e-6
            if mode.get("acceptance") != "rejection":
                assert_same(result, truth)
    assert proposed, "nothing was drafted"
    assert max(proposed) < SIZE, f"draft id {max(proposed)} is beyond the tokenizer's {SIZE}"
    assert engine.vocab_size == SIZE
    with pytest.raises(ValueError, match=f"{SIZE}"):
        engine.generate([1, SIZE], max_new_tokens=1)
    assert_idle(engine, num_free)


def _probability(logprob: float) -> float:
    return 2.718281828459045**logprob


@pytest.mark.parametrize(
    ("target_rows", "draft_rows"), [(SIZE, SIZE), (SIZE, SIZE + 7), (SIZE + 7, SIZE), (SIZE + 84, SIZE + 7)]
)
def test_padded_heads_share_the_tokenizers_size(
    target_rows: int,
    draft_rows: int,
    save: Callable[..., Path],
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    engine = build_engine(save("the-target", target_rows), save("the-draft", draft_rows, noise=0.05))
    check_shared_size(engine, monkeypatch)
    tally.check()


# -- translation --------------------------------------------------------------------------------------------------

NUM_SHARED = 285  # the other SIZE - NUM_SHARED tokens are merges that the draft's tokenizer has not


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A target, and a draft of its weights that has other ids, padding, and not all of the tokens."""

    def build(
        *, num_shared: int = NUM_SHARED, noise: float = 0.0, has_head: bool = True
    ) -> tuple[Path, Path]:
        model = tiny_models.build_model(
            vocab_size=SIZE, seed=4, tie_word_embeddings=not has_head, max_positions=96
        )
        smaller = tiny_models.build_model(
            vocab_size=num_shared, seed=4, tie_word_embeddings=not has_head, max_positions=96
        )
        state = {name: value[:num_shared] if "wte" in name or "lm_head" in name else value
                 for name, value in model.state_dict().items()}  # fmt: skip
        smaller.load_state_dict(state)
        if noise:
            smaller = tiny_models.perturbed(smaller, noise=noise)
        draft = tiny_models.renumbered(smaller, tiny_models.build_tokenizer(num_shared), seed=2)
        return (
            tiny_models.save_checkpoint(
                tmp_path / "the-target", model, tokenizer=tiny_models.build_tokenizer(SIZE)
            ),
            tiny_models.save_checkpoint(tmp_path / "the-draft", draft[0], tokenizer=draft[1]),
        )

    return build


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_draft_that_is_the_target_under_other_ids_is_always_accepted(
    dtype: str, foreign: Callable[..., tuple[Path, Path]], build_engine: EngineFactory
) -> None:
    weights = {"weight_dtype": dtype, "draft_weight_dtype": dtype}
    engine = build_engine(*foreign(num_shared=SIZE), **weights)
    modes = [GREEDY, COUPLED, REJECTION, FILTERED]
    check_everything_is_accepted(engine, [4, 3, 5, 2], modes, num_tokens=60)


ROWS: list[dict[str, Any]] = [{"seed": 11}, *MODES[1:], {"temperature": 0.8, "seed": 9, "top_k": 30}]


def run_rows(engine: Engine, prompts: list[list[int]], k: int = 4, **sampling: Any) -> list[GenerationResult]:
    """Each row in a mode of its own, and with a k of its own."""
    params = [
        SamplingParams(**row, num_speculative_tokens=min(k, 1 + index), **sampling)
        for index, row in enumerate(ROWS)
    ]
    return engine.generate(prompts, params)


def check_translated(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting changes nothing where it must not, a row alone is a row in a batch, and tokens that the draft has not
    are fed to it and never proposed."""
    num_free = engine.num_free_blocks
    proposed = watch_proposals(monkeypatch)
    prompts = [[*make_prompt(3 + index, index, SIZE), SIZE - 1 - index] for index in range(len(ROWS))]
    sampling = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": 1}
    results = run_rows(engine, prompts, **sampling)
    for index, result in enumerate(results):
        row = {**ROWS[index], **sampling}
        assert_same(result, engine.generate(prompts[index], num_speculative_tokens=1 + min(3, index), **row))
        if row.get("acceptance") != "rejection":
            assert_same(result, plain(engine, prompts[index], **row))
    assert proposed, "nothing was drafted"
    assert max(proposed) < NUM_SHARED, "a token that the draft has not was proposed"
    emitted = {token for result in results for token in result.token_ids}
    assert max(emitted) >= NUM_SHARED, "no such token was fed to the draft"
    assert_idle(engine, num_free)


@pytest.mark.parametrize("has_head", [True, False], ids=["head", "tied head"])
def test_a_draft_with_other_ids_and_fewer_tokens_changes_nothing(
    has_head: bool,
    foreign: Callable[..., tuple[Path, Path]],
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    check_translated(build_engine(*foreign(has_head=has_head, noise=0.05)), monkeypatch)
    tally.check()


def test_translated_rounds_are_replayed_and_survive_preemption(
    foreign: Callable[..., tuple[Path, Path]], build_twins: BuildTwins, tally: Tally
) -> None:
    models = foreign(noise=0.05)
    direct, replayed = build_twins(*models)
    _, tight = build_twins(*models, num_blocks=30)
    prompts = [make_prompt(4 + index, index, SIZE) for index in range(len(ROWS))]
    sampling = {"max_new_tokens": 40, "ignore_eos": True}
    expected = run_rows(direct, prompts, **sampling)
    for engine in (replayed, tight):
        results = run_rows(engine, prompts, **sampling)
        for result, truth in zip(results, expected, strict=True):
            assert_same(result, truth)
        assert (sum(result.metrics.num_preemptions for result in results) > 0) == (engine is tight)
    tally.check()


@pytest.mark.triton
def test_a_translated_draft_on_the_triton_kernels(
    foreign: Callable[..., tuple[Path, Path]], build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*foreign(noise=0.05), backend="triton", device=str(DEVICE), block_size=16)
    prompts = [[*make_prompt(2, index, SIZE), SIZE - 1] for index in range(2)]
    sampling = {"max_new_tokens": 5, "ignore_eos": True}
    modes = [SamplingParams(**mode, **sampling, num_speculative_tokens=2) for mode in (MODES[0], MODES[2])]
    greedy, _ = engine.generate(prompts, modes)
    assert_same(greedy, plain(engine, prompts[0], **sampling))
    tally.check()


# -- planted faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["target", "draft"])
def test_the_law_notices_padded_ids_that_are_not_masked(
    who: str, save: Callable[..., Path], build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(save("the-target", SIZE + 7), save("the-draft", SIZE + 7, noise=0.05))
    runner = engine._target if who == "target" else engine._drafter.runner  # type: ignore[union-attr]
    runner.vocab_size = SIZE + 7
    with pytest.raises(AssertionError, match="beyond the tokenizer"):
        check_shared_size(engine, monkeypatch)


def test_the_law_notices_vocabularies_that_are_compared_by_size_only(
    foreign: Callable[..., tuple[Path, Path]],
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "translate", lambda *_: None)
    monkeypatch.setattr(assembly, "check_compatible", lambda target, draft: tokenizer.num_usable_ids(target))
    engine = build_engine(*foreign(num_shared=SIZE))
    with pytest.raises(AssertionError):
        check_everything_is_accepted(engine, [4], [GREEDY], num_tokens=20)


def test_the_law_notices_tokens_that_are_proposed_and_not_shared(
    foreign: Callable[..., tuple[Path, Path]], build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Translation, "head_bias", lambda _: None)
    with pytest.raises(AssertionError, match="was proposed"):
        check_translated(build_engine(*foreign(has_head=False)), monkeypatch)
