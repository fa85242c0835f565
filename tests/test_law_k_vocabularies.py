"""Law K: a draft with another vocabulary is translated or refused by name; no id beyond the tokenizer is emitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokenizers
import torch
from law_helpers import EngineFactory, Tally, assert_idle, assert_same, make_prompt, plain, spec
from tokenizers import models

from specengine import tokenizer
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.engine import Engine, assembly
from specengine.errors import VocabularyMismatchError

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


def permuted_tokenizer() -> tokenizers.Tokenizer:
    """The same tokens, two of which have changed ids."""
    vocabulary = tiny_models.build_tokenizer(SIZE).get_vocab(with_added_tokens=False)
    first, second = (token for token, index in vocabulary.items() if index in (20, 33))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))


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


def test_the_same_size_with_permuted_ids_is_refused_with_both_names(
    save: Callable[..., Path], build_engine: EngineFactory
) -> None:
    check_refused(build_engine, save("the-target", SIZE), save("the-draft", SIZE, permuted_tokenizer()))


def test_another_tokenizer_size_is_refused_with_both_names(
    save: Callable[..., Path], build_engine: EngineFactory
) -> None:
    larger = tiny_models.build_tokenizer(SIZE + 7)
    check_refused(build_engine, save("the-target", SIZE), save("the-draft", SIZE + 7, larger))


def check_shared_size(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at or above SIZE is emitted, proposed or reported, and speculation changes nothing."""
    num_free = engine.num_free_blocks
    proposed: list[int] = []
    propose = DraftModelDrafter.propose

    def spy(self: DraftModelDrafter, batch: Any, state: Any) -> Any:
        proposal = propose(self, batch, state)
        for row, count in enumerate(proposal.num_tokens.tolist()):
            proposed.extend(proposal.tokens[row, :count].tolist())
        return proposal

    monkeypatch.setattr(DraftModelDrafter, "propose", spy)
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
    monkeypatch.setattr(DraftModelDrafter, "propose", propose)


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
    save: Callable[..., Path], build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "check_compatible", lambda target, draft: tokenizer.num_usable_ids(target))
    with pytest.raises(pytest.fail.Exception):
        check_refused(build_engine, save("the-target", SIZE), save("the-draft", SIZE, permuted_tokenizer()))
