"""Architectures by the name that `config.json` has for them, and what a config makes of one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import ValidationError

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.models.architecture import Architecture
from specengine.models.decoder import DecoderSpec

# Adding an architecture: one file, and its name here.
ARCHITECTURES = {
    "gpt2": "specengine.models.architectures.gpt2",
    "gpt_neox": "specengine.models.architectures.gpt_neox",
    "llama": "specengine.models.architectures.llama",
    "mistral": "specengine.models.architectures.mistral",
    "opt": "specengine.models.architectures.opt",
    "qwen2": "specengine.models.architectures.qwen2",
    "qwen3": "specengine.models.architectures.qwen3",
}


@dataclass(frozen=True)
class ConfiguredModel:
    """An architecture with a checked config."""

    architecture: Architecture
    config: Any
    spec: DecoderSpec

    def first_layers(self, num_layers: int) -> ConfiguredModel:
        """The same model without its later layers."""
        return replace(self, spec=replace(self.spec, num_layers=num_layers))


def configure(values: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ConfiguredModel:
    """What a config and the generation defaults beside it describe.

    where: begins the messages. Raises `ModelLoadError` naming the field that is missing, wrong or not supported.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelLoadError(f"{where}: model_type={shorten(model_type)} is not supported; known are {known}")
    architecture = cast(Architecture, importlib.import_module(ARCHITECTURES[model_type]))
    # What generation_config.json says about the end of a text wins, as in transformers.
    eos = generation.get("eos_token_id")
    merged = {**values, "eos_token_id": eos} if eos is not None else values
    try:
        config = architecture.Config.model_validate(merged)
    except ValidationError as error:
        raise ModelLoadError(f"{where}: {_describe(error)}") from error
    spec = architecture.spec(config)
    if lost := [token for token in config.end_of_text_ids() if token >= spec.vocab_size]:
        warnings.warn(
            f"{where}: eos_token_id={shorten(lost)} ends no text: the model has only {spec.vocab_size} ids",
            stacklevel=2,
        )
    return ConfiguredModel(architecture, config, spec)


def _describe(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        value = "" if problem["type"] == "missing" or not field else f"={shorten(problem['input'])}"
        problems.append(f"{field}{value}: {problem['msg']}" if field else problem["msg"])
    return "; ".join(problems).replace("Value error, ", "")
