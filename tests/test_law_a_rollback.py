"""Law A: whatever was drafted and rejected, wherever block boundaries fall, leaves no trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from law_helpers import (
    TOLERANCE,
    CheckpointFactory,
    EngineFactory,
    GreedyOracle,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
    run_part_by_part,
    spec,
)
from safetensors.torch import load_file, save_file
from scripted_drafters import AdversarialDrafter, PerfectDrafter, RandomDrafter, ScriptedDrafter
from torch import Tensor

from specengine import _C, speculative
from specengine.config import SamplingParams
from specengine.drafters import draft_model
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.engine import Engine
from specengine.models.decoder import ForwardBatch
from specengine.outputs import GenerationResult
from specengine.runtime import model_runner
from specengine.runtime.state import BatchState, RunningBatch
from specengine.speculative import RoundOutcome

HOLDS_FOR_REPLAYED_ROUNDS = True
VOCAB = 64
GREEDY: dict[str, Any] = {"ignore_eos": True, "logprobs": 2}
COUPLED: dict[str, Any] = {**GREEDY, "temperature": 1.0, "top_p": 0.9, "seed": 11, "acceptance": "coupled"}


def edge_lengths(block_size: int) -> list[int]:
    """B-2 … B+2, 2B-1 … 2B+1."""
    return [*range(block_size - 2, block_size + 3), *range(2 * block_size - 1, 2 * block_size + 2)]


def edge_ks(block_size: int) -> list[int]:
    return [1, block_size - 1, block_size, block_size + 1, 2 * block_size + 1]


def poison(engine: Engine, value: float = float("nan")) -> None:
    """Makes every slot of an idle engine's cache poisonous: what is read must have been written since."""
    engine._kv_cache.manager.reset_prefix_cache()
    for tensor in engine._kv_cache.tensors:
        tensor.fill_(value)


def check_rollback(
    engine: Engine,
    drafter: ScriptedDrafter,
    *,
    length: int,
    ks: Sequence[int],
    counts: Callable[[int], Sequence[int]],
    sampling: dict[str, Any],
    oracle: GreedyOracle | None = None,
    closings: Sequence[int] = (),
) -> None:
    """Every k and every accept count: plain's bits (the oracle's tokens), and nothing left behind.

    A run that is cut after some rounds is continued from the blocks that it left in the prefix cache: what was
    rejected must not be found there.
    """
    num_free = engine.num_free_blocks
    num_tokens = 3 * engine.config.block_size + 2
    prompt = make_prompt(length, vocab_size=VOCAB)
    expected = plain(engine, prompt, max_new_tokens=num_tokens, **sampling)
    if oracle is not None:
        check_against_oracle(expected, oracle)
    drafter.forget()
    drafter.learn(expected)
    for k in ks:
        for count in counts(k):
            drafter.counts = (count,)
            poison(engine)
            result = spec(engine, prompt, k, max_new_tokens=num_tokens, **sampling)
            assert_same(result, expected)
            check_scripted_counts(result, k, count)
            for num_events in closings or (2 + count % 2,):
                poison(engine)
                check_continuation(engine, prompt, k, expected, num_events, sampling)
            assert_idle(engine, num_free)


def check_against_oracle(result: GenerationResult, oracle: GreedyOracle) -> None:
    prompt, tokens = result.prompt_token_ids, result.token_ids
    assert tokens == oracle.generate(prompt, len(tokens))
    ours = [entry.logprob for entry in result.outputs[0].logprobs]
    assert ours == pytest.approx(oracle.logprobs(prompt, tokens), abs=TOLERANCE)


def check_scripted_counts(result: GenerationResult, k: int, count: int) -> None:
    """The run accepted what the script says: nothing was accepted or rejected by accident."""
    histogram: dict[int, int] = {}
    remaining = len(result.token_ids) - 1
    while remaining > 0:
        drafted = min(k, remaining - 1)
        accepted = min(count, drafted)
        if drafted > 0:
            histogram[accepted] = histogram.get(accepted, 0) + 1
        remaining -= accepted + 1
    recorded = result.metrics.speculative_decoding.acceptance_histogram
    assert {index: number for index, number in enumerate(recorded) if number} == histogram


