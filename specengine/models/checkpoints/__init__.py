"""Where models come from: a directory, a GGUF file, a name on the Hub, a model in memory; each opened once.

A kind of checkpoint is one file with a subclass of `Checkpoint`, and its case in `open_checkpoint`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from specengine.errors import ModelLoadError
from specengine.fetched import KNOWN_MODELS, require_fetched
from specengine.models.checkpoints.checkpoint import Checkpoint
from specengine.models.checkpoints.directory import DirectoryCheckpoint
from specengine.models.checkpoints.gguf_checkpoint import SUFFIX, GgufCheckpoint
from specengine.models.checkpoints.hub import HubCheckpoint, is_hub_name
from specengine.models.checkpoints.in_memory import ModuleCheckpoint

__all__ = ["Checkpoint", "ModelSource", "open_checkpoint"]

ModelSource = str | os.PathLike[str] | torch.nn.Module


def open_checkpoint(
    source: ModelSource, *, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """The checkpoint that a caller named. Reads nothing yet.

    source:       a directory with config.json and weights; a .gguf file; if there is none, the name of a model that was
                  fetched (`specengine fetch`) or is on the Hugging Face Hub; or a `transformers` model in memory
    revision:     of a Hub model
    allow_pickle: read `pytorch_model.bin` if there are no safetensors, with `weights_only=True`, which runs no code

    Raises `ModelLoadError` for a path that is no directory, `TypeError` for what is no source at all.
    """
    if isinstance(source, torch.nn.Module):
        return ModuleCheckpoint(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "model: expected a directory, a .gguf file, a Hub name or a transformers model, not "
            f"{type(source).__name__}"
        )
    path = Path(source).expanduser()
    if source in KNOWN_MODELS and not path.exists():
        return GgufCheckpoint(require_fetched(source), name=source)
    if path.is_dir():
        return DirectoryCheckpoint(path, name=os.fspath(source), allow_pickle=allow_pickle)
    if path.suffix == SUFFIX:
        return GgufCheckpoint(path, name=os.fspath(source))
    if path.exists():
        raise ModelLoadError(
            f"{path}: is a file; give the directory that holds config.json and the weights, or a {SUFFIX} file"
        )
    if isinstance(source, str) and is_hub_name(source):
        return HubCheckpoint(source, revision=revision, allow_pickle=allow_pickle)
    raise ModelLoadError(f"{path}: no such directory, and no name that the Hugging Face Hub could have")
