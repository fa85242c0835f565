"""A tokenizer that a caller gives in place of the checkpoint's own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import tokenizers

from specengine.errors import ModelLoadError
from specengine.models.checkpoints.hub import fetch, is_hub_name
from specengine.models.checkpoints.tokenizer_files import (
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    choose_template,
    explain_missing,
    find_tokenizer,
    read_chat_template,
    read_tokenizer_json,
)
from specengine.tokenizer import Tokenizer


def open_tokenizer(source: Any, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a directory, a tokenizer.json, a name on the Hub, or an object.

    source: of objects a `Tokenizer`, one of the `tokenizers` library, or a fast one of `transformers`

    Raises `ModelLoadError` naming what is missing or malformed, `TypeError` for any other object.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, tokenizers.Tokenizer):
        return Tokenizer(copy.deepcopy(source))
    if not isinstance(source, str | os.PathLike):
        backend = getattr(source, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise TypeError(
                "tokenizer: expected a directory, a tokenizer.json, a Hub name or a tokenizer that is built on the "
                f"tokenizers library, not {type(source).__name__}"
            )
        eos, names = getattr(source, "eos_token", None), getattr(source, "special_tokens_map", {})
        roles = {role: str(token) for role, token in names.items() if isinstance(token, str)}
        return Tokenizer(copy.deepcopy(backend), eos_token=eos, roles=roles)
    path = Path(source).expanduser()
    if path.is_file():
        return Tokenizer(read_tokenizer_json(path))
    path = _find_directory(path, source, revision)
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        why = explain_missing(path)
        raise ModelLoadError(f"tokenizer: {path}: no {TOKENIZER_JSON}" + (f"; {why}" if why else ""))
    return tokenizer


def given_chat_template(source: Any, *, revision: str | None = None) -> str | None:
    """The template that comes with such a tokenizer; None where it has none."""
    if not isinstance(source, str | os.PathLike):
        return choose_template(getattr(source, "chat_template", None), "tokenizer: chat_template")
    path = Path(source).expanduser()
    return None if path.is_file() else read_chat_template(_find_directory(path, source, revision))


def _find_directory(path: Path, source: str | os.PathLike[str], revision: str | None) -> Path:
    if not path.is_dir():
        if not isinstance(source, str) or not is_hub_name(source):
            raise ModelLoadError(f"tokenizer: {path}: no such file or directory, and no name on the Hub")
        path = fetch(source, revision, TOKENIZER_FILES)
    return path
