"""The trace of a text: where each token came from, and how likely it was, by other ways to the same numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conftest import CheckpointFactory, EngineFactory
from specengine import Engine, GenerationResult, SamplingParams
from specengine.errors import SpecEngineError
from specengine.measure.token_trace import trace

PROMPT = "def add(first, second):"
MODES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "acceptance": "rejection"},
    {"temperature": 1.2, "seed": 6, "top_k": 20},
]
SPELLED: dict[str, Any] = {"seed": 9, "with_tokenizer": True}


@pytest.fixture
def engines(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> tuple[Engine, Engine]:
    draft = checkpoint(**SPELLED, noise=0.15)
    return build_engine(checkpoint(**SPELLED), draft), build_engine(draft)


def generate(engine: Engine, **sampling: Any) -> GenerationResult:
    given = {"max_new_tokens": 24, "ignore_eos": True, "return_rounds": True, "logprobs": 0, **sampling}
    return engine.generate(PROMPT, SamplingParams(num_speculative_tokens=4, **given))


def scored(engine: Engine, token_ids: list[int]) -> list[float]:
    """Of each token but the first, its probability after those before it."""
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    entries = engine.generate(token_ids, params).prompt_logprobs or []
    return [math.exp(entry.logprob) for entry in entries if entry is not None]


@pytest.mark.parametrize("sampling", MODES)
def test_a_trace_is_the_text_with_its_sources_and_probabilities(
    sampling: dict[str, Any], engines: tuple[Engine, Engine]
) -> None:
    target, draft = engines
    result = generate(target, **sampling)
    output, tokens = result.outputs[0], trace(target, draft, result)
    assert "".join(token.text for token in tokens) == output.text
    assert [token.token_id for token in tokens] == output.token_ids
    assert ["draft" if token.source == "draft" else "target" for token in tokens] == output.token_source
    assert [token.target_prob for token in tokens] == pytest.approx(
        [math.exp(entry.logprob) for entry in output.logprobs or []], rel=1e-5
    )
    every = result.prompt_token_ids + output.token_ids
    assert [token.draft_prob for token in tokens] == pytest.approx(
        scored(draft, every)[-len(tokens) :], rel=1e-5
    )
    assert all(0 < token.similarity < 1 for token in tokens if token.similarity is not None)
    itself = trace(target, target, result)
    assert [token.similarity for token in itself] == pytest.approx([1.0] * len(tokens))
    assert [token.draft_prob for token in itself] == [token.target_prob for token in itself]


@pytest.mark.parametrize("sampling", MODES)
def test_what_fell_is_with_the_token_that_came_instead(
    sampling: dict[str, Any], engines: tuple[Engine, Engine]
) -> None:
    target, draft = engines
    result = generate(target, **sampling)
    tokens, rounds = trace(target, draft, result), result.outputs[0].rounds or []
    recovered = [at for at, token in enumerate(tokens) if token.source == "recovered"]
    assert len(recovered) == sum(each.num_accepted_tokens < each.num_draft_tokens for each in rounds) > 0
    assert {token.source for token in tokens} >= {"draft", "recovered"}
    assert [bool(token.rejected) for token in tokens] == [token.source == "recovered" for token in tokens]
    for at in recovered[:4]:
        token, before = tokens[at], result.prompt_token_ids + result.token_ids[:at]
        round_of = rounds[token.round or 0]
        assert [each.token_id for each in token.rejected] == round_of.draft_token_ids[
            round_of.num_accepted_tokens :
        ]
        first, *others = token.rejected
        assert first.token_id != token.token_id
        assert first.target_prob == pytest.approx(scored(target, [*before, first.token_id])[-1], rel=1e-5)
        assert first.draft_prob == pytest.approx(scored(draft, [*before, first.token_id])[-1], rel=1e-5)
        assert all(each.target_prob is None is each.draft_prob for each in others)


def test_a_bonus_follows_what_was_all_accepted_and_plain_rounds_have_none(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """A model that drafts for itself is always right."""
    engine = build_engine(checkpoint(**SPELLED), checkpoint(**SPELLED))
    tokens = trace(engine, None, generate(engine, max_new_tokens=11))
    assert [token.source for token in tokens] == ["target", *(["draft"] * 4 + ["bonus"]) * 2]
    assert [token.round for token in tokens] == [None, *[0] * 5, *[1] * 5]
    assert all(token.draft_prob is None and not token.rejected for token in tokens)
    plain = engine.generate(
        PROMPT, SamplingParams(num_speculative_tokens=0, max_new_tokens=3, return_rounds=True)
    )
    assert [token.source for token in trace(engine, None, plain)] == ["target"] * 3


def test_what_cannot_be_traced_is_said(
    engines: tuple[Engine, Engine], checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    target, _ = engines
    with pytest.raises(ValueError, match="return_rounds=True"):
        trace(target, None, generate(target, return_rounds=False))
    tiny = build_engine(checkpoint(seed=1, vocab_size=12))
    with pytest.raises((ValueError, SpecEngineError)):
        trace(target, tiny, generate(target))
