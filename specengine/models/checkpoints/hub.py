"""A name on the Hugging Face Hub. Its config is fetched first, the rest when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from specengine.errors import ModelLoadError
from specengine.models.checkpoints.checkpoint import Checkpoint
from specengine.models.checkpoints.directory import (
    CONFIG,
    GENERATION_CONFIG,
    HOW_TO_ALLOW_PICKLES,
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    DirectoryCheckpoint,
)
from specengine.models.checkpoints.tensors import TensorSource
from specengine.models.checkpoints.tokenizer_files import TOKENIZER_FILES
from specengine.models.registry import ConfiguredModel
from specengine.tokenizer import Tokenizer

_CONFIG_FILES = (CONFIG, GENERATION_CONFIG)
_SAFETENSORS_FILES = (SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors")
_PICKLE_FILES = (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin")


def is_hub_name(source: str) -> bool:
    """Whether the Hub could have a model of this name."""
    return re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)?", source) is not None


class HubCheckpoint(Checkpoint):
    """A repository on the Hub, or its copy in the local cache.

    Whatever is fetched later is of the commit that the config was of.
    """

    def __init__(self, name: str, *, revision: str | None, allow_pickle: bool) -> None:
        super().__init__(name)
        self._revision = revision
        self._allow_pickle = allow_pickle

    @cached_property
    def _configs(self) -> DirectoryCheckpoint:
        return self._fetch(_CONFIG_FILES, self._revision)

    @cached_property
    def _everything(self) -> DirectoryCheckpoint:
        wanted = (*_CONFIG_FILES, *TOKENIZER_FILES, *_SAFETENSORS_FILES)
        commit = self._configs.path.name
        revision = commit if re.fullmatch(r"[0-9a-f]{40}", commit) else self._revision
        return self._fetch((*wanted, *(_PICKLE_FILES if self._allow_pickle else ())), revision)

    @property
    def model(self) -> ConfiguredModel:
        return self._configs.model

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        return self._configs.generation_defaults

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._everything.tokenizer

    @property
    def chat_template(self) -> str | None:
        return self._everything.chat_template

    @property
    def tensors(self) -> TensorSource:
        path = self._everything.path
        has_weights = any((path / file).exists() for file in (SAFETENSORS, SAFETENSORS_INDEX))
        if not has_weights and not self._allow_pickle:
            raise ModelLoadError(
                f"{self.name!r}: has no {SAFETENSORS} and no {SAFETENSORS_INDEX}; if its weights are pickles "
                f"({PICKLE}), {HOW_TO_ALLOW_PICKLES}"
            )
        return self._everything.tensors

    def _fetch(self, wanted: tuple[str, ...], revision: str | None) -> DirectoryCheckpoint:
        path = fetch(self.name, revision, wanted)
        return DirectoryCheckpoint(path, name=self.name, allow_pickle=self._allow_pickle)


def fetch(name: str, revision: str | None, wanted: tuple[str, ...]) -> Path:
    """A folder with those files of a repository that match `wanted`. Raises `ModelLoadError` saying why not."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # the Hub client lets its HTTP library's own errors through
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"{name!r}: no such directory, and fetching revision {revision or 'main'} from the Hugging Face "
            f"Hub failed: {type(error).__name__}: {reason}"
        ) from error
