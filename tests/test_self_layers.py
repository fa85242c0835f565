"""`self:<layers>`: the laws in small, for a draft that is the target's first layers on the target's own cache.

Two things judge it: plain decoding, as every drafter, and a draft model that was cut out of the target's checkpoint,
with a cache of its own: what that proposes, and how much of it is accepted, is to be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drafters
import pytest
import tiny_models
import torch
from law_helpers import (
    HAS_BITS,
    CheckpointFactory,
    EngineFactory,
    GreedyOracle,
    Tally,
    assert_idle,
    assert_same,
    generate_with_k,
    make_prompt,
    plain,
    run_part_by_part,
    spec,
)

import specengine
from specengine import rng, speculative
from specengine.config import SamplingParams
from specengine.drafters.self_layers import SelfDrafter
from specengine.engine import Engine, assembly
from specengine.models.decoder import Decoder
from specengine.outputs import GenerationResult
from specengine.runtime import model_runner
from specengine.runtime.kv_cache import TARGET

HOLDS_FOR_REPLAYED_ROUNDS = True
MODEL_TYPES = tiny_models.MODEL_TYPES
VOCAB, NUM_LAYERS, BLOCK, CONTEXT = 64, 3, 4, 24
GREEDY: dict[str, Any] = {}
COUPLED: dict[str, Any] = {"temperature": 0.9, "seed": 5, "acceptance": "coupled"}
REJECTION: dict[str, Any] = {"temperature": 1.0, "seed": 6, "acceptance": "rejection"}
FILTERED: dict[str, Any] = {**REJECTION, "top_k": 20, "top_p": 0.9, "temperature": 0.7}
PENALISED: dict[str, Any] = {**COUPLED, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "top_p": 0.9}
LOOKED_AT: dict[str, Any] = {"logprobs": 2}
MODES = [GREEDY, COUPLED, REJECTION, FILTERED, PENALISED, LOOKED_AT]
SAME_TEXT = [GREEDY, COUPLED, PENALISED, LOOKED_AT]  # as plain decoding's, to the bit
Build = Callable[..., Engine]


@pytest.fixture
def build(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Build:
    """build(2, "opt", **config): a tiny target of three layers, of which so many draft."""

    def build(layers: int, model_type: str = "gpt2", *, max_positions: int = 96, **config: Any) -> Engine:
        path = checkpoint(model_type, seed=2, num_layers=NUM_LAYERS, max_positions=max_positions)
        return build_engine(path, f"self:{layers}", **config)

    return build


def params_of(modes: list[dict[str, Any]], k: int, num_tokens: int = 25) -> list[SamplingParams]:
    return [
        SamplingParams(num_speculative_tokens=k, max_new_tokens=num_tokens, ignore_eos=True, **mode)
        for mode in modes
    ]


def prompts_of(count: int) -> list[list[int]]:
    return [make_prompt(2 + 3 * row, row, VOCAB) for row in range(count)]


def assert_equal(results: list[GenerationResult], expected: list[GenerationResult]) -> None:
    """To the bit, and with the same drafts accepted."""
    for result, truth in zip(results, expected, strict=True):
        assert_same(result, truth)
        assert result.metrics.speculative_decoding == truth.metrics.speculative_decoding


# -- A: blocks and rollback ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_prompts_around_blocks_give_plains_bits_and_the_oracles_tokens(
    layers: int, build: Build, oracle: Callable[..., GreedyOracle], tally: Tally
) -> None:
    engine = build(layers)
    judge, num_free = oracle("gpt2", seed=2, num_layers=NUM_LAYERS, max_positions=96), engine.num_free_blocks
    sampling: dict[str, Any] = {"max_new_tokens": 3 * BLOCK + 1, "ignore_eos": True, "logprobs": 0}
    for length in (2, 3, 4, 5, 7, 8, 9):
        prompt = make_prompt(length, 1, VOCAB)
        expected = plain(engine, prompt, **sampling)
        assert expected.token_ids == judge.generate(prompt, 3 * BLOCK + 1)
        for k in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1):
            assert_same(spec(engine, prompt, k, **sampling), expected)
    assert_idle(engine, num_free)
    tally.check()


# -- B: the draft that is the target ------------------------------------------------------------------------------


def check_everything_is_accepted(engine: Engine, num_tokens: int = 61) -> None:
    """k + 1 tokens a round, whatever the mode of the row."""
    num_free = engine.num_free_blocks
    params = [
        one
        for k, mode in zip((4, 2, 3, 5, 11), MODES, strict=False)
        for one in params_of([mode], k, num_tokens)
    ]
    for result in engine.generate(prompts_of(len(params)), params):
        counts = result.metrics.speculative_decoding
        assert len(result.token_ids) == num_tokens
        assert counts.num_accepted_draft_tokens == counts.num_draft_tokens > num_tokens // 2
    assert_idle(engine, num_free)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_layers_are_always_accepted(model_type: str, precision: str, build: Build) -> None:
    check_everything_is_accepted(build(NUM_LAYERS, model_type, weight_dtype=precision))


def feed_the_token_before(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The draft begins, and ends, a position early."""
    propose = SelfDrafter.propose

    def mutant(self: SelfDrafter, batch: Any, state: Any) -> Any:
        plan = batch.planned
        return propose(self, batch.with_plan(plan._replace(last_position=plan.last_position - 1)), state)

    patch.setattr(SelfDrafter, "propose", mutant)


