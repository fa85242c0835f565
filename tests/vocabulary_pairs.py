"""Pairs of tiny models with two vocabularies, which any law takes as it takes the name of a drafter.

    target, draft = build_pair("retokenized", directory, vocab_size=12, seed=1)

The draft is the target with noise: its drafts are accepted now and then. Tokens are words; a text is " ba ca da".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import tiny_models
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

_SPACE = "\u0120"  # how a byte-level vocabulary spells it
_WORDS = ["".join(pair) for pair in product(ascii_lowercase[1:], ascii_lowercase)]


def byte_level_words(vocab_size: int) -> tokenizers.Tokenizer:
    """Of words with the space before them: the end of text is id 0."""
    tokenizer = _words([_SPACE + word for word in _WORDS[: vocab_size - 1]])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bare_words(vocab_size: int) -> tokenizers.Tokenizer:
    """Of the same words without it, and no decoder that says so: nothing but the end of text is spelled alike."""
    tokenizer = _words(_WORDS[: vocab_size - 1])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _words(spelled: list[str]) -> tokenizers.Tokenizer:
    vocabulary = {word: index for index, word in enumerate([tiny_models.END_OF_TEXT, *spelled])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    tokenizer.add_special_tokens([AddedToken(tiny_models.END_OF_TEXT, special=True)])
    return tokenizer


# What the draft's vocabulary is before its ids are permuted.
PAIRS: dict[str, Callable[[int], tokenizers.Tokenizer]] = {
    "renumbered": byte_level_words,
    "retokenized": bare_words,
}


def build_pair(kind: str, directory: Path, *, noise: float = 0.3, **build: Any) -> tuple[Path, Path]:
    """Checkpoints of a target and of a draft that has all of its tokens, under other ids or other names."""
    model = tiny_models.build_model(**build)
    size = model.get_input_embeddings().weight.shape[0]
    draft = tiny_models.renumbered(tiny_models.perturbed(model, noise=noise), PAIRS[kind](size), seed=5)
    return (
        tiny_models.save_checkpoint(directory / "target", model, tokenizer=byte_level_words(size)),
        tiny_models.save_checkpoint(directory / "draft", draft[0], tokenizer=draft[1]),
    )
