"""JSON that somebody else wrote: bounded, finite, an object, every key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specengine.errors import ModelLoadError

MAX_JSON_BYTES = 64 << 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a file. Raises `ModelLoadError` naming the file for anything else."""
    try:
        if not path.is_file():
            raise ModelLoadError(f"{path}: no such file")
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror}") from error
    if len(text) > max_bytes:
        raise ModelLoadError(f"{path}: more than {max_bytes} bytes")
    if text.startswith(LFS_POINTER):
        raise ModelLoadError(describe_lfs_pointer(path))
    return parse_json(text, str(path))


def is_lfs_pointer(path: Path) -> bool:
    """Whether a regular file holds what Git LFS leaves where the file itself was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def describe_lfs_pointer(path: Path) -> str:
    """What is wrong with such a file, and what to do."""
    return (
        f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in the repository it was cloned from, "
        "or download the file"
    )


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in `text`; `where` begins the error messages."""
    try:
        value = json.loads(
            text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: expected a JSON object, found {shorten(value)}")
    return value


def shorten(value: object) -> str:
    """`repr`, cut to what an error message can carry."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} occurs twice")
    return result
