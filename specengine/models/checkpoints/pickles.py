"""State dicts in pickles, read by PyTorch's `weights_only` unpickler, which runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specengine.errors import ModelLoadError
from specengine.json_file import describe_lfs_pointer, is_lfs_pointer, shorten


def read_pickles(directory: Path, files: list[str]) -> dict[str, Any]:
    """The state dicts of these files of a directory, in one. Raises `ModelLoadError` naming the file."""
    state: dict[str, Any] = {}
    for file in files:
        path = directory / file
        if not path.is_file():
            raise ModelLoadError(f"{path}: no such file")
        if is_lfs_pointer(path):
            raise ModelLoadError(describe_lfs_pointer(path))
        state.update(_read_pickle(path))
    return state


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file makes the unpickler raise anything
        raise ModelLoadError(f"{path}: refused by torch.load(weights_only=True): {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ModelLoadError(f"{path}: expected a state dict, found {shorten(type(loaded).__name__)}")
    return loaded
