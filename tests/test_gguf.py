"""GGUF files as models: the same numbers as the safetensors of what they hold, or one clear error."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType
from law_helpers import assert_same, plain, spec

import specengine
import specengine.cli
from conftest import EngineFactory
from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.models.checkpoints import open_checkpoint
from specengine.models.checkpoints.gguf_header import TENSOR_TYPES
from specengine.models.checkpoints.gguf_types import CONVERTED, FLOATS, GROUPED, read_tensor
from specengine.models.describe import describe_model

MODEL_TYPES = list(gguf_files.ARCHITECTURES)
HELD = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"]
# Rows of whole blocks.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
PROMPT = [5, 9, 2, 33, 17, 21, 4, 60, 11]


def model_of(model_type: str, **overrides: Any) -> Any:
    if model_type == "qwen3":
        overrides.setdefault("head_dim", 24)
        overrides.setdefault("num_attention_heads", 4)
    return tiny_models.build_model(model_type, **{**SIZES, **overrides})


def generated(engine: specengine.Engine) -> specengine.GenerationResult:
    return plain(engine, PROMPT, max_new_tokens=10, ignore_eos=True, logprobs=1, prompt_logprobs=1)


# --- the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "type"), [*((each, "Q4_1") for each in MODEL_TYPES), *(("llama", each) for each in HELD)]
)
def test_a_file_is_the_model_of_its_numbers(
    model_type: str, type: str, tmp_path: Path, build_engine: EngineFactory
) -> None:
    """As the safetensors of the dequantised numbers: names, order of rows, config. With speculation bit for bit as
    without."""
    model = model_of(model_type, seed=3)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", model, type)
    directory = tiny_models.save_checkpoint(tmp_path / "m", gguf_files.dequantized(model, type))
    expected = generated(build_engine(directory))
    engine = build_engine(path, tmp_path / "m.gguf")
    alone = generated(engine)
    assert_same(alone, expected, has_bits=False)
    drafted = spec(engine, PROMPT, 3, max_new_tokens=10, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    assert_same(drafted, alone)


def test_a_tied_head_and_an_untied_one(tmp_path: Path, build_engine: EngineFactory) -> None:
    for is_tied in (True, False):
        model = model_of("llama", seed=1, tie_word_embeddings=is_tied)
        path = gguf_files.write_gguf(tmp_path / f"{is_tied}.gguf", model)
        assert open_checkpoint(path).spec.tie_word_embeddings is is_tied
        directory = tiny_models.save_checkpoint(tmp_path / str(is_tied), model)
        assert_same(generated(build_engine(path)), generated(build_engine(directory)))


def random_blocks(type: str, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    """Random bits, but scales of a size that weights have."""
    _, block, size = next(entry for entry in TENSOR_TYPES.values() if entry[0] == type)
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_rows, num_columns // block, size), np.uint8)
    halves = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2, "Q2_K": 2, "IQ1_M": 0, "MXFP4": 0}.get(type, 1)
    at_end = {"Q2_K": size - 4, "Q3_K": size - 2, "Q6_K": size - 2, "TQ1_0": size - 2, "TQ2_0": size - 2}
    for index in range(halves):
        scale = random.uniform(0.01, 0.05, blocks.shape[:2]).astype(np.float16)
        start = at_end.get(type, 0) + 2 * index
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    if type == "IQ1_M":  # its scale is spread over the high bits of four numbers
        blocks[..., 49:56:2] = blocks[..., 49:56:2] & 0x0F | np.array([0x00, 0x00, 0x00, 0x20], np.uint8)
    if type == "MXFP4":
        blocks[..., 0] = 120
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("type", [*GROUPED, *CONVERTED])
def test_each_type_holds_what_the_file_says(type: str) -> None:
    """Without loss, or rounded as the nearest format that there is must round."""
    packed = random_blocks(type, 6, 512)
    truth = torch.from_numpy(gguf.quants.dequantize(packed, GGMLQuantizationType[type]))
    found = read_tensor(packed.reshape(-1), type, (6, 512))
    assert isinstance(found, GroupedWeight)
    assert found.codes.min() >= (-128 if found.bits == 8 else -8 if found.minimum is None else 0)
    assert found.codes.max() <= (127 if found.bits == 8 else 7 if found.minimum is None else 15)
    held = found.dequantize()
    assert truth.abs().max() > 0
    if type in GROUPED:
        assert torch.equal(held, truth)
        return
    assert CONVERTED[type] == ("int8_group" if found.bits == 8 else "int4_min")
    groups = truth.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (held - truth).unflatten(1, (-1, 32)).abs()
    if type == "Q4_K":  # scale and minimum have 11 bits each
        steps = (15 * found.scale.float().abs() + found.minimum.float().abs()).unsqueeze(-1)  # type: ignore[union-attr]
        assert (error <= steps * 2**-11 * 1.01).all()
    else:
        assert (error <= groups * (0.5 / 127 + 2**-11)).all()


def test_every_type_that_gguf_can_read_is_read() -> None:
    names = {name for name, _, _ in TENSOR_TYPES.values()}
    for number, (name, block, size) in TENSOR_TYPES.items():
        type = GGMLQuantizationType(number)
        assert (type.name, gguf.GGML_QUANT_SIZES[type]) == (name, (block, size))
    assert names - {*FLOATS, *GROUPED, *CONVERTED} == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64"}


def test_conversions_are_said_once(tmp_path: Path) -> None:
    model = tiny_models.build_model("llama", hidden_size=256, intermediate_size=256)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", model, "Q5_1")
    source = open_checkpoint(path).tensors
    with pytest.warns(
        UserWarning, match=r"m\.gguf: weights are converted as they are loaded: Q5_1 to int8_group$"
    ):
        first = source.load("layers.0.mlp.up_proj.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = source.load("layers.0.mlp.up_proj.weight")
        assert torch.equal(numbers(again), numbers(first))
        held = open_checkpoint(gguf_files.write_gguf(tmp_path / "h.gguf", model, "Q5_0")).tensors
        held.load("layers.0.mlp.up_proj.weight")


# --- the config ----------------------------------------------------------------------------------------------


def config_of(
    path: Path, model_type: str, *, metadata: Any = None, extra: Any = None, **overrides: Any
) -> Any:
    model = model_of(model_type, **overrides)
    return open_checkpoint(gguf_files.write_gguf(path, model, metadata=metadata, extra=extra)).model.config


def llama3_factors(factor: float, features: int, theta: float) -> np.ndarray:
    """As llama.cpp's converter writes them: by how much each frequency is divided."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, features, 2) / features):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rotary_factors_are_its_scaling(factor: float, tmp_path: Path) -> None:
    values = {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    factors = llama3_factors(factor, 64, 500000.0)
    assert len(set(factors.tolist())) > 3
    config = config_of(tmp_path / "m.gguf", "llama", extra={"rope_freqs.weight": factors}, **values)
    rope = config.rope_parameters
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.rope_theta) == (1.0, 4.0, 500000.0)
    for wrong in (factors * 1.01, factors[::-1], factors[:-1], np.zeros(32), np.full(32, np.nan)):
        with pytest.raises(
            specengine.ModelLoadError, match=r"rope_freqs\.weight: rotary factors of another kind"
        ):
            config_of(tmp_path / "w.gguf", "llama", extra={"rope_freqs.weight": wrong}, **values)


