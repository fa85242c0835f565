"""Weights by group from a checkpoint to a decoder: joined row by row, kept as they are stored, or rounded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from specengine import Engine
from specengine.kernels.reference import quantize_groups
from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.kernels.types.program import ForwardBatch
from specengine.models import loader
from specengine.models.architecture import LinearTensors
from specengine.models.checkpoints import Checkpoint, open_checkpoint
from specengine.models.checkpoints.tensors import StateDictSource
from specengine.models.stacking import interleave, stacked
from specengine.ops.load import load_backend
from specengine.translation import Translation
from specengine.weight_formats import GROUPED_FORMATS, INT4, INT4_MIN, INT8_GROUP, WeightFormat

CPU = torch.device("cpu")
NATIVE = load_backend("native", CPU)


def grouped(format: WeightFormat, seed: int = 0, size: tuple[int, int] = (6, 64)) -> GroupedWeight:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return quantize_groups(weight, bits=format.bits, has_minimum=format.has_minimum)


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ((INT4, INT4), INT4),
        ((INT4_MIN, INT4_MIN), INT4_MIN),
        ((INT4, INT4_MIN), INT4_MIN),
        ((INT8_GROUP, INT4), INT8_GROUP),
    ],
    ids=str,
)
def test_what_is_joined_without_loss_is_the_same_numbers(
    formats: tuple[WeightFormat, ...], expected: WeightFormat
) -> None:
    parts = [grouped(format, seed) for seed, format in enumerate(formats)]
    numbers = [part.dequantize() for part in parts]
    joined = stacked([LinearTensors(part, torch.ones(6)) for part in parts])
    turned = interleave(*parts)
    for weight, meant in (
        (joined.weight, torch.cat(numbers)),
        (turned, torch.stack(numbers, 1).flatten(0, 1)),
    ):
        assert isinstance(weight, GroupedWeight)
        assert weight.format == expected
        assert torch.equal(weight.dequantize(), meant)
    assert torch.equal(joined.bias, torch.ones(12))


def test_what_no_format_holds_is_rounded_with_a_warning_or_becomes_floats() -> None:
    eight, above = grouped(INT8_GROUP), grouped(INT4_MIN, 1)
    with pytest.warns(
        UserWarning, match="int4_min, int8_group belong into one matrix: .* rounded to int8_group"
    ):
        joined = interleave(eight, above)
    assert joined.format == INT8_GROUP
    assert torch.equal(joined.dequantize()[::2], eight.dequantize())
    assert (
        joined.dequantize()[1::2] - above.dequantize()
    ).abs().max() <= above.dequantize().abs().max() / 254 * 1.01
    huge = replace(grouped(INT4), scale=torch.full((6, 2), 60000.0, dtype=torch.float16))
    with pytest.warns(UserWarning, match="int4, int4_min belong into one matrix"):
        assert interleave(huge, above).dequantize().isfinite().all()
    floats = torch.randn(6, 64)
    assert torch.equal(interleave(eight, floats)[1::2], floats)


class _Stored:
    """A tensor source that has matrices by group, in formats that take turns; the table in 8 bits, as GGUF files do."""

    def __init__(self, source, formats: tuple[WeightFormat, ...]) -> None:
        self.origin, self.tensors = source.origin, source.tensors
        self._source = source
        matrices = [name for name, info in source.tensors.items() if len(info.shape) == 2]
        self.formats = {name: formats[index % len(formats)] for index, name in enumerate(matrices)}
        for name in matrices:
            if "embed" in name:
                self.formats[name] = INT8_GROUP

    def load(self, name: str) -> Tensor | GroupedWeight:
        tensor = self._source.load(name)
        if name not in self.formats:
            return tensor
        format = self.formats[name]
        return quantize_groups(tensor, bits=format.bits, has_minimum=format.has_minimum)


def stored_by_group(path: Path, *formats: WeightFormat) -> list[Checkpoint]:
    """The checkpoint so, and the one that holds as floats what its weights by group mean."""
    given, meant = open_checkpoint(path), open_checkpoint(path)
    by_group = _Stored(given.tensors, formats)
    floats = StateDictSource({name: numbers(by_group.load(name)) for name in by_group.tensors}, "floats")
    vars(given)["tensors"], vars(meant)["tensors"] = by_group, floats
    return [given, meant]


def logits_of(checkpoint: Checkpoint, **options: Any) -> tuple[Tensor, loader.LoadedModel]:
    """Of the tokens 1 … 9."""
    model = loader.load_model(checkpoint, device=CPU, backend=NATIVE, **options)
    spec, dtype = model.decoder.spec, model.decoder.weights.token_table.dtype
    cache = torch.zeros(spec.num_layers, 2, 1, spec.num_kv_heads, 16, spec.head_dim, dtype=dtype)
    count = torch.arange(9, dtype=torch.int32)
    batch = ForwardBatch(
        token_ids=count + 1,
        positions=count,
        kv_slots=count.long(),
        q_start=torch.tensor([0, 9], dtype=torch.int32),
        context_len=torch.tensor([9], dtype=torch.int32),
        slots=torch.zeros(1, dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        logit_rows=count.long(),
    )
    return model.decoder.forward(batch, cache, spec.vocab_size), model


def assert_near(logits: Tensor, expected: Tensor) -> None:
    """As near as the rounding of rows that meet weights by group allows."""
    assert torch.equal(logits.isinf(), expected.isinf())
    assert (logits - expected).nan_to_num(0.0).abs().max() < 1e-4


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_stored_by_group_is_that_of_the_floats_that_it_means(is_tied: bool, tmp_path: Path) -> None:
    """q, k, v and gate, up in formats that differ, the table in 8 bits: the head of a tied one stays so, the table
    is of `dtype`."""
    path = tiny_models.save_checkpoint(
        tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=is_tied
    )
    given, meant = stored_by_group(path, INT4, INT4_MIN)
    (logits, model), (expected, _) = (logits_of(each, dtype=torch.float32) for each in (given, meant))
    assert_near(logits, expected)
    assert ("int8_group" in model.weight_dtype) == is_tied
    assert "int4_min" in model.weight_dtype
    assert model.decoder.weights.token_table.dtype == torch.float32
    assert all(layer.qkv.weight.dtype == torch.uint8 for layer in model.decoder.weights.layers)
    rounded, model = logits_of(given, dtype=torch.float32, weight_dtype="int4_min")
    assert model.weight_dtype == "int4_min"
    assert (rounded - expected).nan_to_num(0.0).abs().max() > 1e-3


@pytest.mark.parametrize("format", [INT4, INT8_GROUP], ids=lambda format: format.name)
def test_another_vocabulary_takes_rows_of_a_head_by_group(format: WeightFormat, tmp_path: Path) -> None:
    path = tiny_models.save_checkpoint(
        tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True
    )
    given, meant = stored_by_group(path, format)
    vocab_size = given.spec.vocab_size
    translation = Translation((None, *reversed(range(1, vocab_size))), {0: (1, 2)})
    results = [logits_of(each, dtype=torch.float32, translation=translation) for each in (given, meant)]
    assert_near(results[0][0], results[1][0])
    assert results[0][1].decoder.weights.head.weight.dtype == torch.uint8


def test_floats_are_rounded_layer_by_layer_to_what_the_reference_says(tmp_path: Path) -> None:
    path = tiny_models.save_checkpoint(tmp_path / "m", "qwen2", hidden_size=64, intermediate_size=96)
    source = open_checkpoint(path).tensors
    for format in GROUPED_FORMATS:
        state = {}
        for name in source.tensors:
            tensor = source.load(name)
            is_linear = tensor.dim() == 2 and ("embed" not in name or "lm_head.weight" not in source.tensors)
            options = {"bits": format.bits, "has_minimum": format.has_minimum}
            state[name] = quantize_groups(tensor, **options).dequantize() if is_linear else tensor
        if "lm_head.weight" not in source.tensors:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
            state["model.embed_tokens.weight"] = source.load("model.embed_tokens.weight")
        meant = open_checkpoint(path)
        vars(meant)["tensors"] = StateDictSource(state, "floats")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the head differs from the table
            expected, _ = logits_of(meant, dtype=torch.float32)
        given, model = logits_of(open_checkpoint(path), dtype=torch.float32, weight_dtype=format.name)
        assert_near(given, expected)
        assert model.weight_dtype == format.name


def test_widths_that_are_no_whole_groups_are_refused_by_name(tmp_path: Path) -> None:
    path = tiny_models.save_checkpoint(tmp_path / "m", "llama", hidden_size=64, intermediate_size=100)
    for options in ({"weight_dtype": "int4"}, {"draft_model": str(path), "draft_weight_dtype": "int8_group"}):
        with pytest.raises(ValueError, match=r"weight_dtype='int.*': .*m has linear layers with 100 inputs"):
            Engine(str(path), **options)
