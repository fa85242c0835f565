"""A checkpoint is somebody else's file: what is malformed, unsafe or unsupported is refused by file and field."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from specengine.config import WEIGHT_DTYPE_NAMES
from specengine.errors import ModelLoadError
from specengine.models import loader
from specengine.models.architectures import gpt2
from specengine.models.checkpoints import directory as directories
from specengine.models.checkpoints import open_checkpoint, shards
from specengine.models.checkpoints.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header
from specengine.models.checkpoints.tensors import SafetensorsSource
from specengine.models.decoder import DecoderSpec
from specengine.models.loader import choose_dtype, load_model
from specengine.models.registry import ARCHITECTURES
from specengine.ops.load import load_backend
from specengine.weight_formats import WEIGHT_FORMATS

CPU = torch.device("cpu")
REFERENCE = load_backend("reference", CPU)


def load(source: object, **options: Any) -> loader.LoadedModel:
    opening = {name: options.pop(name) for name in ("revision", "allow_pickle") if name in options}
    checkpoint = open_checkpoint(source, **opening)
    return load_model(checkpoint, **{"dtype": torch.float32, "device": CPU, "backend": REFERENCE, **options})


def read_spec(source: Any) -> DecoderSpec:
    return open_checkpoint(source).spec


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    for model_type in tiny_models.MODEL_TYPES:
        tiny_models.save_checkpoint(root / model_type, model_type)
    tiny_models.save_checkpoint(root / "sharded", "gpt2", max_shard_size=20_000)
    return root


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fresh copy of a checkpoint, its config changed by keyword arguments."""

    def copy(name: str = "gpt2", **changes: object) -> Path:
        directory = Path(shutil.copytree(pristine / name, tmp_path / name))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        return directory

    return copy


# --- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
def test_every_architecture_is_one_file_that_says_its_own_name(model_type: str, pristine: Path) -> None:
    checkpoint = open_checkpoint(pristine / model_type)
    spec, name = checkpoint.spec, checkpoint.name
    assert spec == load(pristine / model_type).decoder.spec
    assert spec == read_spec(tiny_models.build_model(model_type))
    assert spec.architecture == model_type == ARCHITECTURES[model_type].rsplit(".", 1)[1]
    assert name == str(pristine / model_type)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"n_embd": 0}, "n_embd=0"),
        ("gpt2", {"n_embd": -1}, "n_embd=-1"),
        ("gpt2", {"n_embd": 10**9}, "n_embd=1000000000"),
        ("gpt2", {"n_embd": 10**400}, "n_embd=1000"),
        ("gpt2", {"n_embd": "32"}, "n_embd='32'"),
        ("gpt2", {"n_embd": True}, "n_embd=True"),
        ("gpt2", {"n_embd": None}, "n_embd=None"),
        ("gpt2", {"n_embd": 32.5}, r"n_embd=32\.5"),
        ("gpt2", {"n_head": 3}, "32 is not divisible by 3"),
        ("gpt2", {"n_layer": 0}, "n_layer=0"),
        ("gpt2", {"n_layer": 10**9}, "n_layer=1000000000"),
        ("gpt2", {"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ("gpt2", {"n_positions": 2**31}, "n_positions=2147483648"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
        ("gpt2", {"activation_function": "silu"}, "activation_function='silu'.*gelu_new"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ("gpt2", {"bos_token_id": "end"}, "bos_token_id='end'"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported.*hidden_size=32"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("opt", {"hidden_size": -1}, "hidden_size=-1"),
        ("opt", {"num_attention_heads": 5}, "32 is not divisible by 5"),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear'"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'"),
        ("gpt_neox", {"rope_parameters": {"factor": 2.0}}, r"rope_parameters.factor=2\.0"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "0 of 8 features"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "3 of 8 features"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, r"partial_rotary_factor=1\.5"),
        ("gpt_neox", {"head_dim": 16}, "head_dim=16"),
        ("gpt_neox", {"hidden_size": 0}, "hidden_size=0"),
        ("gpt2", {"model_type": "mamba"}, "model_type='mamba' is not supported; known are gpt2"),
        ("gpt2", {"model_type": None}, "model_type=None"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type="),
        ("gpt2", {"model_type": "os"}, "model_type='os'"),
    ],
)
def test_what_a_config_must_not_say(checkpoint, model_type: str, changes: dict, message: str) -> None:
    directory = checkpoint(model_type, **changes)
    for read in (read_spec, load):
        with pytest.raises(ModelLoadError, match=message) as caught:
            read(directory)
        assert str(directory / "config.json") in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b'"gpt2"',
        b"null",
        b'{"model_type": "gpt2", "vocab_size": NaN}',
        b'{"model_type": "gpt2", "vocab_size": 1e400}',
        b'{"model_type": "gpt2", "vocab_size": ' + b"9" * 5000 + b"}",
        b'{"model_type": "gpt2", "model_type": "opt"}',
        b'{"model_type": "gpt2"}',
        b'{"model_type": "\xff"}',
        b"[" * 100_000,
        b" " * (directories.MAX_CONFIG_BYTES + 1),
    ],
    ids=range(13),
)
def test_a_config_that_is_no_config(checkpoint, content: bytes) -> None:
    directory = checkpoint()
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(directory)


def test_keys_that_mean_nothing_here_are_ignored_and_code_is_never_fetched(checkpoint) -> None:
    directory = checkpoint(
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        trust_remote_code=True,
        architectures=["Evil"],
        resid_pdrop=0.9,
        unheard_of={"a": [1]},
    )
    (directory / "modeling_evil.py").write_text(f"open({str(directory / 'executed')!r}, 'w')")
    load(directory)
    assert not (directory / "executed").exists()


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "expected"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (5, 7, (7,)),
        (5, [7, 5, 7], (7, 5)),
        (None, None, ()),
        (50256, None, ()),
        (-1, None, ()),
    ],
)
def test_ids_that_end_a_text(checkpoint, config_ids, generation_ids, expected: tuple[int, ...]) -> None:
    directory = checkpoint(eos_token_id=config_ids, bos_token_id=9)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_ids}))
    spec = read_spec(directory)
    assert (spec.bos_token_id, spec.eos_token_ids) == (9, expected)


