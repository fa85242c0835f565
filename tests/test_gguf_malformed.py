"""GGUF files that lie: one clear error each, before memory is spent on what they claim."""

from __future__ import annotations

import random
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny_models
import torch

from specengine.errors import ModelLoadError
from specengine.models.checkpoints import open_checkpoint
from specengine.models.checkpoints.gguf_header import GgufHeader, read_gguf_header
from specengine.models.loader import load_model
from specengine.ops.load import load_backend

CPU = torch.device("cpu")

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    start: bytes = b"GGUF\x03\0\0\0",
    counts: tuple[int, int] | None = None,
    body: int = 0,
) -> bytes:
    header = (
        start + struct.pack("<QQ", *(counts or (len(tensors), len(entries)))) + b"".join(entries + tensors)
    )
    return header + bytes(-len(header) % 32 + body)


ONE = tensor("a", (8,))
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "no GGUF file"),
    "another magic": (b"GGML\x03\0\0\0" + bytes(16), "no GGUF file: it begins with b'GGML'"),
    "version 1": (file_of(start=b"GGUF\x01\0\0\0"), "version 1 is not supported; known are 2 and 3"),
    "big-endian": (file_of(start=b"GGUF\0\0\0\x03"), "a big-endian GGUF file"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "2^63 tensors": (file_of(counts=(1 << 63, 0)), f"tensor count: {1 << 63} are claimed, at most 65536"),
    "2^64 - 1 keys": (
        file_of(counts=(0, (1 << 64) - 1)),
        "number of metadata keys: 18446744073709551615 are claimed",
    ),
    "a key of 2^63 bytes": (
        file_of(struct.pack("<Q", 1 << 63)),
        f"metadata key 0: a string of {1 << 63} bytes",
    ),
    "a string of 2^63 bytes": (
        file_of(entry("a", STRING, struct.pack("<Q", 1 << 63))),
        f"metadata 'a': a string of {1 << 63} bytes",
    ),
    "a string beyond the file": (
        file_of(entry("a", STRING, struct.pack("<Q", 1000))),
        "metadata 'a': 1000 bytes are claimed at",
    ),
    "a string that is no UTF-8": (file_of(entry("a", STRING, text(b"\xff\xfe"))), "metadata 'a': no UTF-8"),
    "a key that is no UTF-8": (file_of(text(b"\xc3(") + struct.pack("<II", U32, 1)), "key 0: no UTF-8"),
    "a key twice": (
        file_of(*[entry("a", U32, struct.pack("<I", 1))] * 2),
        "metadata 'a' occurs twice",
    ),
    "an unknown kind": (file_of(entry("a", 13, bytes(8))), "metadata 'a': 13 is no type of value"),
    "an array of an unknown kind": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))),
        "metadata 'a': 99 is no type of value",
    ),
    "an array of arrays of arrays": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10000)),
        "metadata 'a': an array of arrays",
    ),
    "2^61 numbers": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", U64, 1 << 61))),
        f"metadata 'a': {1 << 64} bytes are claimed",
    ),
    "2^62 strings": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 62))),
        f"metadata 'a': an array of {1 << 62} strings; all have at most",
    ),
    "a million strings that are not there": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 20))),
        r"metadata 'a'\[\d+\]: 8 bytes are claimed",
    ),
    "a string of an array that is no UTF-8": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("b") + text(b"\xff"))),
        r"metadata 'a'\[1\]: no UTF-8",
    ),
    "a string of an array beyond the file": (
        file_of(entry("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("b") + struct.pack("<Q", 1 << 63))),
        r"metadata 'a'\[1\]: a string of 9223372036854775808 bytes",
    ),
    "an alignment of 24": (
        file_of(entry("general.alignment", U32, struct.pack("<I", 24)), tensors=(ONE,), body=64),
        "'general.alignment': 24 is no power of two",
    ),
    "no alignment": (
        file_of(entry("general.alignment", U32, struct.pack("<I", 0))),
        "'general.alignment': 0 is no power of two",
    ),
    "an alignment in words": (
        file_of(entry("general.alignment", STRING, text("32"))),
        "'general.alignment': '32' is no power of two",
    ),
    "an enormous alignment": (
        file_of(entry("general.alignment", U64, struct.pack("<Q", 1 << 40))),
        "is no power of two up to 65536",
    ),
    "a tensor twice": (file_of(tensors=(ONE, ONE), body=64), "tensor 'a' occurs twice"),
    "a tensor's name of 2^62 bytes": (
        file_of(tensors=(struct.pack("<Q", 1 << 62),)),
        "name of tensor 0: a string of",
    ),
    "no dimensions": (file_of(tensors=(tensor("a", ()),)), "tensor 'a': 0 dimensions"),
    "a million dimensions": (
        file_of(tensors=(text("a") + struct.pack("<I", 10**6),)),
        "tensor 'a': 1000000 dimensions",
    ),
    "an empty dimension": (file_of(tensors=(tensor("a", (8, 0)),)), r"tensor 'a': \[8, 0\] are no sizes"),
    "dimensions beyond any number": (
        file_of(tensors=(tensor("a", (1 << 61, 1 << 61, 1 << 61)),), body=64),
        "tensor 'a': shape .* takes",
    ),
    "an unknown type": (file_of(tensors=(tensor("a", (8,), 77),)), "tensor 'a': 77 is no type of tensor"),
    "a row of half a block": (
        file_of(tensors=(tensor("a", (48, 2), 2),), body=64),
        "tensor 'a': rows of 48 are no multiple of the 32 in a block of Q4_0",
    ),
    "a tensor beyond the file": (
        file_of(tensors=(tensor("a", (8,), offset=32),), body=32),
        "tensor 'a': shape .* truncated or malformed",
    ),
    "an offset of 2^63": (
        file_of(tensors=(tensor("a", (8,), offset=1 << 63),), body=32),
        "tensor 'a': shape",
    ),
    "an offset between": (
        file_of(tensors=(tensor("a", (8,), offset=4),), body=64),
        "tensor 'a': offset 4 is no multiple of the alignment 32",
    ),
    "tensors that overlap": (
        file_of(tensors=(tensor("a", (16,)), tensor("b", (8,), offset=32)), body=64),
        "tensor 'b' overlaps 'a'",
    ),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_lies_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = BAD_HEADERS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError, match=rf"m\.gguf.*: .*{message}"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(ModelLoadError, match=r"nowhere\.gguf: No such file"):
        _ = open_checkpoint(tmp_path / "nowhere.gguf").spec
    with pytest.raises(ModelLoadError, match=r"dir\.gguf/config\.json: no such file"):
        _ = open_checkpoint(tmp_path / "dir.gguf").spec
    (tmp_path / "m.bin").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"m\.bin: is a file; give the directory .* or a \.gguf file"):
        open_checkpoint(tmp_path / "m.bin")


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        file_of(
            entry("u", U32, struct.pack("<I", 7)),
            entry("i", I32, struct.pack("<i", -7)),
            entry("f", F32, struct.pack("<f", 0.5)),
            entry("b", BOOL, b"\x01"),
            entry("s", STRING, text("é")),
            entry("n", ARRAY, struct.pack("<IQ3i", I32, 3, 1, -2, 3)),
            entry("t", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
            tensors=(tensor("w", (4, 2), 1),),
            body=16,
        )
    )
    header = read_gguf_header(path)
    values = dict(header.metadata)
    assert values.pop("n").tolist() == [1, -2, 3]
    assert values == {"u": 7, "i": -7, "f": 0.5, "b": True, "s": "é", "t": ("a", "")}
    assert (header.tensors["w"].type, header.tensors["w"].shape) == ("F16", (2, 4))


# --- a whole model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_models.build_tokenizer(300)
    model = tiny_models.build_model("llama", vocab_size=300, num_layers=1, intermediate_size=64)
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    return gguf_files.write_gguf(path, model, "Q4_1", tokenizer=tokenizer)


def read_all(path: Path) -> None:
    """Everything that an engine asks for."""
    checkpoint = open_checkpoint(path)
    _ = checkpoint.chat_template, checkpoint.generation_defaults
    load_model(checkpoint, dtype=torch.float32, device=CPU, backend=load_backend("reference", CPU))


def test_a_file_that_ends_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    """At every byte of the header's ends, and many between."""
    content = whole.read_bytes()
    header: GgufHeader = read_gguf_header(whole)
    start = min(each.start for each in header.tensors.values())
    end = max(each.stop for each in header.tensors.values())
    cuts = {*range(200), *range(start - 600, start), *range(0, start, 97), *range(start, end, 4999), end - 1}
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    read_all(path)
    with path.open("r+b") as file:
        for cut in sorted(cuts, reverse=True):
            file.truncate(cut)
            with pytest.raises(ModelLoadError, match=r"m\.gguf: "):
                read_gguf_header(path)


def test_a_file_that_changes_while_it_is_read_is_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.read_bytes())
    source = open_checkpoint(path).tensors
    names = list(source.tensors)
    source.load(names[0])
    path.write_bytes(whole.read_bytes()[:-4096])
    last = max(names, key=lambda name: source._stored[name].stop)  # type: ignore[attr-defined]
    with pytest.raises(ModelLoadError, match=r"m\.gguf: has changed since its header was read"):
        source.load(last)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"m\.gguf: has changed since its header was read"):
        source.load(names[0])


