"""Text to ids as `transformers` does it, ids to text without ever splitting a character, vocabularies compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from specengine.errors import ModelLoadError, VocabularyMismatchError
from specengine.models.checkpoints import tokenizer_files
from specengine.models.checkpoints.tokenizer_files import find_tokenizer, read_tokenizer
from specengine.tokenizer import (
    IncrementalDetokenizer,
    Tokenizer,
    Vocabulary,
    check_compatible,
    num_usable_ids,
)

END = tiny_models.END_OF_TEXT
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "naïve café Straße",
    "你好，世界！ こんにちは",
    "🙂🚀👩‍👩‍👧‍👦 flags 🇫🇷",
    "combining e\u0301 a\u0308\u0323 ק\u05b8",
    "a real \ufffd in the text, \ufffd\ufffd\ufffd\ufffd and at its end \ufffd",
    f"{END}in the{END} middle{END}",
    "",
    " leading and trailing  ",
]

RAW = tiny_models.build_tokenizer(320)
TOKENIZER = Tokenizer(RAW, eos_token=END)


def _ids_of_bytes() -> dict[int, int]:
    """The id of each single byte, from characters whose UTF-8 the tokenizer spells out: GPT-2's printable alias."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alias = {
        **{value: chr(value) for value in printable},
        **{value: chr(256 + i) for i, value in enumerate(others)},
    }
    return {value: RAW.token_to_id(character) for value, character in alias.items()}


ID_OF_BYTE = _ids_of_bytes()
# Characters of two to four bytes cut off after each of their bytes, and whole.
PIECES = [
    [ID_OF_BYTE[value] for value in character.encode()[:count]]
    for character in "é世🙂"
    for count in range(1, len(character.encode()) + 1)
]
BYTE_SOUP = st.lists(
    st.sampled_from(list(ID_OF_BYTE.values())).map(lambda i: [i]) | st.sampled_from(PIECES)
).map(lambda pieces: [token_id for piece in pieces for token_id in piece])
ANY_IDS = st.lists(st.integers(0, 325), max_size=60) | BYTE_SOUP


def save(directory: Path, tokenizer: tokenizers.Tokenizer, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def save_gpt2_style(directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    RAW.model.save(str(directory))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **config})
    )
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return directory


def streamed(prompt_ids: list[int], token_ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def continuation(prompt_ids: list[int], token_ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    """What decoding everything puts after the prompt's text; a character that the prompt left open is new."""
    whole, prompt = tokenizer.decode([*prompt_ids, *token_ids]), tokenizer.decode(prompt_ids)
    length = 0
    while length < len(prompt) and whole[length : length + 1] == prompt[length]:
        length += 1
    return whole[length:]


# --- encode and decode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_start", [False, True])
def test_ids_and_text_are_those_of_transformers(adds_start: bool, tmp_path: Path) -> None:
    raw = tiny_models.build_tokenizer(320, adds_start=adds_start)
    directory = save(tmp_path / "t", raw, tokenizer_class="PreTrainedTokenizerFast", eos_token=END)
    ours, theirs = read_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.encode("x")[0] == 0) is adds_start
    assert ours.eos_token_id == 0


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": END},
        {"eos_token": {"content": END, "__type": "AddedToken"}, "bos_token": END, "add_bos_token": True},
        {"eos_token": END, "add_prefix_space": True},
    ],
)
def test_a_vocabulary_and_merges_without_tokenizer_json_are_those_of_transformers(
    config, tmp_path: Path
) -> None:
    directory = save_gpt2_style(tmp_path / "t", **config)
    ours, theirs = read_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == 0


def test_the_first_gpt2_checkpoints_name_no_special_token(tmp_path: Path) -> None:
    RAW.model.save(str(tmp_path))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode(f"a{END}") == [*tokenizer.encode("a"), 0]
    assert tokenizer.decode(tokenizer.encode(f"a{END}")) == "a"


