"""A checkpoint's tokenizer, from tokenizer.json or from the files that the slow GPT-2 tokenizer saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from specengine.errors import ModelLoadError
from specengine.json_file import describe_lfs_pointer, is_lfs_pointer, read_json, shorten
from specengine.tokenizer import Tokenizer

MAX_SETTINGS_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 4 << 20

TOKENIZER_JSON, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    VOCABULARY,
    MERGES,
    CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    CHAT_TEMPLATE,
)

# Tokenizers that are not read, by the file that gives each away.
_OTHER_KINDS = {
    "spiece.model": "a SentencePiece model",
    "tokenizer.model": "a SentencePiece model",
    "sentencepiece.bpe.model": "a SentencePiece model",
    "vocab.txt": "a WordPiece vocabulary",
}
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_MAX_TOKEN_ID = 1 << 22
# What the first GPT-2 checkpoints, which name no special token, mean.
_GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """A checkpoint's tokenizer, or None if it has none of the files that are read."""
    has_files = any((directory / name).exists() for name in (TOKENIZER_JSON, VOCABULARY, MERGES))
    return read_tokenizer(directory) if has_files else None


def explain_missing(directory: Path) -> str:
    """What to do about a directory whose tokenizer is of a kind that is not read; empty if it has none at all."""
    for name, kind in _OTHER_KINDS.items():
        if (directory / name).exists():
            return (
                f"{name} is {kind}, which is not read: convert it with transformers, "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...), which writes tokenizer.json"
            )
    return ""


def read_tokenizer(directory: Path) -> Tokenizer:
    """Reads tokenizer.json, or GPT-2's vocab.json and merges.txt where there is none, and what goes with them.

    Every token that a file gives an id has that id. Raises `ModelLoadError` naming the file that is missing or
    malformed, or that contradicts another.
    """
    path = directory / TOKENIZER_JSON
    if path.exists():
        settings = _read_settings(directory, {})
        tokenizer = read_tokenizer_json(path)
        _add_tokens(tokenizer, settings)
    else:
        settings = _read_settings(directory, _GPT2_ROLES)
        tokenizer = _read_byte_level(directory, settings)
    _mark_special(tokenizer, settings)
    eos = settings.roles.get("eos_token")
    roles = {role: token.content for role, token in settings.roles.items()}
    return Tokenizer(tokenizer, eos_token=None if eos is None else eos.content, roles=roles)


def read_chat_template(directory: Path) -> str | None:
    """How conversations are written out: chat_template.jinja, else what tokenizer_config.json says, its template named
    "default" where it has several; None where there is none. Raises `ModelLoadError` naming file and field."""
    path = directory / CHAT_TEMPLATE
    if path.exists():
        try:
            with path.open("rb") as file:
                text = file.read(MAX_TEMPLATE_BYTES + 1)
            if len(text) > MAX_TEMPLATE_BYTES:
                raise ModelLoadError(f"{path}: more than {MAX_TEMPLATE_BYTES} bytes")
            return text.decode("utf-8").replace("\r\n", "\n")
        except OSError as error:
            raise ModelLoadError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{path}: not UTF-8 ({error})") from error
    return choose_template(
        _read_if_present(directory / CONFIG).get("chat_template"), f"{directory / CONFIG}: chat_template"
    )


def choose_template(value: Any, where: str) -> str | None:
    """The one template of a string, of a list of named ones or of a map of them. where: begins the messages"""
    if isinstance(value, list):
        if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in value):
            raise ModelLoadError(f"{where}: {shorten(value)} is no list of named templates")
        value = {each["name"]: each.get("template") for each in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise ModelLoadError(f"{where}: of {shorten(sorted(value))} none is named 'default'")
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise ModelLoadError(f"{where}: {shorten(value)} is no template")
    return value or None


@dataclass(frozen=True)
class _Settings:
    """What stands beside a vocabulary.

    roles:       the special token of each role
    named:       every special token that is named, roles first
    added:       tokens with an id of their own, by id
    where_added: the file that lists them
    """

    roles: dict[str, AddedToken]
    named: list[AddedToken]
    added: dict[int, AddedToken]
    where_added: Path
    add_prefix_space: bool
    add_bos_token: bool


def _read_settings(directory: Path, default_roles: Mapping[str, str]) -> _Settings:
    config = _read_if_present(directory / CONFIG)
    decoder = config.get("added_tokens_decoder")
    special = _read_if_present(directory / SPECIAL_TOKENS)
    # As transformers has it: the map is the older file, and wins where the config is as old.
    values = {**special, **config} if decoder else {**config, **special}
    texts = {role: values.get(role) or default_roles.get(role) for role in _ROLES}
    where = directory / (CONFIG if config else SPECIAL_TOKENS)
    roles = {role: _to_special(text, f"{where}: {role}") for role, text in texts.items() if text}
    others = [_to_special(each, f"{where}: {name}") for name in _LISTS for each in _listed(values.get(name))]
    named = list({token.content: token for token in [*roles.values(), *others]}.values())
    if decoder:
        where_added = directory / CONFIG
        added = _read_decoder(decoder, f"{where_added}: added_tokens_decoder")
    else:
        where_added = directory / ADDED_TOKENS
        added = _read_added(where_added, {token.content for token in named})
    return _Settings(
        roles=roles,
        named=named,
        added=added,
        where_added=where_added,
        add_prefix_space=values.get("add_prefix_space") is True,
        add_bos_token=values.get("add_bos_token") is True,
    )


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_SETTINGS_BYTES) if path.exists() else {}


