"""A checkpoint's tokenizer files are read whole: ids and text as `tokenizers` and `transformers` have them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokenizers
import transformers
from tokenizers import AddedToken

import specengine
from specengine.errors import ModelLoadError
from specengine.models.checkpoints.given_tokenizer import open_tokenizer
from specengine.models.checkpoints.tokenizer_files import explain_missing, find_tokenizer, read_tokenizer

END = tiny_models.END_OF_TEXT
RAW = tiny_models.build_tokenizer(320)
TEXTS = [
    *("a<|im_end|>b", "a  <|im_end|>  b", "<|im_end|>", f"<|im_end|>{END}", f"a {END} b"),
    *("x<extra>y <extra> z", "wo<extra>rd", "q <mask>  <mask> r", "naïve café"),
]
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}


def flagged(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


def write(directory: Path, files: dict[str, Any]) -> Path:
    """A directory with these files, and GPT-2's two original ones where tokenizer.json is not among them."""
    directory.mkdir(exist_ok=True)
    if "tokenizer.json" not in files:
        RAW.model.save(str(directory))
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def fast(flags: dict[str, bool], **config: Any) -> dict[str, Any]:
    """tokenizer.json with two tokens of these flags, one special, and its config."""
    raw = tiny_models.build_tokenizer(300)
    raw.add_special_tokens([AddedToken("<|im_end|>", special=True, **flags)])
    raw.add_tokens([AddedToken("<extra>", special=False, **flags)])
    return {
        "tokenizer.json": raw.to_str(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            **config,
        },
    }


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
SLOW_FILES = {
    "added_tokens.json": {
        "added_tokens.json": {"<|im_end|>": 320, "<extra>": 321},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": END, "unk_token": END},
        "tokenizer_config.json": GPT2,
    },
    "a map with flags, ids in another order": {
        "added_tokens.json": {"<|im_end|>": 321, "<extra>": 320},
        "special_tokens_map.json": {"eos_token": flagged("<|im_end|>", lstrip=True)},
        "tokenizer_config.json": GPT2,
    },
    "added_tokens_decoder": {
        "added_tokens.json": {"<|im_end|>": 320, "<extra>": 321},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "tokenizer_config.json": {
            **GPT2,
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "0": flagged(END),
                "320": flagged("<|im_end|>", rstrip=True),
                "321": flagged("<extra>", special=False, single_word=True, normalized=True),
            },
        },
    },
    "only a pad token is named": {
        "special_tokens_map.json": {"pad_token": END},
        "tokenizer_config.json": GPT2,
    },
}
FAST_FILES = {
    **{
        "-".join(itertools.compress(FLAGS, bits)) or "plain": fast(dict(zip(FLAGS, bits, strict=True)))
        for bits in itertools.product([False, True], repeat=4)
    },
    "named with other flags": {
        **fast({}),
        "special_tokens_map.json": {"eos_token": flagged("<|im_end|>", lstrip=True)},
    },
    "a role for a token that was not special": fast({"lstrip": True}, mask_token="<extra>"),
    "a decoder that says more": fast(
        {},
        mask_token="<mask>",
        added_tokens_decoder={
            "300": flagged("<|im_end|>", lstrip=True, rstrip=True),
            "302": flagged("<mask>", lstrip=True),
        },
    ),
}


@pytest.mark.parametrize("case", [*SLOW_FILES, *FAST_FILES])
def test_ids_and_text_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "t", {**SLOW_FILES, **FAST_FILES}[case])
    ours, theirs = read_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("case", list(itertools.islice(FAST_FILES, 16)))
def test_how_tokenizer_json_cuts_around_a_token_is_kept(case: str, tmp_path: Path) -> None:
    files = FAST_FILES[case]
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    ours = read_tokenizer(write(tmp_path / "t", files))
    for text in TEXTS:
        assert ours.encode(text) == raw.encode(text).ids


def test_the_text_of_special_tokens_is_known_by_id(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write(tmp_path / "t", SLOW_FILES["added_tokens_decoder"]))
    assert tokenizer.special_tokens == {0: END, 320: "<|im_end|>"}
    assert tokenizer.special_token_ids == {0, 320}


def test_an_added_token_has_its_id_also_beyond_a_gap(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write(tmp_path / "t", {"added_tokens.json": {"<x>": 330, "<y>": 325}}))
    assert (tokenizer.encode("<x><y>"), tokenizer.vocab_size) == ([330, 325], 331)
    assert tokenizer.decode([330, 325]) == "<x><y>"


