"""Where a checkpoint's tensors come from: safetensors, a pickle if asked for, or a module in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specengine.errors import ModelLoadError
from specengine.json_file import read_json, shorten
from specengine.models.safetensors_header import TensorInfo, read_safetensors_header

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """Tensors by name, described before any is loaded."""

    origin: str
    tensors: dict[str, TensorInfo]

    def load(self, name: str) -> Tensor:
        """The tensor as stored; may share memory with the source."""


def open_checkpoint(directory: Path, *, allow_pickle: bool) -> TensorSource:
    """The weights of a directory: safetensors if it has them, else pickles if `allow_pickle`.

    Raises `ModelLoadError` for a missing, malformed or unsafe checkpoint.
    """
    if (directory / SAFETENSORS).exists():
        return SafetensorsSource(directory, [SAFETENSORS])
    if (directory / SAFETENSORS_INDEX).exists():
        return SafetensorsSource(directory, indexed_files(directory, SAFETENSORS_INDEX, ".safetensors"))
    has_pickle = (directory / PICKLE).exists() or (directory / PICKLE_INDEX).exists()
    if has_pickle and allow_pickle:
        is_single = (directory / PICKLE).exists()
        files = [PICKLE] if is_single else indexed_files(directory, PICKLE_INDEX, ".bin")
        return StateDictSource(_read_pickles(directory, files), str(directory))
    raise ModelLoadError(
        f"{directory}: no {SAFETENSORS} and no {SAFETENSORS_INDEX}"
        + ("; its weights are pickles, which are read only with allow_pickle=True" if has_pickle else "")
    )


class SafetensorsSource:
    """One or more safetensors files, every header checked before the first tensor is read."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self.origin = str(directory)
        self._paths: dict[str, Path] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_safetensors_header(directory / file).items():
                if name in tensors:
                    raise ModelLoadError(f"{directory / file}: tensor {shorten(name)} is in two shards")
                tensors[name], self._paths[name] = info, directory / file
        self.tensors = tensors

    def load(self, name: str) -> Tensor:
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path}: tensor {shorten(name)}: {error}") from error
        return tensor


class StateDictSource:
    """A state dict in memory."""

    def __init__(self, state: Mapping[str, Any], origin: str) -> None:
        self.origin = origin
        self._state = {name: tensor for name, tensor in state.items() if _is_plain_tensor(tensor)}
        self.tensors = {name: _describe(tensor) for name, tensor in self._state.items()}

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name].detach()
        return tensor


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _describe(tensor: Tensor) -> TensorInfo:
    dtype = tensor.dtype if tensor.dtype in _FLOAT_DTYPES and not tensor.is_meta else None
    return TensorInfo(dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def indexed_files(directory: Path, index_name: str, suffix: str) -> list[str]:
    """The shards that an index names, in order. Raises `ModelLoadError` for one outside the directory."""
    where = directory / index_name
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{where}: weight_map: {shorten(weight_map)} does not map tensors to files")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{where}: weight_map: every file must be a string")
    files = list(dict.fromkeys(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.\-]+", file) or not file.endswith(suffix):
            raise ModelLoadError(
                f"{where}: weight_map: {shorten(file)} is no {suffix} file of this directory"
            )
        _check_inside(directory, file, where)
    return files


def _check_inside(directory: Path, file: str, where: Path) -> None:
    roots = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":  # the Hub's cache links into the repository's blobs
        roots.append(directory.resolve().parent.parent / "blobs")
    target = (directory / file).resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelLoadError(f"{where}: weight_map: {shorten(file)} links to {target}, outside the directory")


def _read_pickles(directory: Path, files: list[str]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for file in files:
        path = directory / file
        if not path.is_file():
            raise ModelLoadError(f"{path}: no such file")
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
