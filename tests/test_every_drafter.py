"""What holds for every drafter that has a name, for lists of drafters, and for draft models of other vocabularies, in
small: laws A, C, D, G, J, L, N, O and P.

A new one is tested as soon as it stands in the registry. Of a list, every row of every round is drafted for in a way
that is drawn at random (`law_helpers.choose_ways`).
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import vocabulary_pairs
from law_helpers import (
    ALL_DRAFTERS,
    NAMED_DRAFTERS,
    BuildTwins,
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    check_rounds,
    make_prompt,
    plain,
    spec,
)

import specengine
from specengine import SamplingParams
from specengine.engine import Engine
from specengine.outputs import GenerationResult

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB, BLOCK, K = 12, 4, 5  # few ids: what was drawn at random is found again
TINY: dict[str, Any] = {"seed": 1, "vocab_size": VOCAB}
SPELLED: dict[str, Any] = {"seed": 9, "with_tokenizer": True}
GREEDY: dict[str, Any] = {"ignore_eos": True, "logprobs": 1, "max_new_tokens": 30}
COUPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 3}
REJECTION: dict[str, Any] = {**COUPLED, "acceptance": "rejection"}
MODES = [
    GREEDY,
    *({**COUPLED, "acceptance": mode} for mode in ("rejection", "block", "typical", "threshold")),
]
pytestmark = pytest.mark.filterwarnings("ignore:acceptance=")  # some are lossy, and say so
each_drafter = pytest.mark.parametrize("name", ALL_DRAFTERS)


def make_copy_prompt(length: int, seed: int = 0) -> list[int]:
    """A few words again and again, so that there is something to look up."""
    chance = random.Random(f"{length},{seed}")
    words = [make_prompt(size, 10 * seed + size, VOCAB) for size in (2, 3, 5)]
    prompt: list[int] = []
    while len(prompt) < length:
        prompt += chance.choice(words)
    return prompt[:length]


PROMPTS = [make_copy_prompt(length, length) for length in (24, 7, 15, 9)]


def make_text(name: str) -> str:
    """Text that the target of this drafter can read."""
    return " ba bb bc ba bb bc" if name in vocabulary_pairs.PAIRS else "a = [1, 2, 3]\nb = [1, 2, 3]\n"


def statistics(result: GenerationResult) -> Any:
    return result.metrics.speculative_decoding


@each_drafter
def test_a_around_the_edges_of_blocks_drafts_change_nothing(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=1, vocab_size=VOCAB), block_size=BLOCK)
    num_free = engine.num_free_blocks
    for length in (1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1):
        prompt = make_copy_prompt(length)
        expected = plain(engine, prompt, **GREEDY)
        for k in (1, BLOCK, 2 * BLOCK + 1):
            assert_same(spec(engine, prompt, k, **GREEDY), expected)
    assert_idle(engine, num_free)
    tally.check()


@each_drafter
def test_c_wherever_a_text_ends_it_ends_as_without_drafts(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=9, with_tokenizer=True))
    prompt = make_text(name)
    whole = plain(engine, prompt, **GREEDY)
    for index in range(0, len(whole.token_ids), 4):
        for end in ({"stop_token_ids": [whole.token_ids[index]]}, {"stop": whole.text[index : index + 2]}):
            expected = plain(engine, prompt, **GREEDY, **end)
            assert_same(spec(engine, prompt, K, **GREEDY, **end), expected)
    tally.check()


@each_drafter
def test_d_budgets_and_contexts_are_kept(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=1, vocab_size=VOCAB), max_seq_len=40)
    for length in (1, 40 - K - 1, 40 - K, 38, 39):
        for budget in (1, 2, K + 1, K + 2, 60):
            result = spec(engine, make_copy_prompt(length), K, ignore_eos=True, max_new_tokens=budget)
            assert len(result.token_ids) == min(budget, 40 - length)
    tally.check()


@each_drafter
def test_g_j_a_seeds_text_depends_on_nothing_else_and_every_row_is_as_alone(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=1, vocab_size=VOCAB))
    expected = [plain(engine, prompt, **COUPLED) for prompt in PROMPTS]
    for k in (1, K):
        for result, truth in zip(spec(engine, PROMPTS, k, **COUPLED), expected, strict=True):
            assert_same(result, truth)
    for sampling in MODES:
        alone = [spec(engine, prompt, K, **sampling) for prompt in PROMPTS]
        for order in ([3, 1, 0, 2], [0, 0, 1, 2, 3]):
            together = spec(engine, [PROMPTS[row] for row in order], K, **sampling)
            for result, row in zip(together, order, strict=True):
                assert_same(result, alone[row])
                assert statistics(result) == statistics(alone[row])
    tally.check()


@each_drafter
def test_l_replayed_rounds_are_those_that_python_runs(
    name: str, drafted: DraftedFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    direct, replayed = build_twins(*drafted(name, seed=1, vocab_size=VOCAB))
    chance = random.Random(5)
    for count in (1, 4, 2):
        prompts = [make_copy_prompt(3 + 4 * row, row) for row in range(count)]
        params = [
            SamplingParams(
                **{**chance.choice([COUPLED, *MODES]), "max_new_tokens": chance.randint(3, 30)},
                num_speculative_tokens=chance.choice((0, 1, 3, K)),
            )
            for _ in prompts
        ]
        for result, truth in zip(
            replayed.generate(prompts, params), direct.generate(prompts, params), strict=True
        ):
            assert_same(result, truth)
            assert statistics(result) == statistics(truth)
    assert replayed.graph_report is not None
    assert replayed.graph_report.num_graphs > 0
    tally.check()


@each_drafter
@pytest.mark.parametrize("sampling", [GREEDY, REJECTION], ids=["greedy", "rejection"])
def test_n_preemption_and_shared_prefixes_change_nothing(
    name: str,
    sampling: dict[str, Any],
    drafted: DraftedFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    shared = make_copy_prompt(2 * BLOCK)
    prompts = [shared + prompt[:4] for prompt in PROMPTS]
    roomy, tight = (
        build_engine(*drafted(name, seed=1, vocab_size=VOCAB), block_size=BLOCK, **config)
        for config in ({"enable_prefix_cache": False}, {"num_blocks": 17, "prefill_chunk_size": 3})
    )
    num_free = tight.num_free_blocks
    alone = [spec(roomy, prompt, K, **sampling) for prompt in prompts]
    together = spec(tight, prompts, K, **sampling)
    assert sum(result.metrics.num_preemptions for result in together) > 0
    for result, expected in zip(together, alone, strict=True):
        assert_same(result, expected)
    assert_idle(tight, num_free)
    again = spec(tight, prompts[0], K, **sampling)
    assert again.metrics.num_cached_tokens > 0
    assert_same(again, alone[0])
    tally.check()


@each_drafter
def test_o_a_consumer_may_leave_after_any_event(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=1, vocab_size=VOCAB))
    num_free = engine.num_free_blocks
    expected = spec(engine, PROMPTS[0], K, **GREEDY)
    for num_events in range(1, 8):
        stream = engine.stream(PROMPTS, SamplingParams(**GREEDY, num_speculative_tokens=K))
        for _ in range(num_events):
            next(stream)
        stream.close()
        assert_idle(engine, num_free)
    result = spec(engine, PROMPTS[0], K, **GREEDY)
    assert_same(result, expected)
    assert statistics(result) == statistics(expected)
    tally.check()


@each_drafter
def test_p_what_is_counted_is_what_was_said(
    name: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(*drafted(name, seed=1, vocab_size=VOCAB))
    for prompt, sampling in product(PROMPTS, MODES):
        result = spec(engine, prompt, K, **sampling, return_rounds=True)
        check_rounds(result)
        found = statistics(result)
        emitted = 1 + found.num_accepted_draft_tokens + found.num_rounds - found.num_trimmed_tokens
        assert emitted == len(result.token_ids)
        assert found.num_accepted_by_position == sorted(found.num_accepted_by_position, reverse=True)
        assert (
            found.lossless == result.lossless == (sampling.get("acceptance") not in ("typical", "threshold"))
        )
        assert statistics(spec(engine, prompt, K, **sampling)) == found
    tally.check()


@pytest.mark.parametrize("name", NAMED_DRAFTERS)
def test_a_name_works_in_a_call_and_in_an_engine(name: str, checkpoint: CheckpointFactory) -> None:
    path = checkpoint(seed=9, with_tokenizer=True)
    call = {"max_new_tokens": 20, "ignore_eos": True}
    with Engine(path, name) as engine:
        assert engine.draft_name.split(":")[0] == name.split(":")[0]
        expected = engine.generate("a b a b", **call, num_speculative_tokens=0)
    assert_same(specengine.generate("a b a b", model=str(path), draft_model=name, **call), expected)
