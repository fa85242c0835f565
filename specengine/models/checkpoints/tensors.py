"""Tensors by name, described before any is loaded: from safetensors, or from a state dict in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.kernels.types.grouped import GroupedWeight
from specengine.models.checkpoints.safetensors_header import TensorInfo, read_safetensors_header

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """Tensors by name, described before any is loaded."""

    origin: str
    tensors: dict[str, TensorInfo]

    def load(self, name: str) -> Tensor | GroupedWeight:
        """The tensor as stored; may share memory with the source."""


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
