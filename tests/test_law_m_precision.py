"""Law M: speculation gives plain's bits in every precision; there is no tolerance to spend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import vocabulary_pairs
from law_helpers import (
    HAS_BITS,
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
    run_op_by_op,
    spec,
)
from scripted_drafters import ScriptedDrafter
from torch import Tensor

from specengine import _C
from specengine.engine import Engine

pytestmark = pytest.mark.skipif(not HAS_BITS, reason="only the native backend promises bits")

VOCAB = 64
PRECISIONS = [
    {"weight_dtype": "float32", "kv_dtype": "float32"},
    {"weight_dtype": "float32", "kv_dtype": "bfloat16"},
    {"weight_dtype": "bfloat16", "kv_dtype": "bfloat16"},
    {"weight_dtype": "bfloat16", "kv_dtype": "float32"},
    {"weight_dtype": "float16", "kv_dtype": "float16"},
    {"weight_dtype": "int8", "kv_dtype": "float32"},
    {"weight_dtype": "int8", "dtype": "bfloat16", "kv_dtype": "auto"},
    {"weight_dtype": "int8_group", "dtype": "bfloat16", "kv_dtype": "auto"},
    {"weight_dtype": "int4_min", "kv_dtype": "float32"},
    {"weight_dtype": "bfloat16", "head_dtype": "int8"},
    {"weight_dtype": "int8", "head_dtype": "int4"},
]
MODES: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 9, "acceptance": "coupled", "top_p": 0.95}]


def check_bits(
    engine: Engine,
    drafter: ScriptedDrafter | None,
    ks: range = range(1, 17),
    *,
    lengths: tuple[int, ...] = (2, 7),
    vocab_size: int = VOCAB,
    num_tokens: int = 26,
) -> None:
    """k = 1 … 16 against k = 0: tokens, and every log-probability to the last bit."""
    num_free = engine.num_free_blocks
    prompts = [make_prompt(length, vocab_size=vocab_size) for length in lengths]
    for mode in MODES:
        sampling = {"max_new_tokens": num_tokens, "ignore_eos": True, "logprobs": 3, **mode}
        expected = plain(engine, prompts, prompt_logprobs=1, **sampling)
        if drafter is not None:
            drafter.forget()
            drafter.learn(expected[0], counts=(16, 2, 0))
            drafter.learn(*expected[1:], counts=(1, 16, 5))
        for k in ks:
            engine._kv_cache.manager.reset_prefix_cache()
            results = spec(engine, prompts, k, prompt_logprobs=1, **sampling)
            for result, truth in zip(results, expected, strict=True):
                assert_same(result, truth)
        engine._kv_cache.manager.reset_prefix_cache()
        for prompt, truth in zip(prompts, expected, strict=True):
            assert_same(spec(engine, prompt, ks[-1], prompt_logprobs=1, **sampling), truth)
    assert_idle(engine, num_free)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(p.values()))
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_speculation_gives_plains_bits(
    model_type: str,
    precision: dict[str, str],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    sizes = {"intermediate_size": 64} if precision["weight_dtype"] in ("int8_group", "int4_min") else {}
    if sizes and model_type == "qwen3":
        sizes["head_dim"] = 16
    engine = build_engine(checkpoint(model_type, seed=8, **sizes), drafter, **precision)
    check_bits(engine, drafter, ks=range(1, 17) if model_type == "gpt2" else range(1, 17, 5))
    tally.check()


# Widths that are no multiple of any vector, tile or panel.
ODD_SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 40, "num_heads": 5, "intermediate_size": 104, "vocab_size": 131, "num_layers": 1},
    {"hidden_size": 144, "num_heads": 3, "intermediate_size": 576, "vocab_size": 257, "num_layers": 2},
    {"hidden_size": 130, "num_heads": 2, "intermediate_size": 259, "vocab_size": 129, "num_layers": 1},
]
# The odd widths that weights by group may have.
IN_GROUPS = {"hidden_size": 96, "num_heads": 3, "intermediate_size": 288, "vocab_size": 129, "num_layers": 1}


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda shape: str(shape["hidden_size"]))
def test_odd_shapes_give_plains_bits(
    shape: dict[str, Any],
    weight_dtype: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    drafter = ScriptedDrafter(vocab_size=shape["vocab_size"])
    engine = build_engine(
        checkpoint("gpt2", seed=8, **shape), drafter, weight_dtype=weight_dtype, block_size=16
    )
    check_bits(
        engine,
        drafter,
        ks=range(1, 17, 3),
        lengths=(1, 5, 16, 17, 33),
        vocab_size=shape["vocab_size"],
        num_tokens=40,
    )
    tally.check()


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float16", "int8", "int4", "int4_min"])
def test_every_instruction_set_gives_plains_bits(
    weight_dtype: str,
    instruction_set: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    shape = IN_GROUPS if weight_dtype in ("int4", "int4_min") else ODD_SHAPES[1]
    drafter = ScriptedDrafter(vocab_size=shape["vocab_size"])
    engine = build_engine(checkpoint("gpt2", seed=8, **shape), drafter, weight_dtype=weight_dtype)
    check_bits(engine, drafter, ks=range(1, 17, 5), vocab_size=shape["vocab_size"])
    assert _C.build_info()["instruction_set"] == instruction_set
    tally.check()


@pytest.mark.parametrize("draft_weight_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_draft_of_another_precision_gives_plains_bits(
    draft_weight_dtype: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(
        checkpoint("gpt2", seed=8),
        checkpoint("gpt2", seed=8, noise=0.05),
        weight_dtype="bfloat16",
        draft_weight_dtype=draft_weight_dtype,
    )
    check_bits(engine, None, ks=range(1, 17, 5))
    tally.check()


@pytest.mark.parametrize("pair", vocabulary_pairs.PAIRS)
def test_a_draft_of_another_vocabulary_and_precision_gives_plains_bits(
    pair: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    models = drafted(pair, seed=8, noise=0.1)
    check_bits(
        build_engine(*models, weight_dtype="bfloat16", draft_weight_dtype="int8"), None, ks=range(1, 17, 5)
    )
    tally.check()


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_exact_ties_go_to_the_lowest_id_with_and_without_speculation(
    weight_dtype: str, build_engine: EngineFactory, tmp_path: Path, tally: Tally
) -> None:
    model = tiny_models.build_model("gpt2", seed=8, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB // 2 :] = model.lm_head.weight[: VOCAB // 2]
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = build_engine(
        tiny_models.save_checkpoint(tmp_path / "ties", model), drafter, weight_dtype=weight_dtype
    )
    check_bits(engine, drafter, ks=range(1, 17, 4))
    result = plain(engine, [1, 2, 3], max_new_tokens=20, ignore_eos=True)
    assert max(result.token_ids) < VOCAB // 2
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(p.values()))
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda shape: str(shape["hidden_size"]))
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_the_whole_grid(
    model_type: str,
    num_threads: int,
    shape: dict[str, Any],
    precision: dict[str, str],
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    drafter = ScriptedDrafter(vocab_size=shape["vocab_size"])
    path = checkpoint(model_type, seed=8, max_positions=320, **shape)
    engine = build_engine(path, drafter, num_threads=num_threads, block_size=16, **precision)
    check_bits(
        engine,
        drafter,
        lengths=(1, 5, 16, 17, 33, 127, 128, 250),
        vocab_size=shape["vocab_size"],
        num_tokens=40,
    )
    tally.check()


# -- planted faults -----------------------------------------------------------------------------------------------


def test_the_law_notices_another_kernel_for_one_row(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A one-row linear layer that sums in another order: the last bit of some values changes."""
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint("gpt2", seed=8), drafter)
    run_op_by_op(engine, monkeypatch)
    backend = engine._target.backend
    linear_residual = backend.linear_residual

    def faulty(x: Tensor, weight: Any, residual: Tensor) -> Tensor:
        result = linear_residual(x, weight, residual)
        return torch.nextafter(result, result.new_tensor(1e30)) if x.shape[0] == 1 else result

    monkeypatch.setattr(backend, "linear_residual", faulty)
    with pytest.raises(AssertionError):
        check_bits(engine, drafter, ks=range(1, 5), lengths=(7,))


def test_the_law_notices_attention_that_depends_on_the_number_of_queries(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint("gpt2", seed=8), drafter)
    run_op_by_op(engine, monkeypatch)
    backend = engine._target.backend
    paged_attention = backend.paged_attention

    def faulty(query: Tensor, *rest: Tensor) -> Tensor:
        return paged_attention(query, *rest) * (1 + 2.0**-20 * (query.shape[0] > 4))

    monkeypatch.setattr(backend, "paged_attention", faulty)
    with pytest.raises(AssertionError):
        check_bits(engine, drafter, ks=range(4, 8), lengths=(3,))
