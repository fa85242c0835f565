"""What a model is, read from its config and the headers of its files: no weight is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from specengine.models.checkpoints import Checkpoint, open_checkpoint
from specengine.models.checkpoints.directory import holds_only_pickles
from specengine.models.checkpoints.gguf_checkpoint import GgufCheckpoint
from specengine.models.registry import ARCHITECTURES

# Describing a model reads no pickle.
_PICKLES = {"weights": "pickles, read only with allow_pickle=True (--allow-pickle)"}


def supported_architectures() -> list[str]:
    """The `model_type`s that can be loaded."""
    return sorted(ARCHITECTURES)


def describe_model(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The spec's fields by name; for a directory or a file also its path, parameters, dtype and size.

    Raises `ModelLoadError` for what cannot be loaded either.
    """
    checkpoint = open_checkpoint(source)
    description: dict[str, Any] = dataclasses.asdict(checkpoint.spec)
    if isinstance(checkpoint, GgufCheckpoint):
        return {"file": str(checkpoint.path), **_weights(checkpoint), **description}
    directory = Path(source).expanduser()
    if not directory.is_dir():
        return description
    weights = _PICKLES if holds_only_pickles(directory) else _weights(checkpoint)
    return {"directory": str(directory), **weights, **description}


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = [info for info in checkpoint.tensors.tensors.values() if info.dtype is not None]
    num_bytes = Counter[str]()
    for info in tensors:
        num_bytes[info.format or str(info.dtype).removeprefix("torch.")] += info.num_bytes
    return {
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "dtype": num_bytes.most_common(1)[0][0] if num_bytes else "none",
        "megabytes": round(num_bytes.total() / 1e6, 1),
    }
