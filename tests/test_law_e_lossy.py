"""Law E of the lossy rules: how far from the target's distribution they are, and that they are what they say.

The law of a lossy round can be enumerated as well as the target's: a draft is kept with the draft's probability if the
target thinks it likely enough, and otherwise the target draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_law_e_distribution import (
    BATCH,
    NUM_TOKENS,
    PROMPT,
    VOCAB,
    Filters,
    K,
    build_engine,
    build_tiny,
    check_distribution,
    check_tally,
    exact_law,
    filtered_probs,
    sample_engine,
    sample_rounds,
)
from torch import Tensor

from specengine import SamplingParams
from specengine.kernels.types.rules import Rule

pytestmark = pytest.mark.filterwarnings("ignore:acceptance=")

# Of the rows of this target, some are judged by epsilon and some by delta exp(-H).
FILTERS = Filters(1.2, 7, 0.99, 0.0, acceptance_threshold=0.3, acceptance_delta=0.5)

# The draft's distributions at position t of a round that began at t_0, after each text of t tokens: [8^t, 8].
DraftProbs = Callable[[int, int], Tensor]


def every_text(length: int) -> Tensor:
    """The prompt and every continuation of `length` tokens, `[8^length, 2 + length]`, in order."""
    texts = torch.tensor([PROMPT])
    for _ in range(length):
        following = torch.arange(VOCAB).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(VOCAB, dim=0), following), dim=1)
    return texts


def probs_after(model: torch.nn.Module, length: int, filters: Filters) -> Tensor:
    """`[8^length, 8]` in float64."""
    with torch.no_grad():
        return filtered_probs(copy.deepcopy(model).double()(every_text(length)).logits[:, -1], filters)


def is_kept(probs: Tensor, rule: Rule, filters: Filters) -> Tensor:
    """Which tokens the rule accepts, row by row."""
    bound = torch.full((len(probs), 1), filters.acceptance_threshold, dtype=torch.float64)
    if rule == Rule.TYPICAL:
        entropy = torch.special.entr(probs).sum(dim=1, keepdim=True)
        bound = bound.minimum(filters.acceptance_delta * torch.exp(-entropy))
    return probs > bound


def lossy_law(model: torch.nn.Module, draft: DraftProbs, rule: Rule, filters: Filters) -> np.ndarray:
    """P(t_0, …, t_3) as `exact_law`, of rounds that draft up to K tokens and keep what the rule keeps.

    weight[t_0, t] is the probability of each text of t tokens in a round that began at t_0 and has kept all since.
    """
    target = [probs_after(model, length, filters) for length in range(NUM_TOKENS)]
    weight: dict[tuple[int, int], Tensor] = {(1, 1): target[0].flatten()}
    done = torch.zeros(VOCAB**NUM_TOKENS, dtype=torch.float64)
    for length in range(1, NUM_TOKENS):
        for start in range(1, length + 1):
            if (start, length) not in weight:
                continue
            now, p = weight.pop((start, length)), target[length]
            num_draft = min(K, NUM_TOKENS - start - 1)
            kept = torch.zeros_like(p)
            if length < start + num_draft:
                q = draft(start, length)
                kept = torch.where(is_kept(p, rule, filters), q, 0.0)
            drawn = (1 - kept.sum(dim=1, keepdim=True)) * p
            for key, probs in (((start, length + 1), kept), ((length + 1, length + 1), drawn)):
                then = (now[:, None] * probs).flatten()
                if length + 1 == NUM_TOKENS:
                    done += then
                else:
                    weight[key] = weight.get(key, 0) + then
    assert abs(float(done.sum()) - 1) < 1e-9
    return done.reshape((VOCAB,) * NUM_TOKENS).numpy()


def draft_probs_of(name: str, target: torch.nn.Module, filters: Filters) -> DraftProbs:
    """Those of `build_engine`'s drafters."""
    if name == "model":
        return lambda start, length: probs_after(build_tiny(2), length, filters)
    with torch.no_grad():
        likely = target(torch.arange(VOCAB)[:, None]).logits[:, 0].argmax(dim=1)

    def point(start: int, length: int) -> Tensor:
        # What is drafted at a place depends on the last token before the round only.
        last = every_text(length)[:, len(PROMPT) + start - 1]
        return torch.nn.functional.one_hot((likely[last] + length - start) % VOCAB, VOCAB).double()

    return point


def total_variation(law: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(law - other).sum() / 2)


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return build_tiny(seed=1)


SOURCES = [("model", "threshold"), ("point", "threshold"), ("model", "typical"), ("point", "typical")]


@pytest.mark.parametrize(("draft", "acceptance"), SOURCES)
def test_lossy_rules_sample_a_law_of_their_own_and_not_the_targets(
    target: torch.nn.Module, draft: str, acceptance: str
) -> None:
    """Measured: how far. Expected by enumeration, and found in what is sampled."""
    exact = exact_law(target, FILTERS)
    lossy = lossy_law(target, draft_probs_of(draft, target, FILTERS), Rule[acceptance.upper()], FILTERS)
    distance = total_variation(lossy, exact)
    with build_engine(target, draft) as engine:
        samples = sample_rounds(engine, FILTERS, acceptance, 12 * BATCH)
    check_tally(samples)
    check_distribution(samples, lossy)
    assert distance > 0.05
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution(samples, exact)
    found = total_variation(samples.counts.sum(3) / samples.counts.sum(), exact.sum(3))
    assert abs(found - total_variation(lossy.sum(3), exact.sum(3))) < 0.02


def test_a_lossy_rule_in_the_engine(target: torch.nn.Module) -> None:
    """With the parameters that a request gives, not those of others."""
    filters = Filters(1.2, 7, 0.99, 0.0, acceptance_threshold=0.1)
    draft = draft_probs_of("model", target, filters)
    with build_engine(target, "model") as engine:
        samples = sample_engine(engine, filters, "threshold", 8000)
    check_tally(samples)
    check_distribution(samples, lossy_law(target, draft, Rule.THRESHOLD, filters))
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution(samples, lossy_law(target, draft, Rule.THRESHOLD, FILTERS))


def test_with_nothing_kept_the_enumeration_is_the_targets(target: torch.nn.Module) -> None:
    nothing = Filters(0.9, 6, 0.97, 0.0, acceptance_threshold=1.0)
    draft = draft_probs_of("model", target, nothing)
    assert np.allclose(lossy_law(target, draft, Rule.THRESHOLD, nothing), exact_law(target, nothing))


def test_what_is_drawn_behind_a_draft_is_the_targets_own_draw(target: torch.nn.Module) -> None:
    """With nothing kept, the text of a seed is plain decoding's."""
    prompts, options = [list(PROMPT)] * 8, {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 10}
    lossy = {"acceptance": "threshold", "acceptance_threshold": 1.0}
    with build_engine(target, "model") as engine:
        plain, results = (
            engine.generate(prompts, [SamplingParams(**options, **mode, seed=seed) for seed in range(8)])
            for mode in ({"num_speculative_tokens": 0}, {"num_speculative_tokens": 3, **lossy})
        )
    for result, truth in zip(results, plain, strict=True):
        assert result.token_ids == truth.token_ids
        assert result.metrics.speculative_decoding.num_accepted_draft_tokens == 0
    assert sum(result.metrics.speculative_decoding.num_draft_tokens for result in results) > 0
