"""A head that is stored in a format of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from kernel_cases import NATIVE
from law_helpers import CheckpointFactory, EngineFactory, assert_same, make_prompt, plain, spec

from specengine.kernels.types.packed import PackedLinear
from specengine.models import loader
from specengine.models.checkpoints import open_checkpoint
from specengine.weight_formats import WEIGHT_FORMATS

CPU = torch.device("cpu")


def weights_of(path: Path, **options: Any) -> Any:
    model = loader.load_model(
        open_checkpoint(path), device=CPU, backend=NATIVE, dtype=torch.float32, **options
    )
    return model.decoder.weights, model.weight_dtype


def assert_equal(found: PackedLinear, expected: PackedLinear) -> None:
    assert torch.equal(found.weight, expected.weight)
    assert (found.scale is None) == (expected.scale is None)
    assert found.scale is None or torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("head_dtype", list(WEIGHT_FORMATS))
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_alone_is_packed_so(is_tied: bool, head_dtype: str, tmp_path: Path) -> None:
    """As a model that is stored so whole has its head; the layers and the table stay as they were."""
    path = tiny_models.save_checkpoint(
        tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=is_tied
    )
    found, stored = weights_of(path, head_dtype=head_dtype)
    as_was, _ = weights_of(path)
    whole, _ = weights_of(path, weight_dtype=head_dtype)
    assert_equal(found.head, whole.head)
    for layer, other in zip(found.layers, as_was.layers, strict=True):
        assert_equal(layer.qkv, other.qkv)
        assert_equal(layer.mlp_down, other.mlp_down)
    assert torch.equal(found.token_table, as_was.token_table)
    assert stored == "+".join(sorted({"float32", head_dtype}))


def test_layers_in_8_bits_and_a_head_in_floats(tmp_path: Path) -> None:
    path = tiny_models.save_checkpoint(tmp_path / "m", "gpt2")
    found, stored = weights_of(path, weight_dtype="int8", head_dtype="float32")
    assert_equal(found.head, weights_of(path)[0].head)
    assert_equal(found.layers[0].qkv, weights_of(path, weight_dtype="int8")[0].layers[0].qkv)
    assert stored == "float32+int8"


def test_groups_that_do_not_divide_the_head_are_refused_by_name(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    path = checkpoint("gpt2", hidden_size=40, num_heads=5)
    for option in ("head_dtype", "draft_head_dtype"):
        with pytest.raises(ValueError, match=r"head_dtype='int4': .* has a head with 40 inputs"):
            build_engine(path, path, **{option: "int4"})
    build_engine(path, path, head_dtype="int8", draft_head_dtype="int8")


@pytest.mark.parametrize("draft_head_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("draft", ["self:1", "model"])
def test_a_drafts_head_changes_no_text(
    draft: str, draft_head_dtype: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    model = checkpoint("llama", seed=3)
    source = checkpoint("llama", seed=3, noise=0.05) if draft == "model" else draft
    engine = build_engine(model, source, draft_head_dtype=draft_head_dtype)
    own = draft == "model" or draft_head_dtype != "auto"
    assert len(engine.weights) == (2 if own else 1)
    sampling = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": 2}
    for prompt in (make_prompt(3), make_prompt(9)):
        assert_same(spec(engine, prompt, 4, **sampling), plain(engine, prompt, **sampling))