# What a file says, and what is said about it. `None` leaves a key out.
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    (
        {"general.architecture": "mamba"},
        "'general.architecture': 'mamba' is not supported; known are llama, qwen2",
    ),
    ({"general.architecture": 7}, "'general.architecture': 7 is no str"),
    ({"general.architecture": None}, "'general.architecture' is missing"),
    ({"general.type": "adapter"}, "'general.type': 'adapter' is no model"),
    ({"split.count": 3}, "'split.count': the model is split into 3 files"),
    ({"llama.expert_count": 8}, "'llama.expert_count': mixtures of experts are not supported"),
    ({"llama.block_count": None}, "'llama.block_count' is missing"),
    ({"llama.block_count": "two"}, "'llama.block_count': 'two' is no int"),
    ({"llama.block_count": True}, "'llama.block_count': True is no int"),
    ({"llama.block_count": 2000}, "num_hidden_layers=2000: Input should be less than or equal to 1024"),
    ({"llama.block_count": 2}, r"layers\.1\.self_attn\.q_proj\.weight of shape \[32, 32\] is missing"),
    ({"llama.embedding_length": 64}, "expected shape .* by the config"),
    ({"llama.attention.head_count": 0}, "num_attention_heads=0"),
    ({"llama.attention.head_count_kv": 3}, "4 attention heads are no multiple of 3"),
    (
        {"llama.attention.value_length": 4},
        "'llama.attention.value_length': 4: values of another width than keys",
    ),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps=-1.0"),
    ({"llama.rope.freq_base": float("nan")}, "rope_theta=nan"),
    ({"llama.rope.dimension_count": 4}, "rope_parameters.partial_rotary_factor=0.5"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope_type='yarn'"),
    ({"llama.rope.scaling.type": "linear"}, "rope_type='linear' needs factor"),
    ({"llama.context_length": 1 << 30}, "max_position_embeddings=1073741824"),
]