# --- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"n_embd": 64}, r"transformer\.wte\.weight: expected shape \[64, 64\] .* found \[64, 32\]"),
        ("gpt2", {"n_positions": 97}, r"transformer\.wpe\.weight: expected shape \[97, 32\]"),
        ("gpt2", {"n_inner": 100}, r"transformer\.h\.0\.mlp\.c_fc\.weight: expected shape \[32, 100\]"),
        (
            "gpt2",
            {"n_layer": 3},
            r"transformer\.h\.2\.ln_1\.weight or h\.2\.ln_1\.weight of shape \[32\] is missing",
        ),
        ("gpt2", {"tie_word_embeddings": False}, r" lm_head\.weight of shape \[64, 32\] is missing"),
        ("gpt2", {"vocab_size": 65}, r"transformer\.wte\.weight: expected shape \[65, 32\]"),
        ("opt", {"max_position_embeddings": 98}, r"embed_positions\.weight: expected shape \[100, 32\]"),
        ("gpt_neox", {"intermediate_size": 65}, r"dense_h_to_4h\.bias: expected shape \[65\]"),
        ("gpt2", {"n_layer": 1000, "n_embd": 200_000}, r"wte\.weight: expected shape \[64, 200000\]"),
    ],
)
def test_every_shape_is_checked_before_anything_is_loaded(
    checkpoint, name: str, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsSource, "load", _must_not_be_called)
    with pytest.raises(ModelLoadError, match=message):
        load(checkpoint(name, **changes))


def _must_not_be_called(*_: object) -> None:
    raise AssertionError("a tensor was loaded")


def test_a_weight_that_is_no_float_is_refused(checkpoint) -> None:
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.h.1.ln_2.bias"] = torch.zeros(32, dtype=torch.int64)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"h\.1\.ln_2\.bias is not stored as"):
        load(directory)


def test_tensors_that_nobody_asked_for_are_ignored(checkpoint) -> None:
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.bool)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, directory / "model.safetensors")
    load(directory)


def test_float16_refuses_weights_beyond_its_range(checkpoint) -> None:
    directory = checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] = 1e6
    save_file(tensors, directory / "model.safetensors")
    load(directory, dtype=torch.bfloat16)
    with pytest.raises(ModelLoadError, match="float16: a weight is beyond its range"):
        load(directory, dtype=torch.float16)