def check_continuation(
    engine: Engine,
    prompt: list[int],
    k: int,
    expected: GenerationResult,
    num_events: int,
    sampling: dict[str, Any],
) -> None:
    """Closes a stream after some events and goes on behind them, as a next turn of a chat does."""
    params = SamplingParams(num_speculative_tokens=k, max_new_tokens=len(expected.token_ids), **sampling)
    stream = engine.stream([prompt], params)
    emitted: list[int] = []
    for _ in range(num_events):
        event = next(stream, None)
        if event is None:
            return
        emitted += event.token_ids
    stream.close()
    start = len(emitted) + 1
    if start >= len(expected.token_ids):
        return
    assert emitted == expected.token_ids[: len(emitted)]
    num_more = min(len(expected.token_ids) - start, k + 2)
    rest = spec(engine, prompt + expected.token_ids[:start], k, max_new_tokens=num_more, **sampling)
    assert rest.token_ids == expected.token_ids[start : start + num_more]
    ours = [entry.logprob for entry in rest.outputs[0].logprobs]
    assert ours == [entry.logprob for entry in expected.outputs[0].logprobs[start : start + num_more]]


@pytest.fixture
def scripted() -> ScriptedDrafter:
    return ScriptedDrafter(vocab_size=VOCAB)


@pytest.mark.parametrize("length", edge_lengths(4))
def test_every_accept_count_at_every_block_edge_gives_plains_bits(
    length: int,
    checkpoint: CheckpointFactory,
    oracle: Callable[..., GreedyOracle],
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=1), scripted)
    check_rollback(
        engine,
        scripted,
        length=length,
        ks=edge_ks(4),
        counts=lambda k: range(k + 1),
        sampling=GREEDY,
        oracle=oracle("gpt2", seed=1),
    )
    tally.check()


BY_GROUP = [
    ("llama", "int4", 5),
    ("qwen3", "int4_min", 4),
    ("gpt2", "int8_group", 8),
    ("llama", "int4_min", 3),
]


