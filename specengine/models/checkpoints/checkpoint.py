"""What every kind of checkpoint can be asked: its config, generation defaults, tokenizer and tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from specengine.models.checkpoints.tensors import TensorSource
from specengine.models.decoder import DecoderSpec
from specengine.models.registry import ConfiguredModel
from specengine.tokenizer import Tokenizer


class Checkpoint(ABC):
    """A model's files, or what stands for them. Each part is read when it is first asked for, and kept.

    name: what the caller gave, for messages

    Every part raises `ModelLoadError` naming file and field where it is missing, malformed, unsafe or unsupported.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def model(self) -> ConfiguredModel:
        """The architecture and its checked config; no weight is looked at."""

    @property
    @abstractmethod
    def generation_defaults(self) -> Mapping[str, Any]:
        """What `generation_config.json` says, unchecked; empty where there is none."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """None if there is none that is read; `explain_missing_tokenizer` says more."""

    @property
    def chat_template(self) -> str | None:
        """How conversations are written out, in Jinja's language; None if the checkpoint does not say."""
        return None

    @property
    @abstractmethod
    def tensors(self) -> TensorSource:
        """The weights, described; each is loaded when asked for."""

    @property
    def spec(self) -> DecoderSpec:
        """What the config describes."""
        return self.model.spec

    def explain_missing_tokenizer(self) -> str:
        """What to do about a tokenizer that is there and not read; empty if there is none."""
        return ""
