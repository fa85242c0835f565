"""The rounds' state machine on the Triton kernels, as a GPU runs it: recorded, padded, replayed, one round ahead.

Laws A to D, J, L, N and O in small: without a GPU every launch goes through Triton's interpreter. In full they hold on
the native backend, in the files of their names; `SPECENGINE_TEST_BACKEND=triton` runs those files here too, for hours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kernel_cases import DEVICE
from law_helpers import (
    BuildTwins,
    CheckpointFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
)
from scripted_drafters import ScriptedDrafter

from specengine import Engine, SamplingParams
from specengine.outputs import GenerationResult

pytestmark = pytest.mark.triton

VOCAB = 64
COUPLED = {"temperature": 0.9, "seed": 5, "acceptance": "coupled"}
REJECTION = {"temperature": 0.8, "seed": 6, "acceptance": "rejection"}
FILTERED = {"temperature": 1.1, "seed": 7, "acceptance": "coupled", "top_k": 20, "top_p": 0.9}


def small(checkpoint: CheckpointFactory, model_type: str = "gpt2", **build: Any) -> Path:
    """One layer of two heads: a launch's programs run one after another, milliseconds each."""
    return checkpoint(model_type, num_layers=1, num_heads=2, **build)


@pytest.fixture
def build_twins(build_twins: BuildTwins) -> BuildTwins:
    """The fixture of conftest.py, on Triton and with blocks of four tokens."""
    return partial(build_twins, backend="triton", device=str(DEVICE), block_size=4)


def params(k: int, num_tokens: int, **sampling: Any) -> SamplingParams:
    return SamplingParams(
        **{"ignore_eos": True, **sampling}, max_new_tokens=num_tokens, num_speculative_tokens=k
    )


