"""The tokenizer that a GGUF file's metadata describes: byte-level BPE, or SentencePiece with byte fallback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.models.checkpoints.gguf_metadata import GgufMetadata
from specengine.models.checkpoints.tokenizer_files import refusing
from specengine.tokenizer import SPACE, Tokenizer

_PREFIX = "tokenizer.ggml"
# What templates call special tokens, and what a file does.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# Twice and more what any published vocabulary has; building one takes a second or two at most.
_MAX_TOKENS = 1 << 20
_MAX_ADDED = 1 << 16
_MAX_TOKEN_CHARACTERS = 1 << 10
# Of SentencePiece: in all tokens, each a place to cut one in two; and in all pairs that make a token.
_MAX_CHARACTERS, _MAX_MERGED = 1 << 22, 1 << 25

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _like_llama3(digits: str) -> str:
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _cased(digits: str, ending: str) -> str:
    """Words end where small letters are followed by capitals."""
    upper, lower, start = (
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
        r"[^\r\n\p{L}\p{N}]?",
    )
    return (
        rf"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
    )


@dataclass(frozen=True)
class _Pre:
    """How a text is cut before any merge.

    patterns:      each cuts the pieces of the one before, into its matches and what is between
    ignore_merges: a piece that is a token is that token, whatever the merges say
    is_composed:   text is first put into Unicode's form NFC
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    is_composed: bool = False


_LLAMA3 = _like_llama3(r"\p{N}{1,3}")
_BY_DIGIT = _Pre((r"\p{N}", _WORDS))
# By `tokenizer.ggml.pre`: the regular expressions of each model's own tokenizer.
_PRE = {
    "gpt-2": _Pre((_WORDS,)),
    "phi-2": _Pre((_WORDS,)),
    "olmo": _Pre((_WORDS,), is_composed=True),
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _BY_DIGIT),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _Pre((_LLAMA3,), ignore_merges=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Pre((_LLAMA3,))),
    "qwen2": _Pre((_like_llama3(r"\p{N}"),), is_composed=True),
    "deepseek-r1-qwen": _Pre((_like_llama3(r"\p{N}"),)),
    "deepseek-coder": _Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": _Pre(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}",
        )
    ),
    "tekken": _Pre((_cased(r"\p{N}", ""),), ignore_merges=True),
    "gpt-4o": _Pre((_cased(r"\p{N}{1,3}", f"{_SHORT}?"),)),
}