def test_progress_counts_every_byte_once(checkpoint) -> None:
    calls: list[tuple[int, int]] = []
    directory = checkpoint("sharded")
    load(directory, progress=lambda done, total: calls.append((done, total)))
    sizes = [tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]
    assert [total for _, total in calls] == [sum(sizes)] * len(sizes)
    assert sorted(done for done, _ in calls) == [done for done, _ in calls]
    assert calls[-1][0] == sum(sizes)


def test_no_more_than_one_layer_is_held_twice(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[torch.Tensor]] = []
    num_alive: list[int] = []
    original = SafetensorsSource.load

    def load_and_watch(source: SafetensorsSource, name: str) -> torch.Tensor:
        tensor = original(source, name)
        loaded.append(weakref.ref(tensor))
        num_alive.append(sum(reference() is not None for reference in loaded))
        return tensor

    monkeypatch.setattr(SafetensorsSource, "load", load_and_watch)
    model = load(pristine / "gpt2")
    assert len(loaded) == 4 + 12 * model.decoder.spec.num_layers
    assert max(num_alive) <= 12
    assert not any(reference() is not None for reference in loaded)


# --- safetensors headers -------------------------------------------------------------------------------------


def write_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(
    shape: object, start: object, stop: object, dtype: object = "F32", **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


BAD_HEADERS = {
    "empty file": (b"", None, "truncated"),
    "length beyond the file": ({"a": entry([1], 0, 4)}, 10**9, "header claims 1000000000 bytes"),
    "length beyond 64 bits of sense": ({"a": entry([1], 0, 4)}, 2**64 - 1, "header claims"),
    "length zero": ({"a": entry([1], 0, 4)}, 0, "header claims 0 bytes"),
    "length inside the header": ({"a": entry([1], 0, 4)}, 20, "not valid JSON"),
    "not JSON": (b"{nonsense", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', None, "not valid JSON"),
    "a list": ([1, 2], None, "expected a JSON object"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        None,
        "'a' occurs twice",
    ),
    "entry no object": ({"a": 7}, None, "expected dtype, shape and data_offsets, found 7"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, None, "expected dtype, shape"),
    "entry with more": ({"a": entry([1], 0, 4, code="x")}, None, "expected dtype, shape"),
    "unknown dtype": ({"a": entry([1], 0, 4, dtype="F31")}, None, "unknown dtype 'F31'"),
    "dtype no string": ({"a": entry([1], 0, 4, dtype=["F32"])}, None, "unknown dtype"),
    "offsets outside the file": ({"a": entry([2], 0, 8)}, None, "tensors take 8 bytes, the file has 4"),
    "offsets far outside": ({"a": entry([10**12], 0, 4 * 10**12)}, None, "tensors take 4000000000000 bytes"),
    "offsets backwards": ({"a": entry([1], 4, 0)}, None, "are no span"),
    "offsets negative": ({"a": entry([1], -4, 0)}, None, "are no span"),
    "offsets floats": ({"a": entry([1], 0.0, 4.0)}, None, "are no span"),
    "offsets booleans": ({"a": entry([1], False, 4)}, None, "are no span"),
    "offsets not starting at 0": ({"a": entry([0], 4, 4)}, None, "leaves a gap"),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, None, "overlaps"),
    "partial overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, None, "overlaps"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, None, "leaves a gap"),
    "padded": ({}, None, "tensors take 0 bytes, the file has 4"),
    "shape contradicts size": ({"a": entry([3], 0, 4)}, None, "contradicts data_offsets of 4 bytes"),
    "shape huge": ({"a": entry([2**40, 2**40], 0, 4)}, None, "contradicts data_offsets"),
    "shape beyond 62 bits": ({"a": entry([2**70, 0], 0, 0)}, None, "no list of sizes"),
    "shape negative": ({"a": entry([-1, -1], 0, 4)}, None, "no list of sizes"),
    "shape of 100 dimensions": ({"a": entry([1] * 100, 0, 4)}, None, "no list of sizes"),
    "shape no list": ({"a": entry(1, 0, 4)}, None, "no list of sizes"),
    "deeply nested": (b'{"a":' * 50_000, None, "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_safetensors_are_refused(checkpoint, case: str) -> None:
    header, length, message = BAD_HEADERS[case]
    directory = checkpoint()
    path = directory / "model.safetensors"
    if case == "empty file":
        path.write_bytes(b"")
    else:
        write_safetensors(path, header, b"\0\0\0\0", length)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(directory)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_of_more_than_the_limit_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(ModelLoadError, match="header claims"):
        read_safetensors_header(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 0.999999])
def test_a_truncated_file_is_refused(checkpoint, share: float) -> None:
    directory = checkpoint()
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load(directory)


def test_a_pipe_in_the_place_of_a_file_does_not_block(checkpoint) -> None:
    directory = checkpoint()
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(ModelLoadError, match=name):
            load(directory)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2200), value=st.binary(min_size=1, max_size=3))
