"""Llama and its relatives: their variants beside transformers, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from law_helpers import assert_same, plain, spec

from conftest import CheckpointFactory, EngineFactory
from specengine.errors import ModelLoadError
from specengine.models.decoder import build_rotary_table
from specengine.models.registry import configure

GATED = ["llama", "mistral", "qwen2", "qwen3"]
PROMPT = [5, 9, 2, 33, 17, 21, 4, 60, 11]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What differs from TINY. Together: every head size, one to all heads sharing keys, biases, every scaling, tied heads.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 64}),
    ("llama", {"head_dim": 96, "num_key_value_heads": 1}),
    ("llama", {"head_dim": 128, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    ("llama", {"intermediate_size": 50}),
    ("mistral", {"head_dim": 20}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 64, "attention_bias": True}),
]


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """By transformers, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=str)
def test_variants_say_what_transformers_says(
    model_type: str, overrides: dict[str, Any], checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """Log-probabilities of a text within 1e-4, the same greedy text, and speculation changes no bit of it."""
    model = tiny_models.build_model(model_type, seed=3, **overrides)
    path = checkpoint(model_type, seed=3, **overrides)
    engine = build_engine(path, checkpoint(model_type, seed=3, noise=0.1, **overrides))
    expected = greedy(model, PROMPT, 14)
    truth = plain(engine, PROMPT, max_new_tokens=14, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    assert truth.token_ids == expected
    with torch.inference_mode():
        scores = model(torch.tensor([PROMPT + expected])).logits[0].log_softmax(-1)
    ours = [entry.logprob for entry in [*truth.prompt_logprobs[1:], *truth.outputs[0].logprobs]]
    theirs = [float(scores[at, token]) for at, token in enumerate((PROMPT + expected)[1:])]
    assert ours == pytest.approx(theirs, abs=1e-4)
    for k in (1, 4, 7):
        found = spec(engine, PROMPT, k, max_new_tokens=14, ignore_eos=True, logprobs=1, prompt_logprobs=1)
        assert_same(found, truth)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_tables_are_those_of_transformers(kind: str) -> None:
    """At Llama 3's own numbers: some frequencies are left alone, some divided, some between."""
    scaling: dict[str, Any] = {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "llama3": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    }[kind]
    values: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {**scaling, "rope_theta": 500000.0},
    }
    config = transformers.LlamaConfig(**values, num_hidden_layers=1, vocab_size=8, intermediate_size=8)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cosine, sine = rotary(torch.zeros(1), torch.arange(64)[None])
    table = build_rotary_table(configure(tiny("llama", **values), {}, "here").spec, torch.device("cpu"))
    assert torch.allclose(table[:, 0], cosine[0, :, :32], atol=1e-5)
    assert torch.allclose(table[:, 1], sine[0, :, :32], atol=1e-5)


def tiny(model_type: str, **overrides: Any) -> dict[str, Any]:
    from importlib import import_module

    return {**import_module(f"specengine.models.architectures.{model_type}").TINY, **overrides}


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type='dynamic'"),
        ("qwen2", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type='longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "needs high_freq_factor, original_max_position_embeddings",
        ),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}}, "must be below high_freq_factor"),
        ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ("llama", {"head_dim": 7}, "head_dim=7 must be even"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "not divisible by 5"),
        ("qwen3", {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(
    model_type: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=r"here: .*") as raised:
        configure(tiny(model_type, **overrides), {}, "here")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("mistral", {"sliding_window": 40}, 40),
        ("mistral", {"sliding_window": 4096}, 96),
        ("mistral", {"sliding_window": None}, 96),
        ("qwen2", {"sliding_window": 40}, 96),
        ("qwen2", {"sliding_window": 40, "use_sliding_window": True}, 40),
        ("qwen3", {"sliding_window": 40, "use_sliding_window": False}, 96),
    ],
    ids=str,
)
def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(
    model_type: str, overrides: dict[str, Any], expected: int
) -> None:
    assert configure(tiny(model_type, **overrides), {}, "here").spec.max_positions == expected


def test_up_to_its_window_a_mistral_says_what_transformers_says(
    tmp_path: Path, build_engine: EngineFactory
) -> None:
    """And a longer request is refused, with the number."""
    model = tiny_models.build_model("mistral", seed=3, sliding_window=12)
    path = tiny_models.save_checkpoint(tmp_path / "m", model)
    assert json.loads((path / "config.json").read_text())["sliding_window"] == 12
    engine = build_engine(path)
    found = plain(engine, PROMPT, max_new_tokens=3, ignore_eos=True)
    assert found.token_ids == greedy(model, PROMPT, 3)
    with pytest.raises(ValueError, match="12"):
        plain(engine, [*PROMPT, *PROMPT], max_new_tokens=3)