def test_truncation_and_padding_of_the_training_run_are_not_applied(tmp_path: Path) -> None:
    raw = tiny_models.build_tokenizer(300)
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    tokenizer = read_tokenizer(save(tmp_path / "t", raw))
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_sizes_count_added_tokens_and_gaps(tmp_path: Path) -> None:
    raw = tiny_models.build_tokenizer(300)
    assert Tokenizer(raw).vocab_size == 300
    raw.add_tokens(["<extra>"])
    assert Tokenizer(raw).vocab_size == 301
    gap = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert Tokenizer(gap).vocab_size == 10


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"tokenizer.json": "not json"}, "tokenizer.json"),
        ({"tokenizer.json": "[]"}, "tokenizer.json"),
        (
            {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'},
            "tokenizer.json",
        ),
        ({"vocab.json": "{}"}, "merges.txt"),
        ({"merges.txt": ""}, "vocab.json"),
        ({"vocab.json": '{"a": 1e400}', "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"}, "vocab.json"),
        ({"tokenizer.json": RAW.to_str(), "tokenizer_config.json": "[1]"}, "tokenizer_config.json"),
    ],
)
def test_malformed_tokenizer_files_are_refused_by_name(
    files: dict[str, str], names: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError, match=names):
        find_tokenizer(tmp_path)


def test_a_panic_inside_the_tokenizers_library_is_a_refusal(tmp_path: Path, monkeypatch) -> None:
    class PanicException(BaseException):  # as pyo3 has it: no `Exception`
        pass

    def panic(path: str) -> None:
        raise PanicException("range end index 14 out of range")

    monkeypatch.setattr(tokenizer_files.tokenizers, "Tokenizer", SimpleNamespace(from_file=panic))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: 'range end index 14"):
        find_tokenizer(tmp_path)


# --- incremental detokenisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "a prompt ", "你", END])
def test_deltas_add_up_to_the_text(prompt: str, text: str) -> None:
    prompt_ids, ids = TOKENIZER.encode(prompt), TOKENIZER.encode(text)
    deltas = streamed(prompt_ids, ids)
    assert "".join(deltas) == text.replace(END, "")


@pytest.mark.parametrize("character", ["é", "世", "🙂"])
def test_a_character_of_several_tokens_arrives_whole_with_its_last_byte(character: str) -> None:
    ids = [ID_OF_BYTE[value] for value in character.encode()]
    assert len(ids) > 1
    assert streamed([], ids) == [""] * (len(ids) - 1) + [character, ""]
    # Also when the prompt ended inside it, and when a special token comes in between.
    assert streamed(ids[:1], ids[1:]) == [""] * (len(ids) - 2) + [character, ""]
    assert "".join(streamed([], [ids[0], 0, *ids[1:]])) == character


def test_bytes_that_never_complete_come_out_as_replacement_characters() -> None:
    lead, continuation_byte, letter = ID_OF_BYTE[0xE2], ID_OF_BYTE[0x82], ID_OF_BYTE[ord("a")]
    assert "".join(streamed([], [lead])) == "\ufffd"
    assert streamed([], [lead, letter])[:2] == ["", "\ufffda"]
    assert "".join(streamed([], [continuation_byte] * 100)) == "\ufffd" * 100
    assert "".join(streamed([], [lead, continuation_byte] * 50)) == "\ufffd" * 50


def test_a_prompt_that_ends_in_a_replacement_character_keeps_it() -> None:
    prompt_ids = TOKENIZER.encode("x\ufffd")
    assert "".join(streamed(prompt_ids, TOKENIZER.encode("y"))) == "y"
    assert "".join(streamed(prompt_ids, TOKENIZER.encode("\ufffd"))) == "\ufffd"
    assert "".join(streamed(prompt_ids, [])) == ""


@settings(max_examples=250, deadline=None)
@given(prompt_ids=ANY_IDS, token_ids=ANY_IDS)
@example(prompt_ids=[ID_OF_BYTE[0x82]] * 40, token_ids=[ID_OF_BYTE[0x82]] * 40)
@example(prompt_ids=PIECES[-2], token_ids=[0, 0, PIECES[-1][-1], 0])
@example(prompt_ids=[], token_ids=PIECES[-2] * 30)
def test_any_ids_stream_to_what_they_decode_to(prompt_ids: list[int], token_ids: list[int]) -> None:
    deltas = streamed(prompt_ids, token_ids)
    assert "".join(deltas) == continuation(prompt_ids, token_ids)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.tuples(st.text(max_size=12), st.booleans()), max_size=6))
