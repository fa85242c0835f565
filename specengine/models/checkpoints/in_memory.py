"""A `transformers` model in memory; its weights are copied when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from specengine.errors import ModelLoadError
from specengine.models.checkpoints.checkpoint import Checkpoint
from specengine.models.checkpoints.tensors import StateDictSource, TensorSource
from specengine.models.registry import ConfiguredModel, configure
from specengine.tokenizer import Tokenizer


class ModuleCheckpoint(Checkpoint):
    """A module with a transformers config."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(
            getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__
        )
        self._module = module

    @cached_property
    def model(self) -> ConfiguredModel:
        name, config = type(self._module).__name__, getattr(self._module, "config", None)
        if config is None or not hasattr(config, "model_type"):
            raise ModelLoadError(f"{name}: a module without a transformers config")
        return configure(config.to_dict(), self.generation_defaults, f"{name}.config")

    @cached_property
    def generation_defaults(self) -> Mapping[str, Any]:
        generation = getattr(self._module, "generation_config", None)
        return {} if generation is None else generation.to_dict()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None

    @cached_property
    def tensors(self) -> TensorSource:
        return StateDictSource(self._module.state_dict(), self.name)
