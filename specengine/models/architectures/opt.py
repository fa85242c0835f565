"""OPT, the pre-norm sizes: learned positions whose table starts with two rows that nothing uses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from specengine.models.architecture import (
    Activation,
    ArchitectureConfig,
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
from specengine.models.stacking import stacked

MODEL_TYPE = "opt"
PREFIXES = ("model.decoder.", "decoder.", "model.", "")
TINY = {
    "model_type": MODEL_TYPE,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
}

POSITION_OFFSET = 2
NORM_EPS = 1e-5  # not in the config: every OPT has PyTorch's default


class Config(ArchitectureConfig):
    """The keys of `config.json` that mean something here."""

    vocab_size: NumTokens
    max_position_embeddings: NumPositions
    hidden_size: Width
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    ffn_dim: Width
    word_embed_proj_dim: Width | None = None
    activation_function: Activation = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    do_layer_norm_before: Literal[True] = True
    remove_final_layer_norm: Unsupported = Field(default=None, alias="_remove_final_layer_norm")

    @model_validator(mode="after")
    def _check_sizes(self) -> Config:
        head_dim_of(self.hidden_size, self.num_attention_heads)
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ValueError(
                f"word_embed_proj_dim={self.word_embed_proj_dim} is not supported: "
                f"it must be hidden_size={self.hidden_size}"
            )
        return self


def spec(config: Config) -> DecoderSpec:
    """The decoder that this config describes."""
    return DecoderSpec(
        architecture=MODEL_TYPE,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=head_dim_of(config.hidden_size, config.num_attention_heads),
        intermediate_size=config.ffn_dim,
        max_positions=config.max_position_embeddings,
        norm_eps=NORM_EPS,
        activation=config.activation_function,
        tie_word_embeddings=config.tie_word_embeddings,
        **config.special_token_ids(config.vocab_size),
    )


def read_outer(read: TensorReader, config: Config) -> OuterTensors:
    """The tables, the final norm and the head. Position p is row p + 2 of the stored table."""
    vocab_size, width = config.vocab_size, config.hidden_size
    table, head = read.table_and_head(
        "embed_tokens.weight", ("lm_head.weight",), vocab_size, width, is_tied=config.tie_word_embeddings
    )
    positions = read("embed_positions.weight", config.max_position_embeddings + POSITION_OFFSET, width)
    return OuterTensors(
        token_table=table,
        position_table=positions[POSITION_OFFSET:],
        final_norm=_norm(read, "final_layer_norm", config),
        head=head,
    )


def read_layer(read: TensorReader, config: Config, index: int) -> LayerTensors:
    """Layer `index`."""
    prefix, width = f"layers.{index}", config.hidden_size
    return LayerTensors(
        attention_norm=_norm(read, f"{prefix}.self_attn_layer_norm", config),
        qkv=_query_key_value(read, f"{prefix}.self_attn", config),
        attention_output=_linear(read, f"{prefix}.self_attn.out_proj", width, width, config),
        mlp_norm=_norm(read, f"{prefix}.final_layer_norm", config),
        mlp_up=_linear(read, f"{prefix}.fc1", width, config.ffn_dim, config),
        mlp_down=_linear(read, f"{prefix}.fc2", config.ffn_dim, width, config),
    )


def _norm(read: TensorReader, name: str, config: Config) -> NormTensors:
    if not config.layer_norm_elementwise_affine:
        return NormTensors(None, None)
    return NormTensors(read(f"{name}.weight", config.hidden_size), read(f"{name}.bias", config.hidden_size))


def _linear(
    read: TensorReader, name: str, in_features: int, out_features: int, config: Config
) -> LinearTensors:
    bias = read(f"{name}.bias", out_features) if config.enable_bias else None
    return LinearTensors(read(f"{name}.weight", out_features, in_features), bias)


def _query_key_value(read: TensorReader, name: str, config: Config) -> LinearTensors:
    width = config.hidden_size
    parts = [_linear(read, f"{name}.{kind}_proj", width, width, config) for kind in "qkv"]
    return stacked(parts)
