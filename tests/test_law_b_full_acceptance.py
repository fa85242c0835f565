"""Law B: a draft that is the target is always right, so its cache may have no hole after full acceptance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
from law_helpers import (
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    assert_idle,
    assert_same,
    generate_with_k,
    make_prompt,
    name_weights,
    plain,
    run_part_by_part,
)

from specengine.config import SamplingParams
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.engine import Engine
from specengine.kernels.types.program import JudgedLogits
from specengine.ops.interpreter import row_keys
from specengine.outputs import GenerationResult
from specengine.runtime.model_runner import draw_keys
from specengine.runtime.state import BatchState

HOLDS_FOR_REPLAYED_ROUNDS = True
GREEDY: dict[str, Any] = {}
COUPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "acceptance": "coupled"}
REJECTION: dict[str, Any] = {"temperature": 1.0, "seed": 6, "acceptance": "rejection"}
BLOCK: dict[str, Any] = {**REJECTION, "acceptance": "block"}
FILTERED: dict[str, Any] = {**REJECTION, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7}
NUM_TOKENS = 500


def whole_rounds(k: int, num_tokens: int) -> int:
    """The first budget from `num_tokens` on that a token of the prompt and rounds of k + 1 fill exactly."""
    return 1 + -(-(num_tokens - 1) // (k + 1)) * (k + 1)


def check_everything_is_accepted(
    engine: Engine, ks: list[int], modes: list[dict[str, Any]], num_tokens: int = NUM_TOKENS
) -> list[GenerationResult]:
    """Acceptance is exactly 1.0 and the mean length k + 1, for every row of a batch."""
    num_free = engine.num_free_blocks
    prompts = [make_prompt(3 + 2 * row, row) for row in range(len(ks))]
    params = [
        SamplingParams(
            num_speculative_tokens=k, max_new_tokens=whole_rounds(k, num_tokens), ignore_eos=True, **mode
        )
        for k, mode in zip(ks, modes, strict=True)
    ]
    results = engine.generate(prompts, params)
    for k, result in zip(ks, results, strict=True):
        counts = result.metrics.speculative_decoding
        assert len(result.token_ids) >= num_tokens
        assert counts.draft_acceptance_rate == 1.0
        assert counts.mean_acceptance_length == k + 1
        assert counts.acceptance_histogram == [0] * k + [counts.num_rounds]
        assert set(counts.rejection_positions) <= {0}
    assert_idle(engine, num_free)
    return results


@pytest.fixture
def twins(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Engine:
    path = checkpoint("gpt2", seed=4, max_positions=560)
    return build_engine(path, path)


@pytest.mark.parametrize(
    "mode", [GREEDY, COUPLED, REJECTION, BLOCK], ids=["greedy", "coupled", "rejection", "block"]
)
@pytest.mark.parametrize("k", [1, 4])
def test_a_draft_that_is_the_target_is_always_accepted(k: int, mode: dict[str, Any], twins: Engine) -> None:
    (result,) = check_everything_is_accepted(twins, [k], [mode])
    if mode not in (REJECTION, BLOCK):
        expected = plain(
            twins, result.prompt_token_ids, max_new_tokens=len(result.token_ids), ignore_eos=True, **mode
        )
        assert_same(result, expected)


def test_every_row_of_a_mixed_batch_is_always_accepted(twins: Engine) -> None:
    modes = [GREEDY, COUPLED, REJECTION, FILTERED, BLOCK, GREEDY, COUPLED]
    check_everything_is_accepted(twins, [7, 3, 5, 2, 16, 1, 9], modes)


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_and_dtype_is_always_accepted(
    model_type: str, dtype: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint(model_type, seed=4)
    engine = build_engine(path, path, dtype=dtype)
    check_everything_is_accepted(engine, [3, 4, 8], [GREEDY, COUPLED, REJECTION], num_tokens=70)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"weight_dtype": "int4"}),
        ("llama", {"weight_dtype": "int8_group", "dtype": "bfloat16"}),
        ("qwen3", {"weight_dtype": "int4_min"}),
        ("gpt2", {"weight_dtype": "int4_min", "dtype": "bfloat16"}),
    ],
    ids=name_weights,
)
def test_a_draft_with_the_targets_groups_is_always_accepted(
    model_type: str, options: dict[str, str], checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint(model_type, seed=4, **tiny_models.IN_GROUPS.get(model_type, {}))
    modes = [GREEDY, COUPLED, REJECTION, BLOCK, FILTERED]
    engine = build_engine(path, path, **options, draft_weight_dtype=options["weight_dtype"])
    results = check_everything_is_accepted(engine, [3, 4, 8, 5, 2], modes, num_tokens=70)
    for mode, result in list(zip(modes, results, strict=True))[:2]:
        params = {**mode, "max_new_tokens": len(result.token_ids), "ignore_eos": True}
        assert_same(result, plain(engine, result.prompt_token_ids, **params))


@pytest.mark.parametrize(
    ("pair", "modes"),
    # One that reads text goes on with its likeliest tokens, whatever the request draws.
    [("renumbered", [GREEDY, COUPLED, REJECTION, BLOCK, FILTERED]), ("retokenized", [GREEDY] * 3)],
)
def test_a_draft_that_is_the_target_in_another_vocabulary_is_always_accepted(
    pair: str, modes: list[dict[str, Any]], drafted: DraftedFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(*drafted(pair, seed=4, max_positions=560, noise=0.0))
    check_everything_is_accepted(engine, [4, 3, 5, 2, 1][: len(modes)], modes, num_tokens=200)


# What request r drafts in step s: k on and off, k = 0 for longer than any lag, rows apart from each other, and both.
PATTERNS: dict[str, Callable[[int, int], int]] = {
    "on and off": lambda step, row: 4 * (step % 6 < 3),
    "mostly off": lambda step, row: 3 * (step % 9 == 0),
    "rows apart": lambda step, row: (4, 0, 2)[(step // 2 + row) % 3],
    "one row never": lambda step, row: 4 * ((step + row) % 2) if row else 0,
}


def check_patterns(engine: Engine, choose_k: Callable[[int, int], int], **options: Any) -> int:
    """Draft = target accepts everything whatever k does, and the text is that of plain decoding; the rounds."""
    num_free = engine.num_free_blocks
    modes = [GREEDY, COUPLED, REJECTION]
    prompts = [make_prompt(3 + 2 * row, row) for row in range(3)]
    params = [SamplingParams(max_new_tokens=60, ignore_eos=True, **mode) for mode in modes]
    results = generate_with_k(engine, prompts, params, choose_k, **options)
    for result in results:
        counts = result.metrics.speculative_decoding
        assert counts.num_accepted_draft_tokens == counts.num_draft_tokens
        assert len(result.token_ids) == 60
    for prompt, mode, result in list(zip(prompts, modes, results, strict=True))[:2]:
        assert result.token_ids == plain(engine, prompt, max_new_tokens=60, ignore_eos=True, **mode).token_ids
    assert sum(result.metrics.speculative_decoding.num_draft_tokens for result in results) > 20
    assert_idle(engine, num_free)
    return sum(result.metrics.num_preemptions for result in results)


@pytest.mark.parametrize("rounds_ahead", [0, 1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_drafting_on_and_off_whatever_the_hosts_lag(
    pattern: str, rounds_ahead: int, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint("gpt2", seed=4, max_positions=560)
    check_patterns(build_engine(path, path, rounds_ahead=rounds_ahead), PATTERNS[pattern])


@pytest.mark.parametrize("rounds_ahead", [0, 2])
def test_drafting_on_and_off_while_requests_join_and_are_preempted(
    rounds_ahead: int, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint("gpt2", seed=4, max_positions=560)
    engine = build_engine(path, path, rounds_ahead=rounds_ahead)
    check_patterns(engine, PATTERNS["rows apart"], joins_every=3)
    tight = build_engine(path, path, rounds_ahead=rounds_ahead, num_blocks=30)
    assert check_patterns(tight, PATTERNS["on and off"], joins_every=2) > 0


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3, 5, 8, 15, 16, 17, 64])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_the_whole_grid(
    model_type: str, block_size: int, k: int, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint(model_type, seed=4, max_positions=580)
    engine = build_engine(path, path, block_size=block_size)
    check_everything_is_accepted(engine, [k] * 4, [GREEDY, COUPLED, REJECTION, FILTERED])


@pytest.mark.parametrize("pattern", ["steady", *PATTERNS])
def test_the_host_stays_behind_whatever_k_does(
    pattern: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds stay under way after every step; with a steady k, nothing is caught up but the prompt."""
    find, num_gaps = DraftModelDrafter._gap, 0

    def counted(*given: Any) -> Any:
        nonlocal num_gaps
        gap = find(*given)
        num_gaps += gap.length > 0
        return gap

    monkeypatch.setattr(DraftModelDrafter, "_gap", counted)
    path = checkpoint("gpt2", seed=4, max_positions=560)
    engine = build_engine(path, path, rounds_ahead=2)
    under_way = []

    def choose_k(step: int, row: int) -> int:
        under_way.append(len(engine._rounds._flights))
        return PATTERNS.get(pattern, lambda *_: 4)(step, row)

    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    generate_with_k(engine, [make_prompt(8)], [params], choose_k)
    assert set(under_way[4:-2]) == {2}
    if pattern == "steady":
        assert num_gaps == 1


