"""`draft_confidence`: a draft model stops before a token of which it is not sure, and nothing else changes."""

from __future__ import annotations

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
    make_prompt,
    plain,
)
from test_law_e_distribution import (
    NUM_SAMPLES,
    Filters,
    build_tiny,
    check_distribution,
    check_tally,
    exact_law,
    sample_engine,
)
from test_law_e_distribution import (
    build_engine as build_sampling_engine,
)
from transformers import AutoModelForCausalLM

from specengine import SamplingParams
from specengine.drafters import draft_model

CONFIDENCE = 0.2
K = 6
MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3, "acceptance": "coupled"},
    {"temperature": 1.1, "seed": 5, "acceptance": "coupled", "top_k": 12, "top_p": 0.9},
    {"repetition_penalty": 1.3, "logprobs": 1},
]


def params(mode: dict[str, Any], **asked: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=40, ignore_eos=True, num_speculative_tokens=K, **mode, **asked)


@pytest.mark.parametrize("rounds_ahead", [0, 2])
def test_text_does_not_depend_on_it(
    rounds_ahead: int, checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    prompts = [make_prompt(4 + 3 * row, row) for row in range(len(MODES))]
    for engine in build_twins(checkpoint(seed=1), checkpoint(seed=1, noise=0.1), rounds_ahead=rounds_ahead):
        num_free = engine.num_free_blocks
        expected = [
            plain(engine, prompt, max_new_tokens=40, ignore_eos=True, **mode)
            for prompt, mode in zip(prompts, MODES, strict=True)
        ]
        # Another row of each batch has none, and one that never drafts.
        asked = [CONFIDENCE, 0.0, 1.0, CONFIDENCE]
        given = [params(mode, draft_confidence=each) for mode, each in zip(MODES, asked, strict=True)]
        results = engine.generate(prompts, given)
        for result, truth in zip(results, expected, strict=True):
            assert_same(result, truth)
        counts = [result.metrics.speculative_decoding for result in results]
        assert 0 < counts[0].num_draft_tokens < K * counts[0].num_rounds - K
        assert counts[2].num_draft_tokens == 0
        assert_idle(engine, num_free)
    tally.check()


def test_it_stops_exactly_where_the_draft_is_unsure(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    target, draft = checkpoint(seed=1), checkpoint(seed=1, noise=0.1)
    judge = AutoModelForCausalLM.from_pretrained(draft)
    engine = build_engine(target, draft)
    prompt = make_prompt(7, 1)
    with torch.no_grad():
        text = torch.tensor([prompt + plain(engine, prompt, max_new_tokens=40, ignore_eos=True).token_ids])
        confidence = judge(text).logits.softmax(dim=-1).amax(dim=-1)[0]
    limit = float(confidence[len(prompt) :].median())
    result = engine.generate(prompt, params({}, draft_confidence=limit))
    length, num_stopped = len(prompt) + 1, 0
    for num_draft, num_accepted, _ in rounds_of(engine, prompt, limit):
        # Drafts that were accepted are the text's: the draft's probabilities there are known.
        sure = confidence[length - 1 : length - 1 + min(num_draft, num_accepted + 1)]
        assert (sure > limit - 1e-4).all()
        if num_draft == num_accepted < min(K, text.shape[1] - length - 1):
            assert confidence[length - 1 + num_draft] < limit + 1e-4
            num_stopped += 1
        length += num_accepted + 1
    assert num_stopped >= 5
    assert result.token_ids == text[0, len(prompt) :].tolist()


def rounds_of(engine: Any, prompt: list[int], limit: float) -> list[Any]:
    found: list[Any] = []
    collect = engine._stepper._records.collect

    def collected(flight: Any) -> Any:
        results = collect(flight)
        if flight.drafter is not None:
            found.extend((each.num_draft, each.num_accepted, each.length) for each in results if each)
        return results

    engine._stepper._records.collect = collected
    engine.generate(prompt, params({}, draft_confidence=limit))
    engine._stepper._records.collect = collect
    return found


def test_nothing_is_lacking_in_the_drafts_cache_afterwards(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target as its own draft: whatever is drafted is accepted, and no round has to catch up."""
    path = checkpoint("gpt2", seed=4, max_positions=256)
    engine = build_engine(path, path)
    filled = 0
    fill = draft_model.DraftModelDrafter._fill

    def counted(*given: Any) -> Any:
        nonlocal filled
        filled += 1
        return fill(*given)

    monkeypatch.setattr(draft_model.DraftModelDrafter, "_fill", counted)
    for mode in ({}, {"temperature": 1.0, "seed": 6, "acceptance": "rejection"}):
        filled = 0
        result = engine.generate(
            make_prompt(9),
            SamplingParams(
                max_new_tokens=200, ignore_eos=True, num_speculative_tokens=K, draft_confidence=0.3, **mode
            ),
        )
        counts = result.metrics.speculative_decoding
        assert counts.draft_acceptance_rate == 1.0
        assert 0 < counts.num_spec_steps < counts.num_rounds
        assert filled <= 1  # the prompt, unless it was kept


def test_the_law_is_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    target = build_tiny(seed=1)
    with build_sampling_engine(target, "model") as engine:
        for acceptance in ("rejection", "block"):
            samples = sample_engine(engine, Filters(), acceptance, NUM_SAMPLES // 20, draft_confidence=0.25)
            check_tally(samples)
            check_distribution(samples, exact_law(target, Filters()))


def test_a_stop_that_asks_how_likely_the_drawn_token_was_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = draft_model._Draft._sample
    target = build_tiny(seed=1)

    def sample_likely(draft: Any, step: int, rows: Any, logits: Any, stats: Any) -> Any:
        tokens, log_probs = sample(draft, step, rows, logits, stats)
        stats[:, draft_model.STAT_ERROR] = (log_probs.exp() < 0.25).float()
        return tokens, log_probs

    monkeypatch.setattr(draft_model._Draft, "_sample", sample_likely)
    with build_sampling_engine(target, "model") as engine:
        samples = sample_engine(engine, Filters(), "rejection", NUM_SAMPLES // 20, draft_confidence=0.25)
    with pytest.raises(AssertionError, match=r"chi-square"):
        check_distribution(samples, exact_law(target, Filters()))
