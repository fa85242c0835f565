"""Qwen3: a Llama that norms the heads of queries and keys."""

from __future__ import annotations

from specengine.models.architecture import LayerTensors, TensorReader
from specengine.models.decoder import DecoderSpec
from specengine.models.gated import PREFIXES, QwenConfig, read_outer
from specengine.models.gated import read_layer as read_gated_layer

__all__ = ["MODEL_TYPE", "PREFIXES", "TINY", "Config", "read_layer", "read_outer", "spec"]

MODEL_TYPE = "qwen3"
TINY = {
    "model_type": MODEL_TYPE,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 12,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Config(QwenConfig):
    """The keys of `config.json` that mean something here."""

    attention_bias: bool = False


def spec(config: Config) -> DecoderSpec:
    """The decoder that this config describes."""
    return config.spec(MODEL_TYPE)


def read_layer(read: TensorReader, config: Config, index: int) -> LayerTensors:
    """Layer `index`."""
    return read_gated_layer(
        read,
        config,
        index,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        has_head_norm=True,
    )
