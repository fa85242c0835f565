"""A GGUF file: one file with config, tensors, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from specengine.errors import ModelLoadError
from specengine.models.checkpoints.checkpoint import Checkpoint
from specengine.models.checkpoints.gguf_header import GgufHeader, read_gguf_header
from specengine.models.checkpoints.gguf_metadata import ROPE_FACTORS, GgufMetadata, build_config
from specengine.models.checkpoints.gguf_tensors import GgufSource, map_tensor
from specengine.models.checkpoints.gguf_tokenizer import read_gguf_tokenizer
from specengine.models.checkpoints.tensors import TensorSource
from specengine.models.registry import ConfiguredModel, configure
from specengine.tokenizer import Tokenizer

SUFFIX = ".gguf"


class GgufCheckpoint(Checkpoint):
    """A file on this machine."""

    def __init__(self, path: Path, *, name: str) -> None:
        super().__init__(name)
        self.path = path

    @cached_property
    def _header(self) -> GgufHeader:
        return read_gguf_header(self.path)

    @cached_property
    def _metadata(self) -> GgufMetadata:
        return GgufMetadata(self.path, self._header.metadata)

    @cached_property
    def model(self) -> ConfiguredModel:
        config = build_config(self._metadata, self._header.tensors, self._rope_factors())
        return configure(config, {}, f"{self.path}: metadata")

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        return {}

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return read_gguf_tokenizer(self._metadata)

    @property
    def chat_template(self) -> str | None:
        return self._metadata.get("tokenizer.chat_template", str)

    @cached_property
    def tensors(self) -> TensorSource:
        architecture = self._metadata.require("general.architecture", str)
        return GgufSource(self.path, self._header.tensors, architecture, self.model.config)

    def _rope_factors(self) -> np.ndarray | None:
        tensor = self._header.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        if tensor.type != "F32":
            raise ModelLoadError(f"{self.path}: tensor {ROPE_FACTORS} is stored as {tensor.type}, not as F32")
        return np.array(map_tensor(self.path, tensor)).view(np.float32)