# -- planted faults -----------------------------------------------------------------------------------------------


def test_the_law_notices_a_hole_that_is_not_refilled(twins: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BatchState.plan

    def last_token_only(*given: Any, **named: Any) -> Any:
        batch = plan(*given, **named)
        if batch.k:
            batch.planned.draft_start[0] += 1
            batch.planned.draft_q_len[0] = batch.planned.is_drafting[0]
        return batch.with_plan(batch.planned)  # whatever has been begun fed both

    check_everything_is_accepted(twins, [4], [GREEDY], num_tokens=40)
    twins._kv_cache.manager.reset_prefix_cache()
    twins._kv_cache.tensors[1].fill_(9.0)  # not what the run before left in the same slots
    monkeypatch.setattr(BatchState, "plan", last_token_only)
    run_part_by_part(monkeypatch)
    twins._rounds._bound.clear()
    with pytest.raises(AssertionError):
        check_everything_is_accepted(twins, [4], [GREEDY], num_tokens=40)


def test_the_law_notices_a_draft_law_that_is_not_the_targets(
    twins: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejection compares p with q: a last bit of difference is enough to reject now and then."""
    runner = twins._drafter.runner  # type: ignore[union-attr]
    judge = runner.judge

    def scaled(rows: Any, batch: Any) -> Any:
        logits = judge(rows, batch).logits * 1.01
        judged_by, _ = row_keys(runner.backend, draw_keys(batch), rows)
        return JudgedLogits(logits, logits, runner.backend.filter_rows(logits, judged_by))

    monkeypatch.setattr(runner, "judge", scaled)
    with pytest.raises(AssertionError):
        check_everything_is_accepted(twins, [4], [REJECTION], num_tokens=200)