def test_a_fine_tune_of_the_slow_tokenizer_emits_its_tokens_and_stops(tmp_path: Path) -> None:
    model = tiny_models.build_model("gpt2", vocab_size=322, eos_token_id=320)
    model.save_pretrained(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    directory = write(tmp_path / "m", SLOW_FILES["added_tokens.json"])
    (directory / "config.json").write_text(config)
    with specengine.Engine(directory) as engine:
        ended = engine.generate("a<|im_end|>", max_new_tokens=3, logit_bias={320: 1e4})
        assert ended.prompt_token_ids[-1] == 320
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([320], "", "stop")
        extra = engine.generate("a", max_new_tokens=2, logit_bias={321: 1e4})
        assert (extra.token_ids, extra.text) == ([321, 321], "<extra><extra>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"<x>": -1}}, r"added_tokens\.json: token id -1"),
        ({"added_tokens.json": {"<x>": 10**12}}, r"added_tokens\.json: token id 1000000000000"),
        ({"added_tokens.json": {"<x>": True}}, r"added_tokens\.json: '<x>': True is no token id"),
        ({"added_tokens.json": {"": 320}}, r"added_tokens\.json: '': 320 is no token id"),
        ({"added_tokens.json": {"<x>": 320, "<y>": 320}}, r"two tokens have the id 320"),
        ({"added_tokens.json": {"<x>": 5}}, r"'<x>' has the id 5, which vocab\.json gives to"),
        ({"added_tokens.json": {END: 320}}, r"'<\|endoftext\|>' has the id 320, by the vocabulary it is 0"),
        ({"added_tokens.json": {"\ud800": 320}}, r"added_tokens\.json: '\\ud800'.*surrogates"),
        (
            {"tokenizer_config.json": {"pad_token": "\ud800"}},
            r"config\.json: pad_token.*surrogates",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "does not map ids to tokens"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"-1": {}}}}, "'-1' is no token id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"320": "x"}}}, r"\[320\]: 'x' is no token"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"320": flagged("<x>", lstrip=3)}}},
            r"\[320\]: lstrip=3 is neither true nor false",
        ),
        ({"tokenizer_config.json": {"eos_token": {"text": "x"}}}, r"eos_token: \{'text': 'x'\} is no token"),
        (fast({}, added_tokens_decoder={"310": flagged("<new>")}), "has the id 310, by the vocabulary it is"),
        (
            fast({}, added_tokens_decoder={"7": flagged("<extra>")}),
            "has the id 7, by the vocabulary it is 301",
        ),
    ],
)
def test_files_that_are_malformed_or_contradict_each_other(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_tokenizer(write(tmp_path / "t", files))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_git_lfs_pointer_says_what_it_is(name: str, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 456318\n"
    directory = write(tmp_path / "t", {name: pointer})
    with pytest.raises(ModelLoadError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
        find_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "kind"), [("spiece.model", "a SentencePiece model"), ("vocab.txt", "a WordPiece vocabulary")]
)
def test_a_tokenizer_of_another_kind_is_none_and_explained(name: str, kind: str, tmp_path: Path) -> None:
    assert explain_missing(tmp_path) == ""
    (tmp_path / name).write_bytes(b"x")
    assert find_tokenizer(tmp_path) is None
    assert explain_missing(tmp_path).startswith(f"{name} is {kind}, which is not read: convert it")
    # By ids the model can be used; text says what is missing.
    tiny_models.save_checkpoint(tmp_path)
    with specengine.Engine(tmp_path) as engine:
        assert len(engine.generate([1, 2], max_new_tokens=2, ignore_eos=True).token_ids) == 2
        for arguments in ({"prompts": "a"}, {"prompts": [1], "stop": "a"}):
            with pytest.raises(ValueError, match=rf"has no tokenizer: {name} is {kind}, .*convert it"):
                engine.generate(**arguments)


def test_a_given_tokenizer_may_be_a_place_or_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "t", FAST_FILES["plain"])
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.enable_truncation(3)
    ours = read_tokenizer(directory)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(directory))
    monkeypatch.chdir(tmp_path)
    for given in (directory, str(directory), directory / "tokenizer.json", "some/model", ours, raw, theirs):
        tokenizer = open_tokenizer(given)
        assert tokenizer.vocabulary_fingerprint == ours.vocabulary_fingerprint
        assert tokenizer.encode(TEXTS[0]) == ours.encode(TEXTS[0])
        assert tokenizer.special_tokens == ours.special_tokens
    assert raw.truncation is not None  # the caller's own stays as it was


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"x")
    (tmp_path / "broken.json").write_text("{}")
    for source, message in (
        (tmp_path, r"no tokenizer\.json; spiece\.model is a SentencePiece model"),
        (tmp_path / "missing", "no such file or directory, and no name on the Hub"),
        (tmp_path / "broken.json", r"broken\.json"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            open_tokenizer(source)
    with pytest.raises(TypeError, match=r"tokenizer: expected a directory.* not int"):
        open_tokenizer(3)


def test_generate_takes_a_tokenizer_in_place_of_the_models(tmp_path: Path) -> None:
    model = tiny_models.build_model("gpt2", vocab_size=302)
    place = write(tmp_path / "t", FAST_FILES["plain"])
    options = {"model": model, "max_new_tokens": 3, "ignore_eos": True}
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no tokenizer; give .*tokenizer=, --tokenizer"):
        specengine.generate("a", **options)
    expected = read_tokenizer(place)
    for given in (place, str(place / "tokenizer.json"), transformers.AutoTokenizer.from_pretrained(place)):
        result = specengine.generate("a<|im_end|>", tokenizer=given, **options)
        assert result.prompt_token_ids == expected.encode("a<|im_end|>")
        assert result.text == expected.decode(result.token_ids)
    with pytest.raises(ModelLoadError, match="missing: no such file or directory"):
        specengine.generate("a", tokenizer="./missing", **options)
    specengine.clear_cache()


def test_a_kept_engine_is_of_its_tokenizer_as_it_was_written(tmp_path: Path) -> None:
    directory = tiny_models.save_checkpoint(tmp_path / "m", tokenizer=tiny_models.build_tokenizer(300))
    options = {"model": directory, "max_new_tokens": 1}
    own = specengine.generate("def add", **options).prompt_token_ids
    given = tmp_path / "tokenizer.json"
    tiny_models.build_tokenizer(270).save(str(given))
    smaller = specengine.generate("def add", tokenizer=given, **options).prompt_token_ids
    assert len(smaller) > len(own)
    tiny_models.build_tokenizer(300).save(str(given))
    assert specengine.generate("def add", tokenizer=given, **options).prompt_token_ids == own
    specengine.clear_cache()
