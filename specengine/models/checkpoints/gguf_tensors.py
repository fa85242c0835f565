"""The tensors of a GGUF file under the names that the architectures read, each converted when it is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.models.checkpoints.gguf_header import GgufTensor
from specengine.models.checkpoints.gguf_metadata import ROPE_FACTORS
from specengine.models.checkpoints.gguf_types import CONVERTED, FLOATS, GROUPED, read_tensor
from specengine.models.checkpoints.safetensors_header import TensorInfo

# Names of a file, by those of the architecture; a layer's without "blk.N." and without the number of the layer.
_GATED = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "layers.{}.input_layernorm",
    "attn_q": "layers.{}.self_attn.q_proj",
    "attn_k": "layers.{}.self_attn.k_proj",
    "attn_v": "layers.{}.self_attn.v_proj",
    "attn_output": "layers.{}.self_attn.o_proj",
    "attn_q_norm": "layers.{}.self_attn.q_norm",
    "attn_k_norm": "layers.{}.self_attn.k_norm",
    "ffn_norm": "layers.{}.post_attention_layernorm",
    "ffn_gate": "layers.{}.mlp.gate_proj",
    "ffn_up": "layers.{}.mlp.up_proj",
    "ffn_down": "layers.{}.mlp.down_proj",
}
_GPT2 = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
    "attn_norm": "h.{}.ln_1",
    "attn_qkv": "h.{}.attn.c_attn",
    "attn_output": "h.{}.attn.c_proj",
    "ffn_norm": "h.{}.ln_2",
    "ffn_up": "h.{}.mlp.c_fc",
    "ffn_down": "h.{}.mlp.c_proj",
}
_GPT_NEOX = {
    "token_embd": "embed_in",
    "output_norm": "final_layer_norm",
    "output": "embed_out",
    "attn_norm": "layers.{}.input_layernorm",
    "attn_qkv": "layers.{}.attention.query_key_value",
    "attn_output": "layers.{}.attention.dense",
    "ffn_norm": "layers.{}.post_attention_layernorm",
    "ffn_up": "layers.{}.mlp.dense_h_to_4h",
    "ffn_down": "layers.{}.mlp.dense_4h_to_h",
}
_NAMES = {"llama": _GATED, "qwen2": _GATED, "qwen3": _GATED, "gpt2": _GPT2, "gptneox": _GPT_NEOX}
_TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # which GPT-2's checkpoints store [in, out]


class GgufSource:
    """The tensors of one file, mapped into memory. See `TensorSource`.

    architecture: what the file calls it
    config:       what the file says, checked; tells the order of the rows
    """

    def __init__(self, path: Path, stored: Mapping[str, GgufTensor], architecture: str, config: Any) -> None:
        self.origin = str(path)
        self._stored: dict[str, GgufTensor] = {}
        self._orders: dict[str, Callable[[], Tensor]] = {}
        self._transposed: set[str] = set()
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in stored.items():
            if name != ROPE_FACTORS:
                self._add(name, tensor, architecture, config)
        self._converted = {tensor.type for tensor in self._stored.values()} & CONVERTED.keys()

    def load(self, name: str) -> Tensor | GroupedWeight:
        """The tensor in the format that the file has, or in one that holds it: groups stay groups."""
        self._warn_of_conversions()
        tensor = self._stored[name]
        weight = read_tensor(map_tensor(Path(self.origin), tensor), tensor.type, tensor.shape)
        if name in self._orders:
            weight = weight[self._orders[name]()]
        if name in self._transposed:
            return numbers(weight).t()
        return weight

    def _add(self, stored_name: str, tensor: GgufTensor, architecture: str, config: Any) -> None:
        part, name = self._name(stored_name, architecture)
        if tensor.type not in FLOATS and tensor.type not in GROUPED and tensor.type not in CONVERTED:
            raise ModelLoadError(
                f"{self.origin}: tensor {shorten(stored_name)} is stored as {tensor.type}, which is not read"
            )
        shape = tensor.shape
        if architecture == "gpt2" and part in _TRANSPOSED and len(shape) == 2:
            self._transposed.add(name)
            shape = shape[::-1]
        dtype = FLOATS.get(tensor.type, torch.float32)
        format = None if tensor.type in FLOATS else tensor.type
        self.tensors[name] = TensorInfo(dtype, shape, tensor.stop - tensor.start, format)
        self._stored[name] = tensor
        if order := _row_order(architecture, part, config):
            self._orders[name] = order

    def _name(self, stored: str, architecture: str) -> tuple[str, str]:
        """Which part of a model a tensor is, and its name there."""
        match = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.(weight|bias)", stored)
        layer, part, kind = match.groups() if match else (None, "", "")
        pattern = _NAMES[architecture].get(part)
        if pattern is None or ("{}" in pattern) != (layer is not None):
            raise ModelLoadError(
                f"{self.origin}: tensor {shorten(stored)} is none that a {architecture} model has here: specengine "
                "would compute something else than the file means"
            )
        return part, f"{pattern.format(layer)}.{kind}"

    def _warn_of_conversions(self) -> None:
        if self._converted:
            pairs = ", ".join(f"{each} to {CONVERTED[each]}" for each in sorted(self._converted))
            warnings.warn(f"{self.origin}: weights are converted as they are loaded: {pairs}", stacklevel=2)
            self._converted = set()


def map_tensor(path: Path, tensor: GgufTensor) -> np.ndarray:
    """A tensor's bytes, mapped into memory. Raises `ModelLoadError` where the file is not what it was."""
    try:
        return np.memmap(path, np.uint8, mode="c", offset=tensor.start, shape=(tensor.stop - tensor.start,))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: has changed since its header was read ({error})") from error


def _row_order(architecture: str, part: str, config: Any) -> Callable[[], Tensor] | None:
    """The rows of the file in the architecture's order, where the two differ."""
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        # llama.cpp rotates neighbours, (0, 1), (2, 3), …; the architecture the two halves of a head.
        heads = config.num_attention_heads if part == "attn_q" else config.kv_heads
        half = config.features // 2
        return lambda: torch.arange(heads * half * 2).view(heads, half, 2).transpose(1, 2).flatten()
    if architecture == "gptneox" and part == "attn_qkv":
        # Queries, keys, values of all heads; the architecture has them head by head.
        width, heads = config.hidden_size, config.num_attention_heads
        return lambda: torch.arange(3 * width).view(3, heads, -1).transpose(0, 1).flatten()
    return None