def _listed(value: Any) -> list[Any]:
    """A list of tokens; some files have a map from names to tokens."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _to_special(value: Any, where: str) -> AddedToken:
    return _to_token({"content": value} if isinstance(value, str) else value, where, is_special=True)


def _to_token(value: Any, where: str, *, is_special: bool = False) -> AddedToken:
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise ModelLoadError(f"{where}: {shorten(value)} is no token")
    given = {name: value[name] for name in flags if value.get(name) is not None}
    wrong = next((name for name, flag in given.items() if not isinstance(flag, bool)), None)
    if wrong is not None:
        raise ModelLoadError(f"{where}: {wrong}={shorten(given[wrong])} is neither true nor false")
    if is_special:
        given["special"] = True
    with refusing(where):
        return AddedToken(value["content"], **given)


def _read_decoder(value: Any, where: str) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: {shorten(value)} does not map ids to tokens")
    tokens = {}
    for key, entry in value.items():
        if not key.isdecimal() or len(key) > 9:
            raise ModelLoadError(f"{where}: {shorten(key)} is no token id")
        tokens[_check_id(int(key), where)] = _to_token(entry, f"{where}[{key}]")
    return tokens


def _read_added(path: Path, special: set[str]) -> dict[int, AddedToken]:
    tokens: dict[int, AddedToken] = {}
    for text, token_id in _read_if_present(path).items():
        if type(token_id) is not int or not text:
            raise ModelLoadError(f"{path}: {shorten(text)}: {shorten(token_id)} is no token id")
        if _check_id(token_id, str(path)) in tokens:
            raise ModelLoadError(f"{path}: two tokens have the id {token_id}")
        is_special = text in special
        with refusing(f"{path}: {shorten(text)}"):
            tokens[token_id] = AddedToken(text, special=is_special, normalized=not is_special)
    return tokens


def _check_id(token_id: int, where: str) -> int:
    if not 0 <= token_id < _MAX_TOKEN_ID:
        raise ModelLoadError(f"{where}: token id {shorten(token_id)} is not within 0 … {_MAX_TOKEN_ID - 1}")
    return token_id


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: _Settings) -> None:
    """The tokens with an id of their own, on top of a vocabulary; the flags given with them are the ones."""
    added = sorted(settings.added.items())
    # All at once: each call builds the library's tables anew.
    tokenizer.add_tokens([token for _, token in added])
    for token_id, token in added:
        if (known := tokenizer.token_to_id(token.content)) != token_id:
            raise ModelLoadError(
                f"{settings.where_added}: token {shorten(token.content)} has the id {token_id}, "
                f"by the vocabulary it is {known}"
            )


def _mark_special(tokenizer: tokenizers.Tokenizer, settings: _Settings) -> None:
    """The named special tokens are special wherever the vocabulary has them: skipped in text, never split.

    How the vocabulary cuts around them (`lstrip` and so on) stays as it is where it says so.
    """
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = [token for token in settings.named if tokenizer.token_to_id(token.content) is not None]
    tokenizer.add_special_tokens([added.get(token.content, token) for token in named])


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of this one file. Raises `ModelLoadError` naming it."""
    _check_file(path)
    with refusing(str(path)):
        return tokenizers.Tokenizer.from_file(str(path))


def _read_byte_level(directory: Path, settings: _Settings) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two original files."""
    vocab_path, merges_path = directory / VOCABULARY, directory / MERGES
    _check_file(vocab_path)
    _check_file(merges_path)
    with refusing(f"{vocab_path} and {MERGES}"):
        vocabulary, merges = models.BPE.read_file(str(vocab_path), str(merges_path))
        # Added tokens get exactly the ids they were given, also beyond a gap, if the model has them.
        model = models.BPE({**vocabulary, **_new_tokens(vocabulary, settings)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, settings)
    bos = settings.roles["bos_token"].content
    if settings.add_bos_token and tokenizer.token_to_id(bos) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def _new_tokens(vocabulary: Mapping[str, int], settings: _Settings) -> dict[str, int]:
    new = {t.content: i for i, t in settings.added.items() if t.content not in vocabulary}
    by_id = {token_id: token for token, token_id in vocabulary.items()}
    for token, token_id in new.items():
        if token_id in by_id:
            raise ModelLoadError(
                f"{settings.where_added}: token {shorten(token)} has the id {token_id}, "
                f"which {VOCABULARY} gives to {shorten(by_id[token_id])}"
            )
    return new


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Whatever the `tokenizers` library raises becomes a `ModelLoadError` that begins with `where`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ModelLoadError):
        raise
    except BaseException as error:  # the library raises plain `Exception`, and its panics are not even that
        raise ModelLoadError(f"{where}: {shorten(str(error))}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ModelLoadError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes")
    if is_lfs_pointer(path):
        raise ModelLoadError(describe_lfs_pointer(path))
