"""A directory as `save_pretrained` writes it: config.json, safetensors or pickles, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from specengine.errors import ModelLoadError
from specengine.json_file import read_json
from specengine.models.checkpoints.checkpoint import Checkpoint
from specengine.models.checkpoints.pickles import read_pickles
from specengine.models.checkpoints.shards import indexed_files
from specengine.models.checkpoints.tensors import SafetensorsSource, StateDictSource, TensorSource
from specengine.models.checkpoints.tokenizer_files import explain_missing, find_tokenizer, read_chat_template
from specengine.models.registry import ConfiguredModel, configure
from specengine.tokenizer import Tokenizer

MAX_CONFIG_BYTES = 4 << 20
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

HOW_TO_ALLOW_PICKLES = (
    "give allow_pickle=True (on the command line --allow-pickle); they are then read with PyTorch's weights_only, "
    "which runs no code"
)


class DirectoryCheckpoint(Checkpoint):
    """A directory on this machine."""

    def __init__(self, path: Path, *, name: str, allow_pickle: bool) -> None:
        super().__init__(name)
        self.path = path
        self._allow_pickle = allow_pickle

    @cached_property
    def model(self) -> ConfiguredModel:
        path = self.path / CONFIG
        return configure(read_json(path, MAX_CONFIG_BYTES), self.generation_defaults, str(path))

    @cached_property
    def generation_defaults(self) -> Mapping[str, Any]:
        path = self.path / GENERATION_CONFIG
        return read_json(path, MAX_CONFIG_BYTES) if path.exists() else {}

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return find_tokenizer(self.path)

    @cached_property
    def chat_template(self) -> str | None:
        return read_chat_template(self.path)

    def explain_missing_tokenizer(self) -> str:
        return explain_missing(self.path)

    @cached_property
    def tensors(self) -> TensorSource:
        return open_weights(self.path, allow_pickle=self._allow_pickle)


def holds_only_pickles(directory: Path) -> bool:
    """Whether the weights of a directory are there, and pickles."""
    has_safetensors, has_pickles = (
        any((directory / name).exists() for name in names)
        for names in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX))
    )
    return has_pickles and not has_safetensors


def open_weights(directory: Path, *, allow_pickle: bool) -> TensorSource:
    """The weights of a directory: safetensors if it has them, else pickles if they are allowed."""
    if holds_only_pickles(directory):
        if not allow_pickle:
            raise ModelLoadError(f"{directory}: its weights are pickles; {HOW_TO_ALLOW_PICKLES}")
        return StateDictSource(
            read_pickles(directory, _files(directory, PICKLE, PICKLE_INDEX)), str(directory)
        )
    return SafetensorsSource(directory, _files(directory, SAFETENSORS, SAFETENSORS_INDEX))


def _files(directory: Path, single: str, index: str) -> list[str]:
    """The names of the weight files of one kind."""
    if (directory / single).exists():
        return [single]
    if (directory / index).exists():
        return indexed_files(directory, index, Path(single).suffix)
    raise ModelLoadError(f"{directory}: no {single} and no {index}")