def assert_results(results: list[GenerationResult], expected: list[GenerationResult]) -> None:
    for result, truth in zip(results, expected, strict=True):
        assert_same(result, truth)
        ours, theirs = (each.metrics.speculative_decoding for each in (result, truth))
        assert ours == theirs


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_ragged_batches_that_grow_and_shrink(
    model_type: str, checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """Laws L and J: three modes and three k in one batch, blocks of four tokens, then fewer, then more again."""
    models = small(checkpoint, model_type, seed=3), small(checkpoint, model_type, seed=3, noise=0.2)
    direct, replayed = build_twins(*models, max_batch_size=4)
    num_free = replayed.num_free_blocks
    given = [params(2, 7), params(3, 9, **COUPLED), params(1, 6, **REJECTION), params(0, 5, **FILTERED)]
    prompts = [make_prompt(length, length, VOCAB) for length in (2, 7, 4, 3)]
    alone = [direct.generate(prompt, one) for prompt, one in zip(prompts, given, strict=True)]
    for rows in ([0], [0, 1, 2], [1, 3]) if model_type == "gpt2" else ([0, 1, 2],):
        results = replayed.generate([prompts[row] for row in rows], [given[row] for row in rows])
        assert_results(results, [alone[row] for row in rows])
    assert_idle(replayed, num_free)
    tally.check()


def test_every_accept_count_and_the_last_position(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """Laws A and D: scripted drafts are uploaded; the budget ends at the context's last position."""
    drafter = ScriptedDrafter(vocab_size=VOCAB, counts=(4, 0, 2, 1))
    direct, replayed = build_twins(small(checkpoint, seed=8, max_positions=24), drafter)
    for length in (3, 19):
        prompt = make_prompt(length, 1, VOCAB)
        expected = plain(direct, prompt, max_new_tokens=50, ignore_eos=True)
        assert len(expected.token_ids) == 24 - length
        drafter.learn(expected)
        for k in (4, 2):
            assert_same(replayed.generate(prompt, params(k, 50)), expected)
    tally.check()


def test_a_draft_that_is_the_target_is_always_accepted(
    checkpoint: CheckpointFactory, build_twins: BuildTwins
) -> None:
    """Law B, in every mode."""
    model = small(checkpoint, seed=4)
    _, replayed = build_twins(model, model)
    prompts = [make_prompt(length, length, VOCAB) for length in (3, 6, 2)]
    given = [params(3, 13), params(3, 13, **COUPLED), params(3, 13, **REJECTION)]
    for result in replayed.generate(prompts, given):
        counts = result.metrics.speculative_decoding
        assert counts.draft_acceptance_rate == 1.0
        assert counts.mean_acceptance_length == 4


def test_the_targets_layers_draft_on_its_cache(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """One layer of two is right now and then, both always are; k apart from row to row."""
    model = checkpoint("gpt2", num_layers=2, num_heads=2, seed=3)
    prompts, given = (
        [make_prompt(3, 3, VOCAB), make_prompt(6, 6, VOCAB)],
        [params(3, 7), params(2, 5, **REJECTION)],
    )
    greedy = []
    for layers in (1, 2):
        _, replayed = build_twins(model, f"self:{layers}", max_batch_size=2)
        results = replayed.generate(prompts, given)
        for counts in (result.metrics.speculative_decoding for result in results):
            assert layers == 1 or counts.num_accepted_draft_tokens == counts.num_draft_tokens
        greedy.append(results[0].token_ids)
    assert greedy == [plain(replayed, prompts[0], max_new_tokens=7, ignore_eos=True).token_ids] * 2
    tally.check()


def test_sequences_that_stop_run_on_unheard(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """Law C: a stop id inside an accepted run, while the next round is under way."""
    models = small(checkpoint, seed=3), small(checkpoint, seed=3, noise=0.1)
    direct, replayed = build_twins(*models)
    prompt = make_prompt(5, 1, VOCAB)
    tokens = plain(direct, prompt, max_new_tokens=9, ignore_eos=True).token_ids
    for index in (1, 4, 6):
        stop = {"stop_token_ids": [tokens[index]]}
        expected = plain(direct, prompt, max_new_tokens=9, ignore_eos=True, **stop)
        assert_same(replayed.generate(prompt, params(3, 9, **stop)), expected)
    tally.check()


def test_preemption_and_aborts_while_rounds_are_under_way(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    """Laws N and O: a pool for one request and a half, and one that leaves in the middle."""
    models = small(checkpoint, seed=3), small(checkpoint, seed=3, noise=0.2)
    direct, replayed = build_twins(*models, num_blocks=8, max_seq_len=20)
    num_free = replayed.num_free_blocks
    prompts = [make_prompt(6, row, VOCAB) for row in range(3)]
    given = [params(3, 9), params(2, 9, **COUPLED), params(3, 9)]
    expected = [direct.generate(prompt, one) for prompt, one in zip(prompts, given, strict=True)]
    ids = [replayed.add_request(prompt, one) for prompt, one in zip(prompts, given, strict=True)]
    results: dict[int, GenerationResult] = {}
    for step in range(1000):
        if not replayed.has_work:
            break
        if step == 4:
            replayed.abort(ids[2])
        for event in replayed.step():
            if event.result is not None:
                results[event.index] = event.result
    for request_id, truth in zip(ids[:2], expected, strict=False):
        assert_same(results[request_id], truth)
    assert sum(result.metrics.num_preemptions for result in results.values()) > 0
    assert_idle(replayed, num_free)
    tally.check()


def check_padding(engine: Engine) -> None:
    """Three sequences in a round for four: padding's row of the state and its block of the cache stay as they were."""
    cache, state = engine._kv_cache.tensors[0], engine._state
    cache[:, :, 0] = 7.0
    engine.generate([make_prompt(3, row, VOCAB) for row in range(3)], params(0, 4))
    assert not state.tokens[state.num_slots].any()
    assert not state.seq_len[state.num_slots]
    assert (cache[:, :, 0] == 7.0).all()


def test_padding_touches_nothing(checkpoint: CheckpointFactory, build_twins: BuildTwins) -> None:
    check_padding(build_twins(small(checkpoint, seed=3), max_batch_size=4)[1])


def test_a_padded_row_that_runs_is_noticed(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, replayed = build_twins(small(checkpoint, seed=3), max_batch_size=4)
    backend = replayed._target.backend

    def mutant(tokens: Any, table: Any, slots: Any, *given: Any) -> Any:
        plan = backend.plan_round(slots, *given[:5])
        plan.is_running.fill_(1)
        # Padding has no last token: position -1 lies in somebody else's memory.
        plan.last_position.clamp_(min=0)
        feed, count = (plan.last_position, plan.is_running, plan.is_running), slots.numel()
        room = {"num_tokens": count, "num_logit_rows": count}
        return plan, backend.begin_forward(tokens, table, slots, *feed, *given[6:], **room)

    monkeypatch.setattr(backend, "begin_round", mutant)
    with pytest.raises(AssertionError):
        check_padding(replayed)


def test_rows_that_draft_in_ways_of_their_own(checkpoint: CheckpointFactory, build_twins: BuildTwins) -> None:
    """Models that draft for some rows of a round, and lookups beside and behind them."""
    target = small(checkpoint, seed=1, vocab_size=16)
    draft = small(checkpoint, seed=1, vocab_size=16, noise=0.1)
    direct, replayed = build_twins(target, [draft, "self:1", "ngram:1"])
    prompts = [[1, 2, 3, 1, 2], [5, 5, 6], [4, 3]]
    rows = [params(3, 6, **sampling) for sampling in ({}, COUPLED, REJECTION)]
    results, expected = (engine.generate(prompts, rows) for engine in (replayed, direct))
    assert_results(results, expected)
    for engine in (direct, replayed):
        for prompt, row, result in zip(prompts[:2], rows, results, strict=False):
            assert_same(result, engine.generate(prompt, replace(row, num_speculative_tokens=0)))
