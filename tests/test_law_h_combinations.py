"""Law H, everything at once: random combinations of sampling parameters, in batches of unlike requests.

Greedy and coupled texts equal plain decoding's, whatever drafts; and every token of plain decoding is one that
`transformers` could have chosen with its processors and warpers of the same names, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vocabulary_pairs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law_helpers import (
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    GreedyOracle,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
)
from scripted_drafters import AdversarialDrafter, KnowingDrafter, PerfectDrafter, RandomDrafter
from torch import Tensor
from transformers.generation import logits_process as theirs

from specengine import GenerationResult
from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.logits.entries import build_entries
from specengine.runtime import sequence as sequence_module

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
NEAR_TIE = 1e-4
DRAFTERS: dict[str, Callable[[], KnowingDrafter]] = {
    "perfect": lambda: PerfectDrafter(vocab_size=VOCAB),
    "adversarial": lambda: AdversarialDrafter(vocab_size=VOCAB, wrong_at=1),
    "random": lambda: RandomDrafter(vocab_size=VOCAB),
}
Asked = dict[str, Any]


def avoid_neighbours(token_ids: list[int], logits: Tensor) -> Tensor:
    logits[max(0, token_ids[-1] - 2) : token_ids[-1] + 3] -= 4.0
    return logits


def only_odd(token_ids: list[int], logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.arange(len(logits)) % 2 == 0, float("-inf"))


tokens = st.integers(0, VOCAB - 1)
# Words that the model does write: it repeats itself.
words = st.one_of(
    st.tuples(tokens, st.integers(2, 4)).map(lambda pair: [pair[0]] * pair[1]),
    st.lists(tokens, min_size=1, max_size=3),
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.floats(0.7, 1.8),
    "presence_penalty": st.floats(-1, 2),
    "frequency_penalty": st.floats(-0.3, 1),
    "logit_bias": st.dictionaries(tokens, st.floats(-6, 6), max_size=5),
    "bad_words": st.lists(words, max_size=8),
    "min_new_tokens": st.integers(0, 12),
    "stop_token_ids": st.lists(tokens, max_size=12),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 2),
    "logits_processor": st.lists(st.sampled_from([avoid_neighbours, only_odd]), max_size=2),
}
FILTERS: dict[str, st.SearchStrategy[Any]] = {
    "top_k": st.integers(0, VOCAB),
    "top_p": st.floats(0.3, 1),
    "min_p": st.floats(0, 0.3),
}
sampled = st.fixed_dictionaries(
    {"temperature": st.floats(0.4, 2), "seed": st.integers(0, 2**64 - 1), "acceptance": st.just("coupled")},
    optional=FILTERS,
)
params = st.tuples(
    st.fixed_dictionaries({"max_new_tokens": st.integers(12, 22)}, optional=OPTIONS),
    st.one_of(st.just({}), sampled),
).map(lambda parts: parts[0] | parts[1])
requests = st.lists(st.tuples(st.integers(2, 14), params, st.integers(0, 6)), min_size=1, max_size=3)


def their_processors(asked: Asked, prompt: list[int], endings: list[int]) -> list[Any]:
    """In our order; what `transformers` has no name for by hand."""
    made: list[Any] = []
    if penalty := asked.get("repetition_penalty"):
        made.append(theirs.RepetitionPenaltyLogitsProcessor(penalty))

    def count(ids: Tensor, logits: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, len(prompt) :], minlength=logits.shape[1])
        lowered = counts * asked.get("frequency_penalty", 0.0) + (counts > 0) * asked.get(
            "presence_penalty", 0.0
        )
        return logits - lowered

    made.append(count)
    if bias := asked.get("logit_bias"):
        made.append(theirs.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if bad_words := asked.get("bad_words"):
        made.append(theirs.NoBadWordsLogitsProcessor(bad_words))
    if endings and asked.get("min_new_tokens"):
        made.append(theirs.MinNewTokensLengthLogitsProcessor(len(prompt), asked["min_new_tokens"], endings))
    made += [
        lambda ids, logits, function=function: function(ids[0].tolist(), logits[0].clone())[None]
        for function in asked.get("logits_processor", [])
    ]
    if "temperature" in asked:
        made.append(theirs.TemperatureLogitsWarper(asked["temperature"]))
        if asked.get("top_k"):
            made.append(theirs.TopKLogitsWarper(asked["top_k"]))
        if asked.get("top_p", 1.0) < 1.0:
            made.append(theirs.TopPLogitsWarper(min(1.0, asked["top_p"] + NEAR_TIE)))
        if asked.get("min_p"):
            made.append(theirs.MinPLogitsWarper(asked["min_p"] * (1 - NEAR_TIE)))
    return made


@torch.no_grad()
def check_tokens(result: GenerationResult, asked: Asked, oracle: GreedyOracle) -> None:
    """Each could be theirs: of the support where it was drawn, else the likeliest."""
    prompt, output = result.prompt_token_ids, result.token_ids
    endings = [*asked.get("stop_token_ids", []), *([] if asked.get("ignore_eos") else [0])]
    processors = their_processors(asked, prompt, endings)
    ids = torch.tensor([[*prompt, *output]])
    rows = oracle.model(ids).logits[0, len(prompt) - 1 :].double()
    for place, token in enumerate(output):
        logits = rows[place : place + 1]
        for processor in processors:
            logits = processor(ids[:, : len(prompt) + place], logits)
        assert logits[0, token] > float("-inf"), f"token {place} cannot be"
        if "temperature" not in asked:
            assert logits[0, token] >= logits.max() - NEAR_TIE, f"token {place} is not the likeliest"
        assert token not in endings or place == len(output) - 1
    assert result.finish_reason == ("stop" if output[-1] in endings else "length")


def check_combinations(engine: Engine, drafter: Any, oracle: GreedyOracle, count: int) -> None:
    num_free = engine.num_free_blocks

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(requests)
    def check(batch: list[tuple[int, Asked, int]]) -> None:
        prompts = [make_prompt(length, 10 * row + length, VOCAB) for row, (length, _, _) in enumerate(batch)]
        expected = [
            plain(engine, prompt, **asked) for prompt, (_, asked, _) in zip(prompts, batch, strict=True)
        ]
        if isinstance(drafter, KnowingDrafter):
            drafter.forget()
            drafter.learn(expected)
        wanted = [SamplingParams(**asked, num_speculative_tokens=k) for _, asked, k in batch]
        for result, truth, (_, asked, _) in zip(
            engine.generate(prompts, wanted), expected, batch, strict=True
        ):
            assert_same(result, truth)
            check_tokens(truth, asked, oracle)

    check()
    assert_idle(engine, num_free)


EACH_DRAFTER = [*DRAFTERS, "draft", "draft+suffix+self:1+ngram:1", *vocabulary_pairs.PAIRS]


@pytest.mark.parametrize("drafter", EACH_DRAFTER)
@pytest.mark.parametrize("count", [24, pytest.param(128, marks=pytest.mark.slow)])
def test_combinations(
    drafter: str,
    count: int,
    checkpoint: CheckpointFactory,
    drafted: DraftedFactory,
    build_engine: EngineFactory,
    oracle: Callable[..., GreedyOracle],
    tally: Tally,
) -> None:
    """128 for each drafter are 896. Those joined by "+" draft in ways at random."""
    target, drafts = (
        (checkpoint(seed=3), DRAFTERS[drafter]()) if drafter in DRAFTERS else drafted(drafter, seed=3)
    )
    check_combinations(build_engine(target, drafts), drafts, oracle(seed=3), count)
    tally.check(accepted=drafter != "random", rejected=drafter != "perfect")


def words_shrink_to_their_last_token(patch: pytest.MonkeyPatch) -> None:
    def mutant(bias: Any, banned: Any, until: int, words: Any) -> Any:
        return build_entries(bias, banned, until, [word[-1:] for word in words])

    patch.setattr(sequence_module, "build_entries", mutant)


def test_the_law_notices_words_that_shrink(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    oracle: Callable[..., GreedyOracle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words_shrink_to_their_last_token(monkeypatch)
    engine = build_engine(checkpoint(seed=3), checkpoint(seed=3, noise=0.2))
    with pytest.raises(AssertionError):
        check_combinations(engine, None, oracle(seed=3), 40)