def test_settings_of_the_file_become_the_config(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    older = {"llama.rope.scale_linear": 4.0}
    for number, metadata in enumerate((linear, older)):
        rope = config_of(tmp_path / f"{number}.gguf", "llama", metadata=metadata).rope_parameters
        assert (rope.kind, rope.factor) == ("linear", 4.0)
    assert config_of(tmp_path / "b.gguf", "llama", attention_bias=True, mlp_bias=True).attention_bias
    window = {"llama.attention.sliding_window": 24}
    checkpoint = open_checkpoint(
        gguf_files.write_gguf(tmp_path / "m.gguf", model_of("mistral"), metadata=window)
    )
    assert (checkpoint.spec.architecture, checkpoint.spec.max_positions) == ("mistral", 24)
    window = {"qwen2.attention.sliding_window": 24}
    checkpoint = open_checkpoint(
        gguf_files.write_gguf(tmp_path / "q.gguf", model_of("qwen2"), metadata=window)
    )
    assert checkpoint.spec.max_positions == 24


def test_every_end_of_text_that_the_file_names(tmp_path: Path) -> None:
    ends = {f"tokenizer.ggml.{role}_token_id": token for role, token in (("eos", 7), ("eot", 9), ("eom", 11))}
    path = gguf_files.write_gguf(
        tmp_path / "m.gguf", model_of("llama"), metadata={**ends, "tokenizer.ggml.bos_token_id": 3}
    )
    assert (open_checkpoint(path).spec.eos_token_ids, open_checkpoint(path).spec.bos_token_id) == (
        (7, 9, 11),
        3,
    )
    bare = open_checkpoint(gguf_files.write_gguf(tmp_path / "b.gguf", model_of("llama")))
    assert (bare.spec.eos_token_ids, bare.spec.bos_token_id) == ((), None)


# --- from the outside ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template."""
    model = model_of("llama", seed=2, vocab_size=320)
    return gguf_files.write_gguf(
        tmp_path_factory.mktemp("gguf") / "m.gguf",
        model,
        "Q4_0",
        tokenizer=tiny_models.build_tokenizer(320),
        metadata={"tokenizer.chat_template": "{{ messages }}"},
    )


def test_text_in_text_out(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library and its cache, by name and as a draft; a relative name is no name on the Hub."""
    monkeypatch.chdir(whole.parent)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True, "num_threads": 1}
    expected = specengine.generate("for item in items", model=whole, **options)
    drafted = specengine.generate("for item in items", model="m.gguf", draft_model="m.gguf", **options)
    assert expected.text
    assert drafted.token_ids == expected.token_ids
    assert drafted.metrics.speculative_decoding.num_accepted_draft_tokens > 0
    with pytest.raises(specengine.ModelLoadError, match=r"nowhere\.gguf: No such file"):
        specengine.generate("x", model="nowhere.gguf")
    assert open_checkpoint(whole).chat_template == "{{ messages }}"
    specengine.clear_cache()


def test_a_file_is_described_without_loading_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = describe_model(whole)
    assert description["file"] == str(whole)
    assert description["dtype"] == "Q4_0"
    assert description["architecture"] == "llama"
    assert description["parameters"] == sum(
        each.size for each in gguf_files.gguf_tensors(model_of("llama", vocab_size=320)).values()
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        specengine.cli.main(["models", "--model", str(whole)])
    assert "Q4_0" in capsys.readouterr().out