@pytest.mark.parametrize(("model_type", "weight_dtype", "length"), BY_GROUP)
def test_every_accept_count_gives_plains_bits_with_weights_by_group(
    model_type: str,
    weight_dtype: str,
    length: int,
    checkpoint: CheckpointFactory,
    oracle: Callable[..., GreedyOracle],
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    """The oracle has the numbers that the groups mean."""
    build = {"seed": 1, **tiny_models.IN_GROUPS.get(model_type, {})}
    engine = build_engine(checkpoint(model_type, **build), scripted, weight_dtype=weight_dtype)
    for sampling, judge in (
        (GREEDY, oracle(model_type, weight_dtype=weight_dtype, **build)),
        (COUPLED, None),
    ):
        check_rollback(
            engine,
            scripted,
            length=length,
            ks=(1, 4, 5),
            counts=lambda k: range(k + 1),
            sampling=sampling,
            oracle=judge,
        )
    tally.check()


@pytest.mark.parametrize(("model_type", "length"), [("opt", 3), ("gpt_neox", 4), ("gpt2", 5), ("gpt2", 8)])
def test_every_accept_count_gives_plains_bits_when_sampling_is_coupled(
    model_type: str,
    length: int,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(checkpoint(model_type, seed=2), scripted)
    check_rollback(
        engine,
        scripted,
        length=length,
        ks=(1, 4, 5),
        counts=lambda k: range(k + 1),
        sampling=COUPLED,
    )
    tally.check()


@pytest.mark.parametrize("length", [15, 16, 17])
def test_block_edges_of_sixteen_tokens(
    length: int,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=1, max_positions=128), scripted, block_size=16)
    check_rollback(
        engine,
        scripted,
        length=length,
        ks=(15, 16, 17),
        counts=lambda k: (1, k - 1, k),
        sampling=GREEDY,
    )
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("block_size", [2, 4, 16])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_the_whole_grid(
    model_type: str,
    block_size: int,
    sampling: dict[str, Any],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    tally: Tally,
) -> None:
    path = checkpoint(model_type, seed=3, max_positions=128)
    engine = build_engine(path, scripted, block_size=block_size)
    for length in edge_lengths(block_size):
        check_rollback(
            engine,
            scripted,
            length=max(1, length),
            ks=edge_ks(block_size),
            counts=lambda k: range(k + 1),
            sampling=sampling,
        )
    tally.check()


def check_repeats_after_others(engine: Engine, num_others: int = 50) -> None:
    """The same request again after others, in a pool so small that their blocks take the place of its own."""
    prompt = make_prompt(9, vocab_size=VOCAB)
    num_free = engine.num_free_blocks
    sampling: dict[str, Any] = {**COUPLED, "max_new_tokens": 14}
    expected = plain(engine, prompt, **sampling)
    engine._drafter._drafter.learn(expected, counts=(2, 0, 4))  # type: ignore[attr-defined]
    first = spec(engine, prompt, 4, **sampling)
    assert_same(first, expected)
    others = [make_prompt(3 + seed % 11, seed, VOCAB) for seed in range(num_others)]
    spec(engine, others, 4, max_new_tokens=6, ignore_eos=True)
    for _ in range(2):  # the second time finds the first's blocks, if prefixes are shared
        again = spec(engine, prompt, 4, **sampling)
        assert_same(again, expected)
    counts = again.metrics.speculative_decoding
    assert counts == first.metrics.speculative_decoding
    assert_idle(engine, num_free)


@pytest.mark.parametrize(
    "options",
    [{}, {"enable_prefix_cache": False}, {"weight_dtype": "int4"}],
    ids=["cached", "not-cached", "int4"],
)
def test_the_same_request_after_fifty_others_gives_the_same_bits(
    options: dict[str, Any], checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint("gpt2", seed=1), drafter, num_blocks=40, **options)
    check_repeats_after_others(engine)
    tally.check()


@pytest.mark.parametrize("k", [1, 4, 7])
def test_perfect_adversarial_and_random_drafters_give_plains_bits(
    k: int, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    prompt = make_prompt(7, vocab_size=VOCAB)
    adversaries = [AdversarialDrafter(vocab_size=VOCAB, wrong_at=at) for at in range(k)]
    for drafter in (PerfectDrafter(vocab_size=VOCAB), RandomDrafter(vocab_size=VOCAB), *adversaries):
        engine = build_engine(checkpoint("gpt2", seed=1), drafter)
        expected = plain(engine, prompt, max_new_tokens=20, **GREEDY)
        drafter.learn(expected)
        assert_same(spec(engine, prompt, k, max_new_tokens=20, **GREEDY), expected)
    tally.check()


# -- the draft model's own cache ----------------------------------------------------------------------------------


def check_drafts_are_fresh(
    build_engine: EngineFactory, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, **config: Any
) -> None:
    """Whatever was rolled back before, a draft model proposes what it would propose from scratch."""
    target, draft = pair
    draft_weights = config.get("draft_weight_dtype", "auto")
    engine = build_engine(target, draft, **config)
    poison(engine, 3.0)
    asked: list[tuple[list[int], list[int]]] = []
    propose = DraftModelDrafter.propose

    def spy(self: DraftModelDrafter, batch: Any, state: BatchState) -> Any:
        proposal = propose(self, batch, state)
        for row, count in enumerate(proposal.num_tokens.tolist()):
            if count:
                committed = batch.tokens[batch.slots[row], : batch.seq_len[row]].tolist()
                asked.append((committed, proposal.tokens[row, :count].tolist()))
        return proposal

    monkeypatch.setattr(DraftModelDrafter, "propose", spy)
    prompts = [make_prompt(length, vocab_size=VOCAB) for length in (1, 3, 4, 5, 9, 2, 8)]
    ks = [1, 3, 4, 5, 9, 0, 2]
    params = [
        SamplingParams(num_speculative_tokens=k, max_new_tokens=15 + k, ignore_eos=True, logprobs=0)
        for k in ks
    ]
    results = engine.generate(prompts, params)
    first = len(asked)
    for result in results:  # a next turn: blocks of the prefix cache are shared with the draft
        rest = engine.generate(result.prompt_token_ids + result.token_ids, params[3])
        assert len(rest.token_ids) == params[3].max_new_tokens
    monkeypatch.setattr(DraftModelDrafter, "propose", propose)
    for prompt, result in zip(prompts, results, strict=True):
        assert_same(
            result, plain(engine, prompt, max_new_tokens=len(result.token_ids), **params_of(params[0]))
        )
    assert 0 < first < len(asked)
    alone = build_engine(draft, enable_prefix_cache=False, weight_dtype=draft_weights)
    fresh = alone.generate(
        [committed for committed, _ in asked],
        [SamplingParams(max_new_tokens=len(tokens), ignore_eos=True) for _, tokens in asked],
    )
    for (committed, tokens), scratch in zip(asked, fresh, strict=True):
        assert tokens == scratch.token_ids, f"after {len(committed)} tokens"


def params_of(params: SamplingParams) -> dict[str, Any]:
    return {"ignore_eos": params.ignore_eos, "logprobs": params.logprobs}


@pytest.fixture
def pair(checkpoint: CheckpointFactory) -> tuple[Path, Path]:
    return checkpoint("gpt2", seed=1), checkpoint("gpt2", seed=1, noise=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 512},
        {"prefill_chunk_size": 3},
        {"weight_dtype": "int8_group", "draft_weight_dtype": "int4"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_draft_model_proposes_what_it_would_from_scratch(
    options: dict[str, Any],
    pair: tuple[Path, Path],
    build_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    check_drafts_are_fresh(build_engine, pair, monkeypatch, **options)
    tally.check()


# -- planted faults -----------------------------------------------------------------------------------------------


def check_small_grid(engine: Engine, drafter: ScriptedDrafter) -> None:
    for length in (3, 6):
        check_rollback(
            engine,
            drafter,
            length=length,
            ks=(1, 4),
            counts=lambda k: (0, 1, k),
            sampling=GREEDY,
            closings=(2, 3, 4),
        )


def skip_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C.PagedKVCache, "rollback", lambda self, slot, num_tokens: None)


def leave_the_watermark_one_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    rollback = _C.PagedKVCache.rollback
    monkeypatch.setattr(
        _C.PagedKVCache, "rollback", lambda self, slot, num_tokens: rollback(self, slot, num_tokens + 1)
    )


def stage_one_place_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is fed the drafts in another order than they are judged in."""
    stage = BatchState.stage
    monkeypatch.setattr(
        BatchState, "stage", lambda self, batch, drafted: stage(self, batch, drafted.roll(1, 1))
    )


def drop_the_first_slot_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft token that starts a new block is not written."""
    build = model_runner.build_forward_batch

    def faulty(*args: Any, block_size: int) -> ForwardBatch:
        batch = build(*args, block_size=block_size)
        is_dropped = batch.positions % block_size == 0
        starts = batch.q_start[:-1].long()
        is_dropped[starts[starts < len(is_dropped)]] = False
        return batch._replace(kv_slots=batch.kv_slots.masked_fill(is_dropped & (len(is_dropped) < 6), -1))

    monkeypatch.setattr(model_runner, "build_forward_batch", faulty)
    run_part_by_part(monkeypatch)


def commit_one_rejected_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token more than was decided becomes part of every sequence that has room for it."""
    commit = speculative.commit

    def faulty(outcome: RoundOutcome, batch: RunningBatch, state: BatchState) -> Tensor:
        is_running = batch.planned.is_running != 0
        count = outcome.num_accepted.masked_fill(~is_running, 0)
        is_short = is_running & (count + 1 < outcome.tokens.shape[1])
        column = torch.arange(outcome.tokens.shape[1])
        is_extra = is_short[:, None] & (column == count[:, None] + 1)
        outcome.tokens.masked_fill_(is_extra, 1)
        return commit(outcome._replace(num_accepted=count + is_short.int()), batch, state)

    monkeypatch.setattr(speculative, "commit", faulty)
    run_part_by_part(monkeypatch)


@pytest.mark.parametrize(
    "plant",
    [
        skip_rollback,
        leave_the_watermark_one_too_high,
        stage_one_place_too_far,
        drop_the_first_slot_of_a_block,
        commit_one_rejected_token,
    ],
)
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    scripted: ScriptedDrafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(checkpoint("gpt2", seed=1), scripted)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_small_grid(engine, scripted)


def test_the_law_notices_a_draft_that_never_catches_up(
    pair: tuple[Path, Path], build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftModelDrafter, "_gap", lambda self, sequence, draft_limit: draft_model._NO_GAP)
    with pytest.raises(AssertionError):
        check_drafts_are_fresh(build_engine, pair, monkeypatch)


class UnusableDrafter(PerfectDrafter):
    """Right up to a token whose keys and values are no numbers, which the target never says."""

    name = "unusable"

    def __init__(self, *, token: int, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self.token = token

    def draft(self, truth: list[int], committed: list[int], limit: int, *_: Any) -> list[int]:
        num_right = len(committed) % 3
        return [*truth[:num_right], self.token, *truth[num_right + 1 :]][:limit]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [GREEDY, COUPLED], ids=["greedy", "coupled"])
def test_a_rejected_draft_that_is_no_number_harms_nobody(
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tmp_path: Path,
    dtype: str,
    options: dict[str, Any],
) -> None:
    """Its row says nothing that counts, and no other row sees it."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint("gpt_neox", vocab_size=VOCAB), path)
    prompts = [make_prompt(length, vocab_size=VOCAB - 1) for length in (9, 14)]
    drafter = UnusableDrafter(token=VOCAB - 1, vocab_size=VOCAB)
    weights = load_file(path / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_in.weight"))
    weights[name][drafter.token] = float("inf")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    engine = build_engine(path, drafter, dtype=dtype)
    given = {**options, "max_new_tokens": 24, "logit_bias": {drafter.token: -100.0}}
    expected = [plain(engine, prompt, **given) for prompt in prompts]
    drafter.learn(expected)
    assert all(prompt.count(drafter.token) == 0 for prompt in prompts)
    for k in (1, 4):
        for prompt, wanted in zip(prompts, expected, strict=True):
            result = spec(engine, prompt, k, **given)
            assert_same(result, wanted)
            assert result.metrics.speculative_decoding.num_accepted_draft_tokens > 0