def test_a_header_with_any_bytes_changed_loads_or_is_refused(
    pristine: Path, tmp_path: Path, position: int, value: bytes
) -> None:
    directory = tmp_path / "damaged"
    if not directory.exists():
        shutil.copytree(pristine / "gpt2", directory)
    content = bytearray((pristine / "gpt2" / "model.safetensors").read_bytes())
    content[position : position + len(value)] = value
    (directory / "model.safetensors").write_bytes(content)
    with contextlib.suppress(ModelLoadError):
        load(directory)


# --- shards --------------------------------------------------------------------------------------------------


def edit_index(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../gpt2/model.safetensors",
        "/etc/passwd",
        "..",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "model.bin",
        "",
        "a\0.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_nothing_but_files_of_its_directory(checkpoint, file: object) -> None:
    checkpoint()
    directory = checkpoint("sharded")
    edit_index(directory, lambda index: index["weight_map"].update({"transformer.wte.weight": file}))
    with pytest.raises(ModelLoadError, match=r"index\.json: weight_map"):
        load(directory)


def move_shards(directory: Path, folder: Path) -> Path:
    """The shards in another folder, and links to them in their place."""
    folder.mkdir(parents=True)
    for path in directory.glob("model-*.safetensors"):
        path.rename(folder / path.name)
        path.symlink_to(folder / path.name)
    return directory


@pytest.mark.parametrize("is_relative", [True, False])
def test_shards_may_be_links_into_a_sibling_folder(checkpoint, tmp_path: Path, is_relative: bool) -> None:
    directory = move_shards(checkpoint("sharded"), tmp_path / "store" / "of" / "shards")
    if is_relative:
        for path in directory.glob("model-*.safetensors"):
            path.unlink()
            path.symlink_to(Path("../store/of/shards") / path.name)
    load(directory)
    # Also where the directory itself is named by a link from elsewhere.
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "named").symlink_to(directory)
    load(tmp_path / "far" / "named")