def test_any_text_streams_back_whatever_its_ids(pieces: list[tuple[str, bool]]) -> None:
    ids: list[int] = []
    for text, is_bytewise in pieces:
        ids += [ID_OF_BYTE[value] for value in text.encode()] if is_bytewise else TOKENIZER.encode(text)
    assert "".join(streamed([], ids)) == "".join(text for text, _ in pieces)


def test_a_decoder_that_drops_the_first_space_of_a_text_keeps_those_inside() -> None:
    vocabulary = {"▁a": 0, "▁b": 1, "c": 2, "<s>": 3, "▁\ufffd": 4}
    raw = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(raw)
    assert streamed([], [0, 1, 2, 1], tokenizer) == ["a", " b", "c", " b", ""]
    assert streamed([3], [3, 0, 1], tokenizer) == ["", "a", " b", ""]
    assert streamed([0], [1, 3, 1], tokenizer) == [" b", "", " b", ""]
    assert "".join(streamed([0], [3] * 60 + [1], tokenizer)) == " b"
    assert "".join(streamed([], [0] + [4] * 60 + [1], tokenizer)) == "a" + " \ufffd" * 60 + " b"


@pytest.mark.parametrize("token_id", [ID_OF_BYTE[0x82], ID_OF_BYTE[ord("a")], 0, 325])
def test_the_cost_of_a_token_does_not_grow_with_the_text(token_id: int) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, [token_id] * 5000)
    for _ in range(5000):
        detokenizer.push(token_id)
        assert len(detokenizer._window) <= 2 * detokenizer._MAX_WINDOW
    start = time.perf_counter()
    for _ in range(500):
        detokenizer.push(token_id)
    assert time.perf_counter() - start < 1.0  # 500 whole-text decodes of 5,000 ids would take several


# --- vocabularies --------------------------------------------------------------------------------------------


def permuted() -> Tokenizer:
    first, second = RAW.id_to_token(40), RAW.id_to_token(41)
    content = json.loads(RAW.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def test_the_fingerprint_is_of_tokens_and_ids() -> None:
    again = Tokenizer(tiny_models.build_tokenizer(320, adds_start=True))
    assert again.vocabulary_fingerprint == TOKENIZER.vocabulary_fingerprint
    assert permuted().vocab_size == TOKENIZER.vocab_size
    assert permuted().vocabulary_fingerprint != TOKENIZER.vocabulary_fingerprint
    assert (
        Tokenizer(tiny_models.build_tokenizer(319)).vocabulary_fingerprint != TOKENIZER.vocabulary_fingerprint
    )


@pytest.mark.parametrize(
    ("target_rows", "draft_rows", "expected"),
    [(320, 320, 320), (320, 384, 320), (384, 320, 320), (384, 327, 320), (310, 310, 310), (310, 384, 310)],
)
def test_padding_rows_are_never_ids(target_rows: int, draft_rows: int, expected: int) -> None:
    target, draft = Vocabulary("T", target_rows, TOKENIZER), Vocabulary("D", draft_rows, TOKENIZER)
    assert check_compatible(target, draft) == expected
    assert num_usable_ids(target) == expected


@pytest.mark.parametrize(
    ("target", "draft", "difference"),
    [
        ((320, TOKENIZER), (320, permuted()), "has id 40 in the first and 41 in the second"),
        ((320, TOKENIZER), (320, Tokenizer(tiny_models.build_tokenizer(319))), "absent in the second"),
        ((320, TOKENIZER), (319, TOKENIZER), "320 ids, the draft's embedding has 319 rows"),
        ((64, None), (71, None), "64 and 71 ids"),
        ((320, TOKENIZER), (384, None), "320 and 384 ids"),
    ],
)
def test_models_of_different_vocabularies_are_refused_with_both_names(target, draft, difference: str) -> None:
    with pytest.raises(VocabularyMismatchError, match=difference) as caught:
        check_compatible(Vocabulary("the-target", *target), Vocabulary("the-draft", *draft))
    assert "the-target" in str(caught.value)
    assert "the-draft" in str(caught.value)


def test_without_tokenizers_equal_sizes_are_taken_as_the_same_vocabulary() -> None:
    assert check_compatible(Vocabulary("T", 64, None), Vocabulary("D", 64, None)) == 64
    assert check_compatible(Vocabulary("T", 384, None), Vocabulary("D", 384, TOKENIZER)) == 320