def changed(whole: Path, path: Path, values: dict[str, Any]) -> Path:
    """The file with other values of some keys."""
    header = read_gguf_header(whole)
    entries = []
    for key, value in {**header.metadata, **values}.items():
        if value is None:
            continue
        if isinstance(value, tuple | list):
            kind = ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(text, value))
        elif isinstance(value, np.ndarray):
            number = F32 if value.dtype.kind == "f" else I32
            data = value.astype("<f4" if number == F32 else "<i4").tobytes()
            kind = ARRAY, struct.pack("<IQ", number, len(value)) + data
        elif isinstance(value, bool):
            kind = BOOL, bytes([value])
        elif isinstance(value, int):
            kind = U32, struct.pack("<I", value)
        elif isinstance(value, float):
            kind = F32, struct.pack("<f", value)
        else:
            kind = STRING, text(value)
        entries.append(entry(key, *kind))
    start = min(each.start for each in header.tensors.values())
    numbers = {"F32": 0, "Q4_1": 3}
    tensors = tuple(
        tensor(name, each.shape[::-1], numbers[each.type], each.start - start)
        for name, each in header.tensors.items()
    )
    path.write_bytes(file_of(*entries, tensors=tensors) + whole.read_bytes()[start:])
    return path


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=str)
def test_values_that_mean_no_model_are_refused(
    values: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=rf"m\.gguf: .*{message}"):
        read_all(changed(whole, tmp_path / "m.gguf", values))


TOKENS = "tokenizer.ggml."
BAD_TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"model": "t5"}, "'tokenizer.ggml.model': 't5' is not supported; known are gpt2, llama"),
    ({"pre": "made-up"}, "'tokenizer.ggml.pre': 'made-up' is not supported: .*known are gpt-2"),
    ({"pre": None}, "'tokenizer.ggml.pre': is missing"),
    ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
    ({"tokens": ("a", "b", "a")}, "'tokenizer.ggml.tokens': the ids 0 and 2 are the same token 'a'"),
    ({"tokens": ("a", "")}, "'tokenizer.ggml.tokens': .* an empty one"),
    ({"tokens": ("a" * 5000,)}, "'tokenizer.ggml.tokens': a token of 5000 characters"),
    ({"tokens": 7}, "'tokenizer.ggml.tokens': 7 is no array of strings"),
    (
        {"token_type": np.ones(3, np.int32)},
        "'tokenizer.ggml.token_type': not one whole number for each of 300",
    ),
    ({"token_type": np.ones(300, np.float32)}, "'tokenizer.ggml.token_type': not one whole number"),
    ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
    ({"merges": ("ab",)}, "'tokenizer.ggml.merges': 'ab' is no pair of tokens"),
    ({"merges": ("a b c",)}, "'tokenizer.ggml.merges': 'a b c' is no pair"),
    ({"merges": ("nowhere tobefound",)}, "tokenizer: .*nowhere"),
    ({"eos_token_id": 300}, "'tokenizer.ggml.eos_token_id': 300 is none of the 300 tokens"),
    ({"add_bos_token": 1}, "'tokenizer.ggml.add_bos_token': 1 is no bool"),
    ({"model": "llama"}, "'tokenizer.ggml.scores': not one number for each of 300 tokens"),
    (
        {"model": "llama", "scores": np.ones(300, np.float32), "unknown_token_id": 999},
        "unknown_token_id': 999",
    ),
]