def test_a_link_that_leaves_what_the_user_named_is_refused(checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("sharded")
    nested = tmp_path / "models" / "sharded"
    nested.parent.mkdir()
    directory.rename(nested)
    move_shards(nested, tmp_path / "outside")
    with pytest.raises(
        ModelLoadError, match=r"index\.json: weight_map: .* links to .*outside.*copy the file"
    ):
        load(nested)
    # At the root of the file system everything would be a sibling.
    assert shards._roots(Path("/model")) == [Path("/model")]


def test_links_within_the_cache_of_the_hub_are_followed(checkpoint, tmp_path: Path) -> None:
    source = checkpoint("sharded")
    snapshot = tmp_path / "models--some--one" / "snapshots" / "0123"
    blobs = tmp_path / "models--some--one" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(source.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    load(snapshot)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_map(checkpoint, weight_map: object) -> None:
    directory = checkpoint("sharded")
    edit_index(directory, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(ModelLoadError, match=r"index\.json: weight_map"):
        load(directory)


def test_a_missing_shard_and_a_tensor_in_two_shards(checkpoint) -> None:
    directory = checkpoint("sharded")
    files = sorted(directory.glob("model-*.safetensors"))
    shutil.copy(files[0], files[1])
    with pytest.raises(ModelLoadError, match="is in two shards"):
        load(directory)
    files[1].unlink()
    with pytest.raises(ModelLoadError, match=files[1].name):
        load(directory)


# --- pickles -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.trace),))


def to_pickle(directory: Path, **more: object) -> Path:
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({**state, **more}, directory / "pytorch_model.bin")
    return directory


def test_a_pickle_is_read_only_when_asked_for(checkpoint, pristine: Path) -> None:
    directory = to_pickle(checkpoint(), step=3)
    with pytest.raises(ModelLoadError, match="allow_pickle=True"):
        load(directory)
    table = load(directory, allow_pickle=True).decoder.weights.token_table
    assert torch.equal(table, load(pristine / "gpt2").decoder.weights.token_table)


def test_sharded_pickles_are_read_and_their_index_is_checked_too(checkpoint, pristine: Path) -> None:
    directory = to_pickle(checkpoint())
    state = torch.load(directory / "pytorch_model.bin", weights_only=True)
    (directory / "pytorch_model.bin").unlink()
    names = list(state)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in part}, directory / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(names)}
    index_path = directory / "pytorch_model.bin.index.json"
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    load(directory, allow_pickle=True)
    index_path.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../evil.bin"}}))
    with pytest.raises(ModelLoadError, match="weight_map"):
        load(directory, allow_pickle=True)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_malicious_pickle_never_executes(
    checkpoint, tmp_path: Path, allow_pickle: bool, is_plain: bool
) -> None:
    directory, trace = checkpoint(), tmp_path / "executed"
    to_pickle(directory, bomb=Bomb(trace))
    if is_plain:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"bomb": Bomb(trace)}, protocol=2))
    with pytest.raises(
        ModelLoadError, match="allow_pickle=True" if not allow_pickle else "weights_only=True"
    ):
        load(directory, allow_pickle=allow_pickle)
    assert not trace.exists()
    # The bomb is real.
    with contextlib.suppress(RuntimeError):
        torch.load(directory / "pytorch_model.bin", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, pickle.dumps([1], protocol=2), pickle.dumps({1: 2}, protocol=2)]
)
def test_a_pickle_that_is_no_state_dict(checkpoint, content: bytes) -> None:
    directory = to_pickle(checkpoint())
    (directory / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin"):
        load(directory, allow_pickle=True)


# --- sources and dtypes --------------------------------------------------------------------------------------


def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "missing", "./missing", "a/b/c", "bad name", "../up", "x\n"):
        with pytest.raises(ModelLoadError, match="no such directory"):
            load(source)
    with pytest.raises(ModelLoadError, match="is a file"):
        load("file")
    with pytest.raises(ModelLoadError, match=r"empty/config\.json: no such file"):
        load("empty")
    with pytest.raises(TypeError, match="not int"):
        load(3)
    with pytest.raises(ModelLoadError, match="Linear: a module without a transformers config"):
        load(torch.nn.Linear(1, 1))


def test_a_name_of_the_hub_is_fetched_only_where_there_is_no_directory(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def fake_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if name == "some/unknown":
            raise ConnectionError("cannot reach\nanything")
        return str(pristine / "gpt2")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    monkeypatch.chdir(tmp_path)
    loaded = load("some/gpt2", revision="v1")
    assert loaded.name == "some/gpt2"
    assert (calls[0]["name"], calls[0]["revision"]) == ("some/gpt2", "v1")
    assert not any("bin" in pattern or pattern == "*" for pattern in calls[1]["allow_patterns"])
    assert calls[0]["allow_patterns"] == ["config.json", "generation_config.json"]
    assert [call["revision"] for call in calls] == ["v1", "v1"]
    load("some/gpt2", allow_pickle=True)
    assert "pytorch_model.bin" in calls[3]["allow_patterns"]
    checkpoint = open_checkpoint("some/gpt2")
    assert len(calls) == 4
    assert (checkpoint.name, checkpoint.spec.architecture) == ("some/gpt2", "gpt2")
    assert len(calls) == 5
    with pytest.raises(
        ModelLoadError, match=r"'some/unknown': no such directory.*ConnectionError: cannot reach"
    ):
        load("some/unknown")
    shutil.copytree(pristine / "opt", tmp_path / "some" / "gpt2")
    assert load("some/gpt2").decoder.spec.architecture == "opt"
    assert len(calls) == 6


def test_offline_the_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelLoadError, match="'nobody/nothing': no such directory, and fetching revision main"
    ):
        load("nobody/nothing")


def test_a_module_on_the_meta_device_has_no_weights_to_load() -> None:
    with pytest.raises(ModelLoadError, match="GPT2LMHeadModel"):
        load(tiny_models.build_model("gpt2").to("meta"))


