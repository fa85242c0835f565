"""From a directory, a Hub name or a model in memory to a `Decoder`."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from specengine.errors import ModelLoadError
from specengine.json_file import read_json, shorten
from specengine.models.architecture import Architecture
from specengine.models.checkpoint import StateDictSource, TensorSource, open_checkpoint
from specengine.models.checkpoints.tokenizer_files import TOKENIZER_FILES, find_tokenizer
from specengine.models.decoder import Decoder, DecoderSpec
from specengine.models.weights import ConfiguredModel, Progress, read_weights
from specengine.ops.backend import Backend
from specengine.tokenizer import Tokenizer, Vocabulary
from specengine.weight_formats import WEIGHT_FORMATS, WeightFormat

# Adding an architecture: one file, and its name here.
ARCHITECTURES = {
    "gpt2": "specengine.models.gpt2",
    "gpt_neox": "specengine.models.gpt_neox",
    "opt": "specengine.models.opt",
}

ModelSource = str | os.PathLike[str] | torch.nn.Module

MAX_CONFIG_BYTES = 4 << 20
_CONFIG_FILES = ["config.json", "generation_config.json"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLE_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    name:             what it was loaded from, for messages
    tokenizer:        None if the checkpoint has none
    checkpoint_dtype: what most of the checkpoint's bytes are stored in
    format:           what its linear layers are stored in
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None
    checkpoint_dtype: torch.dtype
    format: WeightFormat

    @property
    def vocabulary(self) -> Vocabulary:
        """What `check_compatible` compares."""
        return Vocabulary(self.name, self.decoder.spec.vocab_size, self.tokenizer)


def read_spec(source: ModelSource, *, revision: str | None = None) -> tuple[DecoderSpec, str]:
    """What a source's config describes, and the source's name. Of a Hub model only the config is fetched.

    Raises `ModelLoadError` as `load_model` does.
    """
    if isinstance(source, torch.nn.Module):
        return _configure_module(source).spec, _module_name(source)
    directory = _find_directory(source, revision, _CONFIG_FILES)
    return _configure_directory(directory).spec, os.fspath(source)


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | str = "auto",
    weight_dtype: str = "auto",
    device: torch.device,
    backend: Backend,
    allow_pickle: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """Loads a model and packs its weights for a backend.

    source:       a directory with config.json and safetensors; the name of a model on the Hugging Face Hub,
                  if there is no such directory; or a `transformers` model in memory, whose weights are copied
    dtype:        of linear layers and tables (norms and biases are fp32). "auto": on CUDA the checkpoint's,
                  on a CPU bf16 if it has it natively and the checkpoint is 16-bit, else fp32
    weight_dtype: a name in `WEIGHT_FORMATS`, instead of `dtype`; one with scales is for linear layers, the head
                  included, and `dtype` is the tables'
    allow_pickle: read `pytorch_model.bin` if there are no safetensors, with `weights_only=True`
    revision:     of a Hub model
    progress:     called with (bytes read, bytes in all) after every tensor
    tokenizer:    instead of the directory's

    Raises `ModelLoadError` naming file and field for a malformed, unsafe or unsupported checkpoint, before
    anything of its size is allocated, and `ValueError` for a dtype that the backend lacks.
    """
    weights_from: TensorSource
    if isinstance(source, torch.nn.Module):
        name = _module_name(source)
        model = _configure_module(source)
        weights_from = StateDictSource(source.state_dict(), name)
    else:
        wanted = [*_CONFIG_FILES, *TOKENIZER_FILES, *_WEIGHT_FILES, *(_PICKLE_FILES if allow_pickle else [])]
        directory, name = _find_directory(source, revision, wanted), os.fspath(source)
        model = _configure_directory(directory)
        tokenizer = tokenizer or find_tokenizer(directory)
        weights_from = open_checkpoint(directory, allow_pickle=allow_pickle)
    checkpoint_dtype = _main_dtype(weights_from)
    named = WEIGHT_FORMATS.get(weight_dtype)
    if named is not None and not named.has_scales:
        dtype = named.dtype
    chosen = choose_dtype(dtype, checkpoint_dtype, device, backend)
    format = named or WEIGHT_FORMATS[str(chosen).removeprefix("torch.")]
    weights = read_weights(
        model,
        weights_from,
        dtype=chosen,
        format=format,
        device=device,
        backend=backend,
        progress=progress,
    )
    return LoadedModel(name, Decoder(model.spec, weights, backend), tokenizer, checkpoint_dtype, format)


def choose_dtype(
    requested: torch.dtype | str, checkpoint_dtype: torch.dtype, device: torch.device, backend: Backend
) -> torch.dtype:
    """The dtype to store weights in. Raises `ValueError` naming what the backend supports."""
    if requested == "auto":
        wanted = checkpoint_dtype
        if device.type == "cpu":
            is_16_bit = checkpoint_dtype.itemsize == 2
            wanted = torch.bfloat16 if is_16_bit and has_native_bf16() else torch.float32
        return wanted if wanted in backend.supported_dtypes else torch.float32
    if requested not in backend.supported_dtypes:
        supported = ", ".join(str(dtype) for dtype in backend.supported_dtypes)
        raise ValueError(f"dtype: backend={backend.name!r} does not support {requested}; it has {supported}")
    return requested


def has_native_bf16() -> bool:
    """Whether this machine's processor multiplies bf16 in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _main_dtype(source: TensorSource) -> torch.dtype:
    num_bytes: Counter[torch.dtype] = Counter()
    for info in source.tensors.values():
        if info.dtype is not None:
            num_bytes[info.dtype] += info.num_bytes
    if not num_bytes:
        raise ModelLoadError(f"{source.origin}: holds no floating-point tensor")
    return num_bytes.most_common(1)[0][0]


def _module_name(module: torch.nn.Module) -> str:
    name = getattr(getattr(module, "config", None), "_name_or_path", "")
    return name or type(module).__name__


def _configure_module(module: torch.nn.Module) -> ConfiguredModel:
    name, config = type(module).__name__, getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ModelLoadError(f"{name}: a module without a transformers config")
    generation = getattr(module, "generation_config", None)
    return _configure(config.to_dict(), {} if generation is None else generation.to_dict(), f"{name}.config")


def _configure_directory(directory: Path) -> ConfiguredModel:
    path = directory / "generation_config.json"
    generation = read_json(path, MAX_CONFIG_BYTES) if path.exists() else {}
    config_path = directory / "config.json"
    return _configure(read_json(config_path, MAX_CONFIG_BYTES), generation, str(config_path))


def _configure(values: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ConfiguredModel:
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
    return ConfiguredModel(architecture, config, architecture.spec(config))


def _describe(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        value = "" if problem["type"] == "missing" or not field else f"={shorten(problem['input'])}"
        problems.append(f"{field}{value}: {problem['msg']}" if field else problem["msg"])
    return "; ".join(problems).replace("Value error, ", "")


def _find_directory(source: str | os.PathLike[str], revision: str | None, wanted: list[str]) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"model: expected a directory, a Hub name or a transformers model, not {type(source).__name__}"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{path}: is a file; give the directory that holds config.json and the weights")
    if isinstance(source, str) and re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)?", source):
        return _download(source, revision, wanted)
    raise ModelLoadError(f"{path}: no such directory, and no name that the Hugging Face Hub could have")


def _download(name: str, revision: str | None, wanted: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub client lets its HTTP library's own errors through
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"{name!r}: no such directory, and fetching revision {revision or 'main'} from the Hugging Face "
            f"Hub failed: {type(error).__name__}: {reason}"
        ) from error