def draft_on_another_cache(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """In which nobody computes prompts."""
    runner: Any = engine._drafter.runner  # type: ignore[attr-defined]
    tensors = [torch.zeros_like(engine._kv_cache.tensors[TARGET])]
    patch.setattr(runner, "kv_cache", SimpleNamespace(tensors=tensors, block_size=BLOCK))


@pytest.mark.parametrize("plant", [feed_the_token_before, draft_on_another_cache])
def test_a_draft_that_reads_the_wrong_place_is_noticed(
    plant: Callable[[Engine, pytest.MonkeyPatch], None], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(NUM_LAYERS)
    check_everything_is_accepted(engine)
    plant(engine, monkeypatch)
    with pytest.raises(AssertionError):
        check_everything_is_accepted(engine)


# -- what is drafted, and by what weights -------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path: Path) -> Callable[..., Path]:
    """cut(2, "opt"): a checkpoint of the first layers of the target that `build` has."""

    def save(layers: int, model_type: str = "gpt2") -> Path:
        model = tiny_models.build_model(model_type, seed=2, num_layers=NUM_LAYERS, max_positions=96)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.ModuleList):
                    setattr(module, name, child[:layers])
        model.config.num_hidden_layers = layers
        if hasattr(model.config, "layer_types"):
            model.config.layer_types = model.config.layer_types[:layers]
        return tiny_models.save_checkpoint(tmp_path / f"{model_type}-{layers}", model)

    return save


@pytest.mark.parametrize(
    "dtypes",
    [
        {},
        {"weight_dtype": "int8", "draft_weight_dtype": "int8"},
        {"draft_weight_dtype": "int8"},
        {"weight_dtype": "int8", "draft_weight_dtype": "float32"},
        {"dtype": "bfloat16", "draft_weight_dtype": "int8"},
        {
            "weight_dtype": "int8",
            "head_dtype": "float32",
            "draft_weight_dtype": "int8",
            "draft_head_dtype": "int8",
        },
    ],
    ids=lambda dtypes: "-".join(dtypes.values()) or "float32",
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_drafts_what_a_model_of_these_layers_drafts(
    model_type: str,
    dtypes: dict[str, str],
    checkpoint: CheckpointFactory,
    cut: Callable[..., Path],
    build: Build,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    """Every mode, in one batch; with the target's weights on its cache, with others on a cache of its own."""
    engine = build(2, model_type, **dtypes)
    own_weights = "draft_head_dtype" in dtypes or dtypes.get("draft_weight_dtype", "auto") not in (
        "auto",
        dtypes.get("weight_dtype"),
    )
    assert len(engine._kv_cache.tensors) == len(engine.weights) == (2 if own_weights else 1)
    assert isinstance(engine._drafter, SelfDrafter) == (not own_weights)
    assert engine.draft_name == "self:2"
    model = checkpoint(model_type, seed=2, num_layers=NUM_LAYERS, max_positions=96)
    other = build_engine(model, cut(2, model_type), **dtypes)
    for k in (1, 4):
        prompts, params = prompts_of(len(MODES)), params_of(MODES, k)
        assert_equal(engine.generate(prompts, params), other.generate(prompts, params))
    tally.check()


# -- D: the context's end -----------------------------------------------------------------------------------------


def test_nothing_is_fed_beyond_the_context(
    build: Build, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    build_forward_batch, seen = model_runner.build_forward_batch, {0}

    def spy(*given: Any, **named: Any) -> Any:
        rows = build_forward_batch(*given, **named)
        seen.update(rows.positions.tolist())
        return rows

    monkeypatch.setattr(model_runner, "build_forward_batch", spy)
    run_part_by_part(monkeypatch)
    monkeypatch.setattr(Decoder, "draft", lambda *_: None)  # one by one, so that every position is seen
    engine = build(NUM_LAYERS - 1, max_positions=CONTEXT)
    for left in (1, 2, 4, 5, 11):
        prompt = make_prompt(CONTEXT - left, 1, VOCAB)
        for budget in (1, 3, 50):
            expected = plain(engine, prompt, max_new_tokens=budget, ignore_eos=True)
            for k in (1, 4):
                result = spec(engine, prompt, k, max_new_tokens=budget, ignore_eos=True)
                assert len(result.token_ids) == min(budget, left)
                assert_same(result, expected)
    assert max(seen) == CONTEXT - 2, "the last token is never fed"
    tally.check()


# -- G, J, L: batches, k, and the host's lag ----------------------------------------------------------------------


def test_each_row_of_a_batch_is_as_alone(build: Build, tally: Tally) -> None:
    engine = build(2)
    prompts = prompts_of(len(MODES))
    params = [one for row, mode in enumerate(MODES) for one in params_of([mode], (3, 1, 4, 0)[row % 4])]
    alone = [engine.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    for rows in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4], [2, 2, 1]):
        results = engine.generate([prompts[row] for row in rows], [params[row] for row in rows])
        assert_equal(results, [alone[row] for row in rows])
    tally.check()


PATTERNS: dict[str, Callable[[int, int], int]] = {
    "mostly off": lambda step, row: 3 * (step % 9 == 0),
    "rows apart": lambda step, row: (4, 0, 2)[(step // 2 + row) % 3],
}


@pytest.mark.parametrize("rounds_ahead", [0, 1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_k_may_change_and_be_0_whatever_the_hosts_lag(
    pattern: str, rounds_ahead: int, build: Build, tally: Tally
) -> None:
    """Plain decoding's bits with some of the layers, and no hole with all of them. Nobody is caught up."""
    for layers in (1, NUM_LAYERS):
        engine = build(layers, rounds_ahead=rounds_ahead)
        prompts, modes = prompts_of(3), SAME_TEXT[:3]
        params = params_of(modes, 0, 40)
        expected = [engine.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        results = generate_with_k(engine, prompts, params, PATTERNS[pattern], joins_every=2)
        for result, truth in zip(results, expected, strict=True):
            assert_same(result, truth)
            counts = result.metrics.speculative_decoding
            assert counts.num_draft_tokens > 3
            assert layers == 1 or counts.num_accepted_draft_tokens == counts.num_draft_tokens
    tally.check()


def test_rounds_that_are_replayed_ahead_give_what_python_gives(build: Build, tally: Tally) -> None:
    ahead, behind = build(2, rounds_ahead=2), build(2, rounds_ahead=0)
    for count in (1, 3, 6, 2):
        prompts = prompts_of(count)
        params = [one for mode in MODES[:count] for one in params_of([mode], 1 + count % 4, 20 + count)]
        assert_equal(ahead.generate(prompts, params), behind.generate(prompts, params))
    tally.check()


# -- M: bits ------------------------------------------------------------------------------------------------------


promises_bits = pytest.mark.skipif(not HAS_BITS, reason="the reference promises no bits")


class KVWatch:
    """Compares what a draft has written with what the target's forward writes in its place."""

    def __init__(self, engine: Engine, layers: int, patch: pytest.MonkeyPatch) -> None:
        self.num_compared = 0
        self._cache, self._layers = engine._kv_cache.tensors[TARGET], layers
        self._judge = speculative.judge
        run_part_by_part(patch)
        patch.setattr(speculative, "judge", self.judge)

    def judge(self, proposal: Any, batch: Any, *given: Any) -> Any:
        drafted = self._cache.clone()
        outcome = self._judge(proposal, batch, *given)
        for slot, length, count in zip(
            batch.slots.tolist(), batch.seq_len.tolist(), proposal.num_tokens.tolist(), strict=True
        ):
            for position in range(length - 1, length - 1 + count):
                block, at = int(batch.block_table[slot, position // BLOCK]), position % BLOCK
                ours, theirs = (cache[:, :, block, :, at] for cache in (drafted, self._cache))
                assert torch.equal(ours[: self._layers], theirs[: self._layers]), "the draft wrote other bits"
                assert not torch.equal(ours[self._layers :], theirs[self._layers :]), "nobody else wrote here"
                self.num_compared += 1
        return outcome


@promises_bits
@pytest.mark.parametrize("precision", [{}, {"dtype": "bfloat16"}, {"weight_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_draft_writes_the_targets_own_bits(
    model_type: str, precision: dict[str, str], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(2, model_type, enable_prefix_cache=False, **precision)
    watch = KVWatch(engine, 2, monkeypatch)
    engine._kv_cache.tensors[TARGET].zero_()
    engine.generate(prompts_of(3), params_of([GREEDY, REJECTION, COUPLED], 3, 15))
    assert watch.num_compared > 30


@promises_bits
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_on_every_instruction_set_all_layers_are_always_accepted(
    instruction_set: str, precision: str, build: Build
) -> None:
    """One row drafted, then as many as k + 1 verified: the same bits."""
    check_everything_is_accepted(build(NUM_LAYERS, weight_dtype=precision), 31)


@promises_bits
def test_a_draft_of_other_weights_is_noticed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact all the same: the target's forward has the last word."""
    engine = build(2)
    weights = copy.deepcopy(engine._target.decoder.weights)
    weights.layers[0].attention_norm.weight.mul_(1.01)
    decoder = Decoder(engine._target.decoder.spec, weights, engine._target.backend).first_layers(2)
    monkeypatch.setattr(engine._drafter.runner, "decoder", decoder)  # type: ignore[attr-defined]
    run_part_by_part(monkeypatch)
    prompt, params = make_prompt(5, 1, VOCAB), params_of([GREEDY], 3)[0]
    assert_same(engine.generate(prompt, params), plain(engine, prompt, max_new_tokens=25, ignore_eos=True))
    KVWatch(engine, 2, monkeypatch)
    with pytest.raises(AssertionError, match="the draft wrote other bits"):
        engine.generate(prompt, params)


# -- N: preemption, prefixes, forks -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [COUPLED, REJECTION, LOOKED_AT], ids=["coupled", "rejection", "logprobs"])
def test_too_few_blocks_and_shared_ones_change_nothing(
    mode: dict[str, Any], build: Build, tally: Tally
) -> None:
    roomy, tight = build(2, enable_prefix_cache=False), build(2, num_blocks=13)
    num_free = tight.num_free_blocks
    shared = make_prompt(9, 7, VOCAB)
    prompts = [shared, shared[:8], [*shared, 3], shared]
    params = params_of([mode] * 4, 3, 22)
    alone = [roomy.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    results = tight.generate(prompts, params)
    assert sum(result.metrics.num_preemptions for result in results) > 0
    for result, truth in zip(results, alone, strict=True):
        assert_same(result, truth)
    # Alone again, from what is found by prefix: as many drafts are accepted, since nothing is lacking.
    again = [tight.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    assert sum(result.metrics.num_cached_tokens for result in again) > 0
    assert_equal(again, alone)
    assert_idle(tight, num_free)
    tally.check()


def test_samples_of_one_prompt_write_no_block_of_each_other(
    build: Build, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """Without its one call, a draft's forwards are seen: every block that they write is its sequence's own."""
    engine = build(2)
    monkeypatch.setattr(Decoder, "draft", lambda *_: None)
    build_forward_batch, written = model_runner.build_forward_batch, []

    def spy(*given: Any, **named: Any) -> Any:
        rows = build_forward_batch(*given, **named)
        blocks = set((rows.kv_slots[rows.kv_slots >= 0] // BLOCK).tolist())
        written.extend(engine._kv_cache.manager.reference_count(block) for block in blocks)
        return rows

    monkeypatch.setattr(model_runner, "build_forward_batch", spy)
    run_part_by_part(monkeypatch)
    for length in (6, 7, 8, 9):
        prompt, sampling = (
            make_prompt(length, 2, VOCAB),
            {**REJECTION, "max_new_tokens": 12, "ignore_eos": True},
        )
        result = spec(engine, prompt, 3, n=3, **sampling)
        for output in result.outputs:
            own = {**sampling, "seed": rng.derive_seed(sampling["seed"], output.index)}
            assert output.token_ids == spec(engine, prompt, 3, **own).token_ids
    assert len(written) > 50
    assert set(written) <= {1}
    tally.check()


# -- P: statistics ------------------------------------------------------------------------------------------------


def test_statistics_add_up(build: Build, tally: Tally) -> None:
    engine = build(1)
    for result in engine.generate(prompts_of(len(MODES)), params_of(MODES, 4)):
        counts = result.metrics.speculative_decoding
        assert len(result.token_ids) == 1 + counts.num_accepted_draft_tokens + counts.num_rounds
        assert result.outputs[0].token_source.count("draft") == counts.num_accepted_draft_tokens
    tally.check()


# -- what it takes, and what it refuses ---------------------------------------------------------------------------


def test_it_takes_no_memory_but_the_targets(
    build: Build, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build(2)
    path = checkpoint("gpt2", seed=2, num_layers=NUM_LAYERS, max_positions=96)
    assert engine.kv_bytes() == build_engine(path).kv_bytes()
    drafting, target = engine._drafter.runner.decoder.weights, engine._target.decoder.weights  # type: ignore[attr-defined]
    assert drafting.head is target.head
    assert all(ours is theirs for ours, theirs in zip(drafting.layers, target.layers, strict=False))


@pytest.mark.parametrize("argument", ["", "0", "x", "-1", "1.5", "²", "1:2", " 1", "1" * 20])
def test_what_is_no_number_of_layers_is_refused_before_anything_is_read(argument: str) -> None:
    name = f"self:{argument}"
    for call in (
        lambda: Engine("no/such/model", name),
        lambda: specengine.generate("a", model="no/such/model", draft_model=name),
        lambda: specengine.generate("a", draft_model=name),
    ):
        with pytest.raises(ValueError, match=r"^draft_model='self:") as caught:
            call()
        assert str(caught.value) == (
            f"draft_model={name!r}: expected a number of the target's layers from 1 on after the colon, "
            f"got {argument!r}"
        )


def test_more_layers_than_the_target_has_are_refused_before_it_is_loaded(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"^draft_model='self:4': the target has only 3 layers$"):
        build(NUM_LAYERS + 1)


def test_on_the_reference_it_gives_the_same_text(build: Build, tally: Tally) -> None:
    engine = build(2, backend="reference")
    prompts = prompts_of(2)
    expected = [result.token_ids for result in plain(engine, prompts, max_new_tokens=20, ignore_eos=True)]
    assert [
        result.token_ids for result in spec(engine, prompts, 3, max_new_tokens=20, ignore_eos=True)
    ] == expected
    tally.check()


# -- how it is measured -------------------------------------------------------------------------------------------


def test_the_benchmark_compares_it_with_plain_decoding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eight layers of the bundled target: a token of the prompt, and two rounds of four drafts."""
    arguments = ["self:8", "--prompts", "1", "--max-new-tokens", "11", "--repetitions", "1"]
    drafters.main(arguments)
    assert "| self:8 | 100.0% | 5.00 |" in capsys.readouterr().out
    generate = Engine.generate

    def of_less(engine: Engine, prompt: list[int], *, num_speculative_tokens: int, **sampling: Any) -> Any:
        """A planted fault: with drafts, the text is another."""
        return generate(engine, prompt[: len(prompt) - num_speculative_tokens], **sampling)

    monkeypatch.setattr(Engine, "generate", of_less)
    with pytest.raises(AssertionError, match="self:8: not the tokens of plain decoding"):
        drafters.main(arguments)
