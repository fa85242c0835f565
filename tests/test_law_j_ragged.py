"""Law J: a row's result never depends on its neighbours, however differently they are asked and accepted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from law_helpers import CheckpointFactory, EngineFactory, Tally, assert_idle, assert_same, make_prompt
from scripted_drafters import ScriptedDrafter
from torch import Tensor

from specengine import speculative
from specengine.config import SamplingParams
from specengine.drafters import draft_model
from specengine.engine import Engine
from specengine.outputs import GenerationResult
from specengine.runtime.state import BatchState

pytestmark = pytest.mark.filterwarnings("ignore:acceptance=")

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
MODES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_k": 12, "acceptance": "coupled"},
    {"temperature": 0.7, "acceptance": "rejection"},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "acceptance": "block"},
    {"temperature": 0.8, "acceptance": "threshold", "acceptance_threshold": 0.04},
    {"temperature": 0.8, "acceptance": "typical", "acceptance_delta": 0.5, "top_k": 9},
    {"logit_bias": {5: 3.0, 9: -50.0}},
    {"temperature": 1.0, "acceptance": "coupled", "min_new_tokens": 6, "stop_token_ids": list(range(30))},
]


@dataclass(frozen=True)
class Row:
    prompt: tuple[int, ...]
    params: SamplingParams
    count: int


def make_rows(num_rows: int = 8, seed: int = 0) -> list[Row]:
    """Unequal prompts, lengths, modes, k and accept counts 0 … k."""
    rng = random.Random(seed)
    rows = []
    for index in range(num_rows):
        k = (3, 0, 5, 1, 8, 4, 2, 7)[index % 8]
        params = SamplingParams(
            num_speculative_tokens=k,
            max_new_tokens=rng.randint(6, 17),
            seed=100 + index,
            ignore_eos=True,
            logprobs=index % 3,
            **MODES[(index + seed) % len(MODES)],
        )
        prompt = tuple(make_prompt(rng.randint(1, 14), 10 * seed + index, VOCAB))
        rows.append(Row(prompt, params, rng.randint(0, k)))
    return rows


def prepare(engine: Engine, drafter: ScriptedDrafter | None, rows: list[Row]) -> list[GenerationResult]:
    """Each row alone: what it must be in any company. A scripted drafter learns each row's plain text first."""
    if drafter is not None:
        for row in rows:
            params = {**vars(row.params), "num_speculative_tokens": 0}
            drafter.learn(
                engine.generate(list(row.prompt), SamplingParams(**params)), counts=(row.count, 0, 9)
            )
    return [engine.generate(list(row.prompt), row.params) for row in rows]  # type: ignore[misc]


def assert_row(result: GenerationResult, alone: GenerationResult) -> None:
    assert_same(result, alone)
    assert result.metrics.speculative_decoding == alone.metrics.speculative_decoding
    assert result.outputs[0].token_source == alone.outputs[0].token_source


def check_company(engine: Engine, rows: list[Row], alone: list[GenerationResult], seed: int = 0) -> None:
    """All rows at once, permuted, in pairs, and some of them twice: each is what it is alone."""
    num_free = engine.num_free_blocks
    everyone = list(range(len(rows)))
    shuffled = random.Random(seed).sample(everyone, len(everyone))
    twice = [shuffled[0], shuffled[1], shuffled[0], shuffled[2], shuffled[0]]
    for order in (everyone, shuffled, everyone[::-1], twice, shuffled[:2], shuffled[3:6]):
        results = engine.generate([list(rows[at].prompt) for at in order], [rows[at].params for at in order])
        for at, result in zip(order, results, strict=True):
            assert_row(result, alone[at])
    assert_idle(engine, num_free)


def check_joining_and_leaving(
    engine: Engine, rows: list[Row], alone: list[GenerationResult], seed: int = 0
) -> None:
    """Rows join at any step, others are aborted at any step: who stays is what it is alone."""
    num_free = engine.num_free_blocks
    rng = random.Random(seed)
    plan = rng.sample([*range(len(rows)), *range(len(rows))], 2 * len(rows))
    waiting, owners, leaving = list(plan), dict[int, int](), dict[int, int]()
    finished = 0
    while waiting or engine.has_work:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                at = waiting.pop()
                request_id = engine.add_request(list(rows[at].prompt), rows[at].params)
                owners[request_id] = at
                if rng.random() < 0.3:
                    leaving[request_id] = rng.randint(0, 4)
        for event in engine.step():
            if event.result is not None and event.finish_reason != "abort":
                assert_row(event.result, alone[owners[event.index]])
                finished += 1
        for request_id in [request_id for request_id, steps in leaving.items() if steps == 0]:
            engine.abort(request_id)
        leaving = {request_id: steps - 1 for request_id, steps in leaving.items()}
    engine.step()
    assert finished >= len(rows)
    assert_idle(engine, num_free)


@pytest.fixture
def scripted() -> ScriptedDrafter:
    return ScriptedDrafter(vocab_size=VOCAB)


