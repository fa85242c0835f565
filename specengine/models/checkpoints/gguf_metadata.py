"""The metadata of a GGUF file, key by key and type by type; and the config.json that it amounts to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.models.checkpoints.gguf_header import GgufTensor

T = TypeVar("T", bool, int, float, str)

# The factors of `rope_freqs.weight` are those of Llama 3's scaling; the file does not say with which numbers.
ROPE_FACTORS = "rope_freqs.weight"
_LOW, _HIGH, _POSITIONS = 1.0, 4.0, 8192
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class GgufMetadata:
    """Values by key; each is asked for with the type that it must have. Errors name file and key."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type[T]) -> T | None:
        """None where the file does not have it. Whole numbers pass for `float`."""
        value = self.values.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or type(value) is kind:
            return value
        raise self.error(key, f"{shorten(value)} is no {kind.__name__}")

    def require(self, key: str, kind: type[T]) -> T:
        """The same; a missing key is an error."""
        value = self.get(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.path}: metadata {shorten(key)} is missing")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """An array of strings."""
        value = self.values.get(key)
        if value is None or isinstance(value, tuple):
            return value
        raise self.error(key, f"{shorten(value)} is no array of strings")

    def numbers(self, key: str) -> np.ndarray | None:
        """An array of numbers."""
        value = self.values.get(key)
        if value is None or isinstance(value, np.ndarray):
            return value
        raise self.error(key, f"{shorten(value)} is no array of numbers")

    def per_layer(self, key: str) -> int:
        """A whole number, or an array that has the same for each layer."""
        value = self.values.get(key)
        if not isinstance(value, np.ndarray):
            return self.require(key, int)
        if value.dtype.kind not in "iu" or not len(value) or (value != value[0]).any():
            raise self.error(key, "layers that differ in this are not supported")
        return int(value[0])

    def error(self, key: str, problem: str) -> ModelLoadError:
        """What is wrong with the value of a key."""
        return ModelLoadError(f"{self.path}: metadata {shorten(key)}: {problem}")


def build_config(
    metadata: GgufMetadata, tensors: Mapping[str, GgufTensor], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The `config.json` that says what this file says, for the architecture's own checks.

    rope_factors: what `rope_freqs.weight` holds, if the file has it

    Raises `ModelLoadError` naming key and value for an architecture or a setting that is not supported.
    """
    name = metadata.require("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise metadata.error("general.architecture", f"{shorten(name)} is not supported; known are {known}")
    kind = metadata.get("general.type", str)
    if kind not in (None, "model"):
        raise metadata.error("general.type", f"{shorten(kind)} is no model")
    parts = metadata.get("split.count", int)
    if parts is not None and parts > 1:
        raise metadata.error(
            "split.count",
            f"the model is split into {parts} files, which is not read: join them with llama-gguf-split --merge",
        )
    if metadata.get(f"{name}.expert_count", int):
        raise metadata.error(f"{name}.expert_count", "mixtures of experts are not supported")
    ends = [metadata.get(f"tokenizer.ggml.{key}", int) for key in _END_TOKENS]
    return {
        "vocab_size": _vocab_size(metadata, tensors, name),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": [end for end in ends if end is not None] or None,
        **ARCHITECTURES[name](_Keys(metadata, name, tensors, rope_factors)),
    }


def _vocab_size(metadata: GgufMetadata, tensors: Mapping[str, GgufTensor], name: str) -> int:
    table = tensors.get("token_embd.weight")
    return metadata.require(f"{name}.vocab_size", int) if table is None else table.shape[0]


@dataclass(frozen=True)
class _Keys:
    """The keys of one architecture, without its name in front."""

    metadata: GgufMetadata
    name: str
    tensors: Mapping[str, GgufTensor]
    rope_factors: np.ndarray | None

    def whole(self, key: str) -> int:
        return self.metadata.require(f"{self.name}.{key}", int)

    def optional(self, key: str, kind: type[T]) -> T | None:
        return self.metadata.get(f"{self.name}.{key}", kind)

    def per_layer(self, key: str) -> int:
        return self.metadata.per_layer(f"{self.name}.{key}")

    @property
    def head_dim(self) -> int:
        """Features of a head, which keys and values must share."""
        heads, width = self.per_layer("attention.head_count"), self.whole("embedding_length")
        key, value = (self.optional(f"attention.{part}_length", int) for part in ("key", "value"))
        features = key or (width // heads if heads > 0 else 0)
        if (value or features) != features:
            raise self.metadata.error(
                f"{self.name}.attention.value_length",
                f"{value}: values of another width than keys ({features}) are not supported",
            )
        return features


def _gated(keys: _Keys) -> dict[str, Any]:
    heads, features = keys.per_layer("attention.head_count"), keys.head_dim
    # Files from before grouped queries name no heads of keys and values.
    has_kv_heads = f"{keys.name}.attention.head_count_kv" in keys.metadata.values
    return {
        "model_type": keys.name,
        "hidden_size": keys.whole("embedding_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.per_layer("attention.head_count_kv") if has_kv_heads else heads,
        "head_dim": features,
        "intermediate_size": keys.per_layer("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.metadata.require(f"{keys.name}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(keys, features),
        "attention_bias": not {"blk.0.attn_q.bias", "blk.0.attn_output.bias"}.isdisjoint(keys.tensors),
        "mlp_bias": "blk.0.ffn_down.bias" in keys.tensors,
    }


def _rope(keys: _Keys, features: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": keys.optional("rope.freq_base", float) or 10000.0}
    rotary = keys.optional("rope.dimension_count", int)
    if rotary is not None and rotary != features > 0:
        rope["partial_rotary_factor"] = rotary / features
    kind = keys.optional("rope.scaling.type", str) or "none"
    # Files from before there were kinds of scaling have the linear one's factor.
    factor = keys.optional("rope.scaling.factor", float) or keys.optional("rope.scale_linear", float)
    if kind == "none" and keys.optional("rope.scale_linear", float) not in (None, 1.0):
        kind = "linear"
    if keys.rope_factors is not None:
        if kind != "none":
            raise keys.metadata.error(
                f"{keys.name}.rope.scaling.type", f"{shorten(kind)} and a tensor {ROPE_FACTORS} beside it"
            )
        return {**rope, **_llama3(keys, rope["rope_theta"], features)}
    return rope if kind == "none" else {**rope, "rope_type": kind, "factor": factor}


def _llama3(keys: _Keys, theta: float, features: int) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give the factors of the file, each of a frequency."""
    found = np.asarray(keys.rope_factors, np.float64)
    factor = float(found.max(initial=1.0))
    wavelength = 2 * np.pi * theta ** (np.arange(0, features, 2) / features) if theta > 0 else np.zeros(0)
    share = np.clip((_POSITIONS / wavelength - _LOW) / (_HIGH - _LOW), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if expected.shape != found.shape or not np.allclose(found, expected, rtol=1e-4, atol=0):
        raise ModelLoadError(
            f"{keys.metadata.path}: tensor {ROPE_FACTORS}: rotary factors of another kind than Llama 3's "
            f"(low_freq_factor {_LOW:g}, high_freq_factor {_HIGH:g}, {_POSITIONS} positions) are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _POSITIONS,
    }


def _llama(keys: _Keys) -> dict[str, Any]:
    window = keys.optional("attention.sliding_window", int)
    kind = {"model_type": "mistral", "sliding_window": window} if window else {}
    return {**_gated(keys), **kind}


def _qwen(keys: _Keys) -> dict[str, Any]:
    window = keys.optional("attention.sliding_window", int)
    return {**_gated(keys), "use_sliding_window": bool(window), "sliding_window": window or None}


def _gpt2(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_positions": keys.whole("context_length"),
        "n_embd": keys.whole("embedding_length"),
        "n_layer": keys.whole("block_count"),
        "n_head": keys.per_layer("attention.head_count"),
        "n_inner": keys.per_layer("feed_forward_length"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.metadata.require("gpt2.attention.layer_norm_epsilon", float),
    }


def _gpt_neox(keys: _Keys) -> dict[str, Any]:
    heads, width = keys.per_layer("attention.head_count"), keys.whole("embedding_length")
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": keys.per_layer("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "layer_norm_eps": keys.metadata.require("gptneox.attention.layer_norm_epsilon", float),
        "use_parallel_residual": keys.metadata.require("gptneox.use_parallel_residual", bool),
        "rotary_pct": keys.whole("rope.dimension_count") * heads / width if width > 0 else 0.0,
        "rotary_emb_base": keys.optional("rope.freq_base", float) or 10000.0,
    }


# By what a file calls them. Mistral's models are stored as "llama".
ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}
