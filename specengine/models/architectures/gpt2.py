"""GPT-2: learned positions, one fused projection for queries, keys and values, weights stored `[in, out]`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from specengine.models.architecture import (
    Activation,
    ArchitectureConfig,
    Epsilon,
    LayerTensors,
    LinearTensors,
    NormTensors,
    NumHeads,
    NumLayers,
    NumPositions,
    NumTokens,
    OuterTensors,
    TensorReader,
    Unsupported,
    Width,
    head_dim_of,
)
from specengine.models.decoder import DecoderSpec

MODEL_TYPE = "gpt2"
PREFIXES = ("transformer.", "")
TINY = {
    "model_type": MODEL_TYPE,
    "vocab_size": 64,
    "n_positions": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Config(ArchitectureConfig):
    """The keys of `config.json` that matter. `reorder_and_upcast_attn` does not: attention is always fp32."""

    vocab_size: NumTokens
    n_positions: NumPositions
    n_embd: Width
    n_layer: NumLayers
    n_head: NumHeads
    n_inner: Width | None = None
    activation_function: Activation = "gelu_tanh"
    layer_norm_epsilon: Epsilon = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Unsupported = None

    @model_validator(mode="after")
    def _check_heads(self) -> Config:
        head_dim_of(self.n_embd, self.n_head)
        return self

    @property
    def mlp_width(self) -> int:
        return self.n_inner or 4 * self.n_embd


def spec(config: Config) -> DecoderSpec:
    """The decoder that this config describes."""
    return DecoderSpec(
        architecture=MODEL_TYPE,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=head_dim_of(config.n_embd, config.n_head),
        intermediate_size=config.mlp_width,
        max_positions=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        tie_word_embeddings=config.tie_word_embeddings,
        **config.special_token_ids(config.vocab_size),
    )


def read_outer(read: TensorReader, config: Config) -> OuterTensors:
    """The tables, the final norm and the head."""
    vocab_size, width = config.vocab_size, config.n_embd
    table, head = read.table_and_head(
        "wte.weight", ("lm_head.weight",), vocab_size, width, is_tied=config.tie_word_embeddings
    )
    return OuterTensors(
        token_table=table,
        position_table=read("wpe.weight", config.n_positions, width),
        final_norm=_norm(read, "ln_f", width),
        head=head,
    )


def read_layer(read: TensorReader, config: Config, index: int) -> LayerTensors:
    """Layer `index`."""
    prefix, width = f"h.{index}", config.n_embd
    return LayerTensors(
        attention_norm=_norm(read, f"{prefix}.ln_1", width),
        qkv=_conv1d(read, f"{prefix}.attn.c_attn", width, 3 * width),
        attention_output=_conv1d(read, f"{prefix}.attn.c_proj", width, width),
        mlp_norm=_norm(read, f"{prefix}.ln_2", width),
        mlp_up=_conv1d(read, f"{prefix}.mlp.c_fc", width, config.mlp_width),
        mlp_down=_conv1d(read, f"{prefix}.mlp.c_proj", config.mlp_width, width),
    )


def _norm(read: TensorReader, name: str, width: int) -> NormTensors:
    return NormTensors(read(f"{name}.weight", width), read(f"{name}.bias", width))


def _conv1d(read: TensorReader, name: str, in_features: int, out_features: int) -> LinearTensors:
    weight = read(f"{name}.weight", in_features, out_features)
    return LinearTensors(weight.t(), read(f"{name}.bias", out_features))