@pytest.mark.parametrize(("values", "message"), BAD_TOKENIZERS, ids=str)
def test_values_that_mean_no_tokenizer_are_refused(
    values: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    path = changed(whole, tmp_path / "m.gguf", {TOKENS + key: value for key, value in values.items()})
    with pytest.raises(ModelLoadError, match=rf"m\.gguf: .*{message}"):
        _ = open_checkpoint(path).tokenizer


def test_a_tensor_that_means_something_else_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build_model("llama")
    for name in (
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_norm_2.weight",
        "output_norm_2.weight",
        "position_embd",
    ):
        extra = {name: np.ones(32, np.float32)}
        path = gguf_files.write_gguf(tmp_path / f"{name}.gguf", model, extra=extra)
        with pytest.raises(ModelLoadError, match=f"tensor '{name}' is none that a llama model has here"):
            _ = open_checkpoint(path).tensors


# --- fuzz ----------------------------------------------------------------------------------------------------

_EXTREMES = [
    0,
    1,
    7,
    8,
    9,
    255,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]


def mutate(content: bytes, header_size: int, chance: random.Random) -> bytes:
    """One to three changes, most of them to the header."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        limit = max(1, min(len(data), header_size if chance.random() < 0.85 else len(data)))
        at = chance.randrange(limit)
        kind = chance.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            width = chance.choice([4, 8])
            data[at : at + width] = (chance.choice(_EXTREMES) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 2:
            del data[at : len(data) if chance.random() < 0.3 else at + chance.randint(1, 64)]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.randint(1, 64))
        elif kind == 4:
            other = chance.randrange(limit)
            length = chance.randint(1, 64)
            data[at : at + length] = data[other : other + length]
        else:
            data[at] ^= 1 << chance.randrange(8)
        if not data:
            return b""
    return bytes(data)


def fuzz_gguf(whole: Path, path: Path, seeds: range) -> tuple[int, int]:
    content = whole.read_bytes()
    start = min(each.start for each in read_gguf_header(whole).tensors.values())
    return _count_refused(seeds, lambda chance: path.write_bytes(mutate(content, start, chance)), path)


def fuzz_safetensors(directory: Path, seeds: range) -> tuple[int, int]:
    """Weights, config and tokenizer in turn."""
    originals = {
        name: (directory / name).read_bytes()
        for name in ("model.safetensors", "config.json", "tokenizer.json")
    }
    sizes = {name: len(content) for name, content in originals.items()}
    sizes["model.safetensors"] = 8 + int.from_bytes(originals["model.safetensors"][:8], "little")

    def write(chance: random.Random) -> None:
        name = chance.choice(["model.safetensors"] * 3 + ["config.json", "tokenizer.json"])
        for each, content in originals.items():
            changed = mutate(content, sizes[each], chance) if each == name else content
            (directory / each).write_bytes(changed)

    return _count_refused(seeds, write, directory)


def _count_refused(seeds: range, write: Callable[[random.Random], object], path: Path) -> tuple[int, int]:
    """How many files were refused, and how many loaded: nothing else may happen, nor take memory."""
    messages: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        write(random.Random(seed))
        try:
            read_all(path)
        except ModelLoadError as error:
            messages.append(str(error))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # in KiB
    assert not [message for message in messages if "\n" in message or len(message) > 1500]
    return len(messages), len(seeds) - len(messages)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_gguf_files_load_or_are_refused(count: int, whole: Path, tmp_path: Path) -> None:
    refused, loaded = fuzz_gguf(whole, tmp_path / "m.gguf", range(count))
    assert refused > count / 3, (refused, loaded)
    assert loaded > count / 50, (refused, loaded)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_safetensors_load_or_are_refused(count: int, tmp_path: Path) -> None:
    tokenizer = tiny_models.build_tokenizer(300)
    directory = tiny_models.save_checkpoint(tmp_path / "m", "llama", tokenizer=tokenizer, num_layers=1)
    refused, loaded = fuzz_safetensors(directory, range(count))
    assert refused > count / 3, (refused, loaded)
    assert loaded > count / 50, (refused, loaded)