def read_gguf_tokenizer(metadata: GgufMetadata) -> Tokenizer | None:
    """The tokenizer that a file describes; None if it has none.

    Raises `ModelLoadError` naming the key that is missing, malformed or not supported.
    """
    kind = metadata.get(f"{_PREFIX}.model", str)
    if kind in (None, "no_vocab"):
        return None
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise metadata.error(
            f"{_PREFIX}.model",
            f"{shorten(kind)} is not supported; known are {known}. Another tokenizer can be given with tokenizer=",
        )
    vocabulary = _read_vocabulary(metadata)
    with refusing(f"{metadata.path}: tokenizer"):
        tokenizer = _BUILDERS[kind](metadata, vocabulary)
        tokenizer.add_tokens(vocabulary.added())
        _add_ends(tokenizer, metadata, vocabulary, adds_start=kind == "llama")
    named = {role: vocabulary.named(key) for role, key in _ROLES.items()}
    roles = {role: token for role, token in named.items() if token is not None}
    return Tokenizer(tokenizer, eos_token=roles.get("eos_token"), roles=roles)


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id, and the kind of each, which says whether it is special."""

    metadata: GgufMetadata
    tokens: tuple[str, ...]
    kinds: Sequence[int]
    ids: dict[str, int]

    def added(self) -> list[AddedToken]:
        """What is found in a text before it is cut, special or not."""
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]

    def named(self, role: str) -> str | None:
        """The token of `tokenizer.ggml.<role>_token_id`, if the file names one."""
        key = f"{_PREFIX}.{role}_token_id"
        token_id = self.metadata.get(key, int)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise self.metadata.error(key, f"{token_id} is none of the {len(self.tokens)} tokens")
        return self.tokens[token_id]


def _read_vocabulary(metadata: GgufMetadata) -> _Vocabulary:
    key = f"{_PREFIX}.tokens"
    tokens = metadata.strings(key)
    if not tokens:
        raise ModelLoadError(f"{metadata.path}: metadata {key!r} is missing")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        token, second = next((token, i) for i, token in enumerate(tokens) if ids[token] != i)
        raise metadata.error(key, f"the ids {second} and {ids[token]} are the same token {shorten(token)}")
    if len(tokens) > _MAX_TOKENS:
        raise metadata.error(key, f"{len(tokens)} tokens; at most {_MAX_TOKENS} are accepted")
    longest = max(tokens, key=len)
    if not 0 < len(longest) <= _MAX_TOKEN_CHARACTERS or "" in ids:
        raise metadata.error(key, f"a token of {len(longest)} characters, or an empty one")
    kinds = metadata.numbers(f"{_PREFIX}.token_type")
    if kinds is None:
        return _Vocabulary(metadata, tokens, [1] * len(tokens), ids)
    if kinds.dtype.kind not in "iu" or len(kinds) != len(tokens):
        raise metadata.error(
            f"{_PREFIX}.token_type", f"not one whole number for each of {len(tokens)} tokens"
        )
    if (num_added := int(np.isin(kinds, (_CONTROL, _USER_DEFINED)).sum())) > _MAX_ADDED:
        raise metadata.error(
            f"{_PREFIX}.token_type", f"{num_added} added tokens; at most {_MAX_ADDED} are accepted"
        )
    return _Vocabulary(metadata, tokens, kinds.tolist(), ids)


def _build_byte_level(metadata: GgufMetadata, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    pre = _find_pre(metadata)
    key = f"{_PREFIX}.merges"
    merges = metadata.strings(key)
    if merges is None:
        raise ModelLoadError(f"{metadata.path}: metadata {key!r} is missing")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise metadata.error(key, f"{shorten(merge)} is no pair of tokens")
        pairs.append((left, right))
    model = models.BPE(vocabulary.ids, pairs, ignore_merges=pre.ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    if pre.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _find_pre(metadata: GgufMetadata) -> _Pre:
    key = f"{_PREFIX}.pre"
    name = metadata.get(key, str)
    if name in _PRE:
        return _PRE[name]
    problem = "is missing" if name is None else f"{shorten(name)} is not supported"
    raise metadata.error(
        key,
        f"{problem}: how a text is cut before it becomes tokens; known are {', '.join(_PRE)}. Another tokenizer can be "
        "given with tokenizer=",
    )


def _build_sentencepiece(metadata: GgufMetadata, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's BPE merges, again and again, the pair that makes the token with the best score."""
    key = f"{_PREFIX}.scores"
    scores = metadata.numbers(key)
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise metadata.error(key, f"not one number for each of {len(vocabulary.tokens)} tokens")
    if sum(map(len, vocabulary.tokens)) > _MAX_CHARACTERS:
        raise metadata.error(f"{_PREFIX}.tokens", f"more than {_MAX_CHARACTERS} characters")
    model = models.BPE(
        vocabulary.ids,
        _find_merges(vocabulary, scores.tolist()),
        unk_token=vocabulary.named("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    adds_space = metadata.get(f"{_PREFIX}.add_space_prefix", bool) is not False
    to_spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), to_spaces] if adds_space else [to_spaces]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return tokenizer


def _find_merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first."""
    ids = {
        token: token_id
        for token, token_id in vocabulary.ids.items()
        if vocabulary.kinds[token_id] not in (_CONTROL, _UNKNOWN, _BYTE)
    }
    found: list[tuple[float, int, int, str, str]] = []
    num_characters = 0
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[token_id], ids[left], ids[right], left, right))
                num_characters += len(token)
        if num_characters > _MAX_MERGED:
            raise vocabulary.metadata.error(
                f"{_PREFIX}.tokens",
                f"pairs of tokens make tokens of more than {_MAX_MERGED} characters together",
            )
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_ends(
    tokenizer: tokenizers.Tokenizer, metadata: GgufMetadata, vocabulary: _Vocabulary, *, adds_start: bool
) -> None:
    """The special tokens that go around a whole text."""
    flags = {"bos": adds_start, "eos": False}
    wanted: dict[str, str] = {}
    for role, is_default in flags.items():
        given = metadata.get(f"{_PREFIX}.add_{role}_token", bool)
        token = vocabulary.named(role)
        if token is not None and (is_default if given is None else given):
            wanted[role] = token
    if not wanted:
        return
    start, end = ([wanted[role]] if role in wanted else [] for role in flags)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *start, "$B", *end],
        special_tokens=[(token, vocabulary.ids[token]) for token in {*start, *end}],
    )


_BUILDERS = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}