@pytest.mark.parametrize(("model_type", "seed"), [("gpt2", 0), ("opt", 1), ("gpt_neox", 2), ("qwen3", 3)])
def test_every_row_is_what_it_is_alone(
    model_type: str,
    seed: int,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(checkpoint(model_type, seed=6), scripted)
    rows = make_rows(seed=seed)
    alone = prepare(engine, scripted, rows)
    check_company(engine, rows, alone, seed)
    check_joining_and_leaving(engine, rows, alone, seed)
    tally.check()


@pytest.mark.parametrize("config", [{"prefill_chunk_size": 5}, {"max_batch_size": 3}, {"num_threads": 2}])
def test_chunked_prompts_small_batches_and_more_threads_change_no_row(
    config: dict[str, Any],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    path, rows = checkpoint("gpt2", seed=6), make_rows(seed=4)
    alone = prepare(build_engine(path, scripted), scripted, rows)
    engine = build_engine(path, scripted, **config)
    check_company(engine, rows, alone)
    check_joining_and_leaving(engine, rows, alone)
    tally.check()


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
def test_every_row_with_a_draft_model_is_what_it_is_alone(
    enable_prefix_cache: bool, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """In rejection mode the draft's own bits decide too."""
    engine = build_engine(
        checkpoint("gpt2", seed=6),
        checkpoint("gpt2", seed=6, noise=0.1),
        enable_prefix_cache=enable_prefix_cache,
    )
    rows = make_rows(seed=5)
    alone = prepare(engine, None, rows)
    check_company(engine, rows, alone)
    check_joining_and_leaving(engine, rows, alone)
    tally.check()


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float16", "int8", "int4", "int8_group"])
def test_up_to_64_rows_at_once_are_what_they_are_alone(
    weight_dtype: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(
        checkpoint("gpt2", seed=6), scripted, max_batch_size=64, num_threads=2, weight_dtype=weight_dtype
    )
    num_free = engine.num_free_blocks
    rows = make_rows(num_rows=64, seed=7)
    alone = prepare(engine, scripted, rows)
    order = random.Random(weight_dtype).sample(range(64), 64)
    for size in (1, 2, 3, 5, 8, 13, 21, 34, 64):
        chosen = order[:size]
        prompts, params = [list(rows[at].prompt) for at in chosen], [rows[at].params for at in chosen]
        for at, result in zip(chosen, engine.generate(prompts, params), strict=True):
            assert_row(result, alone[at])
    assert_idle(engine, num_free)
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 30))
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_many_random_companies(
    model_type: str, seed: int, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(checkpoint(model_type, seed=6), checkpoint(model_type, seed=6, noise=0.1))
    rows = make_rows(num_rows=12, seed=seed)
    alone = prepare(engine, None, rows)
    check_company(engine, rows, alone, seed)
    check_joining_and_leaving(engine, rows, alone, seed)
    tally.check()


@pytest.mark.parametrize("k", [1, 4])
def test_rows_that_accept_zero_to_k_tokens_at_once_accept_exactly_that(
    k: int,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=6), scripted)
    prompts = [make_prompt(2 + count, count, VOCAB) for count in range(k + 1)]
    sampling: dict[str, Any] = {"max_new_tokens": 1 + 12 * (k + 1), "ignore_eos": True, "logprobs": 1}
    expected = engine.generate(prompts, num_speculative_tokens=0, **sampling)
    for count, result in enumerate(expected):
        scripted.learn(result, counts=(count,))
    results = engine.generate(prompts, num_speculative_tokens=k, **sampling)
    for count, (result, truth) in enumerate(zip(results, expected, strict=True)):
        assert_same(result, truth)
        histogram = result.metrics.speculative_decoding.acceptance_histogram
        assert histogram[count] >= 12 - k
        assert sum(histogram) - histogram[count] <= 1, "only the last round may be cut by the budget"
    tally.check()


# -- planted faults -----------------------------------------------------------------------------------------------


def verify_with_the_neighbours_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = speculative.verify
    monkeypatch.setattr(
        speculative,
        "verify",
        lambda ops, logits, stats, starts, *rest: verify(ops, logits, stats, starts.roll(1), *rest),
    )


def filter_with_the_neighbours_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    select = BatchState.select

    def faulty(self: BatchState, *args: Any, **kwargs: Any) -> Any:
        batch = select(self, *args, **kwargs)
        return batch._replace(rows=batch.rows._replace(top_k=batch.rows.top_k.roll(1)))

    monkeypatch.setattr(BatchState, "select", faulty)


def share_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    select = BatchState.select

    def faulty(self: BatchState, *args: Any, **kwargs: Any) -> Any:
        batch = select(self, *args, **kwargs)
        seeds = batch.rows.seeds[:1].expand(batch.slots.numel()).contiguous()
        return batch._replace(rows=batch.rows._replace(seeds=seeds))

    monkeypatch.setattr(BatchState, "select", faulty)


@pytest.mark.parametrize(
    "plant", [verify_with_the_neighbours_rows, filter_with_the_neighbours_parameters, share_one_seed]
)
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=6), scripted)
    rows = make_rows()
    alone = prepare(engine, scripted, rows)
    plant(monkeypatch)
    # Rows that padding has, and nobody computed, are an error of the op's.
    with pytest.raises((AssertionError, ValueError)):
        check_company(engine, rows, alone)


def test_the_law_notices_draft_noise_of_a_neighbour(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of rejection mode may not change with the row that a request happens to have."""
    path: Path = checkpoint("gpt2", seed=6)
    engine = build_engine(path, checkpoint("gpt2", seed=6, noise=0.1))
    rows = make_rows(seed=5)
    alone = prepare(engine, None, rows)
    sample = draft_model._Draft._sample

    def faulty(self: Any, step: int, rows: Any, logits: Tensor, stats: Tensor) -> Any:
        moved = rows._replace(positions=rows.positions + rows.slots[0])
        return sample(self, step, moved, logits, stats)

    monkeypatch.setattr(draft_model._Draft, "_sample", faulty)
    with pytest.raises(AssertionError):
        check_company(engine, rows, alone)