def test_the_tokenizer_comes_with_the_directory_or_from_the_caller(tmp_path: Path) -> None:
    raw = tiny_models.build_tokenizer(300)
    directory = tiny_models.save_checkpoint(tmp_path / "m", "gpt2", tokenizer=raw)
    loaded = load(directory)
    assert loaded.tokenizer is not None
    assert loaded.decoder.spec.vocab_size == loaded.tokenizer.vocab_size == 300
    assert loaded.decoder.spec.eos_token_ids == (loaded.tokenizer.eos_token_id,)
    model = tiny_models.build_model("gpt2", vocab_size=300)
    assert load(model).tokenizer is None
    assert load(model, tokenizer=loaded.tokenizer).vocabulary.tokenizer is loaded.tokenizer


def test_dtypes_are_the_backends_or_an_error(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    cuda = torch.device("cuda")
    for is_native in (True, False):
        monkeypatch.setattr(loader, "has_native_bf16", lambda is_native=is_native: is_native)
        narrow = bf16 if is_native else fp32
        for stored, expected in ((bf16, narrow), (fp16, narrow), (fp32, fp32), (fp64, fp32)):
            assert choose_dtype("auto", stored, CPU, REFERENCE) == expected
    for stored, expected in ((bf16, bf16), (fp16, fp16), (fp32, fp32), (fp64, fp32)):
        assert choose_dtype("auto", stored, cuda, REFERENCE) == expected
    with pytest.raises(
        ValueError, match=r"dtype: backend='reference' does not support torch\.float64; it has"
    ):
        load(pristine / "gpt2", dtype=fp64)
    with pytest.raises(ValueError, match="dtype"):
        load(pristine / "gpt2", dtype="float99")


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_every_weight_format_is_a_weight_dtype(name: str, pristine: Path) -> None:
    assert name in WEIGHT_DTYPE_NAMES
    model = load(pristine / "gpt2", weight_dtype=name)
    weights, format = model.decoder.weights, WEIGHT_FORMATS[name]
    assert model.weight_dtype == name
    assert weights.head.weight.dtype == weights.layers[0].qkv.weight.dtype == format.dtype
    assert (weights.head.scale is not None) == format.has_scales
    assert (weights.head.minimum is not None) == format.has_minimum
    # Tables have no scales: they are in `dtype`.
    assert weights.token_table.dtype == (torch.float32 if format.has_scales else format.dtype)


def test_tiny_configs_are_quick_to_build() -> None:
    assert gpt2.spec(gpt2.Config.model_validate(gpt2.TINY)).vocab_size == 64


# --- memory ----------------------------------------------------------------------------------------------------

_LOAD_AND_WEIGH = """
import sys, torch
from specengine.models import loader
from specengine.models.checkpoints import open_checkpoint, shards
from specengine.ops.load import load_backend
from specengine.weight_formats import WEIGHT_FORMATS

def high_water_mark():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

cpu = torch.device("cpu")
options = {"dtype": torch.float32, "device": cpu, "backend": load_backend("native", cpu)}
loader.load_model(open_checkpoint(sys.argv[1]), **options)  # tiny: whatever is imported and allocated once
before = high_water_mark()
model = loader.load_model(open_checkpoint(sys.argv[2]), weight_dtype=sys.argv[3], **options)
weights = model.decoder.weights
linears = [x for layer in weights.layers for x in (layer.qkv, layer.attention_output, layer.mlp_up, layer.mlp_down)]
tensors = [weights.token_table, weights.position_table, weights.head.weight, *(x.weight for x in linears)]
print(high_water_mark() - before, sum(tensor.nbytes for tensor in tensors))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("weight_dtype", ["float32", "int8", "int4"])
def test_a_loading_model_never_has_a_second_full_copy(
    weight_dtype: str, pristine: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    large = tmp_path_factory.getbasetemp() / "large"
    if not large.exists():
        sizes = {"hidden_size": 512, "num_heads": 8, "num_layers": 24, "intermediate_size": 2048}
        tiny_models.save_checkpoint(large, tiny_models.build_model("gpt2", vocab_size=4096, **sizes))
    command = [sys.executable, "-c", _LOAD_AND_WEIGH, str(pristine / "gpt2"), str(large), weight_dtype]
    # glibc moves the size from which memory comes from the system and goes back to it: how much of what was freed it
    # keeps would depend on chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, packed = map(int, output.split())
    layer, checkpoint_bytes = 4 * 12 * 512**2, (large / "model.safetensors").stat().st_size
    assert packed > checkpoint_bytes // {"float32": 1, "int8": 4, "int4": 7.2}[weight_dtype]
    assert peak < packed + 3 * layer, f"{peak >> 20} MiB at the peak for {packed >> 20} MiB of weights"
