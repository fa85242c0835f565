"""GPT-NeoX and Pythia: parallel residual, rotary positions on a part of each head."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    Width,
    head_dim_of,
)
from specengine.models.decoder import DecoderSpec

MODEL_TYPE = "gpt_neox"
PREFIXES = ("gpt_neox.", "")
TINY = {
    "model_type": MODEL_TYPE,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "rotary_pct": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

Theta = Annotated[float, Field(gt=0.0, le=1e12)]
RotaryShare = Annotated[float, Field(gt=0.0, le=1.0)]


class RotaryParameters(BaseModel):
    """`rope_parameters` of transformers 5. Scaled variants have other types and further keys: refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: Theta | None = None
    partial_rotary_factor: RotaryShare | None = None


class Config(ArchitectureConfig):
    """The keys of `config.json` that mean something here.

    Rotary settings come as `rotary_pct` and `rotary_emb_base`, or as `rope_parameters`, which win.
    """

    vocab_size: NumTokens
    max_position_embeddings: NumPositions
    hidden_size: Width
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    intermediate_size: Width
    hidden_act: Activation = "gelu"
    layer_norm_eps: Epsilon = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    head_dim: Width | None = None
    rotary_pct: RotaryShare = 0.25
    rotary_emb_base: Theta = 10000.0
    rope_parameters: RotaryParameters | None = None
    rope_scaling: RotaryParameters | None = None

    @model_validator(mode="after")
    def _check_sizes(self) -> Config:
        head_dim = head_dim_of(self.hidden_size, self.num_attention_heads)
        if self.head_dim not in (None, head_dim):
            raise ValueError(f"head_dim={self.head_dim} is not supported: it must be {head_dim}")
        if self.rotary_dim == 0 or self.rotary_dim % 2:
            raise ValueError(
                f"{self.rotary_dim} of {head_dim} features of a head are rotary: it must be even and positive"
            )
        return self

    @property
    def _rope(self) -> RotaryParameters:
        return self.rope_scaling or self.rope_parameters or RotaryParameters()

    @property
    def rotary_dim(self) -> int:
        """Rotated features of each head."""
        share = self._rope.partial_rotary_factor or self.rotary_pct
        return int(head_dim_of(self.hidden_size, self.num_attention_heads) * share)

    @property
    def rotary_base(self) -> float:
        """The base of the frequencies."""
        return self._rope.rope_theta or self.rotary_emb_base


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
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        rotary_dim=config.rotary_dim,
        rotary_base=config.rotary_base,
        parallel_residual=config.use_parallel_residual,
        tie_word_embeddings=config.tie_word_embeddings,
        **config.special_token_ids(config.vocab_size),
    )


def read_outer(read: TensorReader, config: Config) -> OuterTensors:
    """The token table, the final norm and the head, which transformers 5 calls `lm_head`."""
    vocab_size, width = config.vocab_size, config.hidden_size
    names = ("embed_out.weight", "lm_head.weight")
    table, head = read.table_and_head(
        "embed_in.weight", names, vocab_size, width, is_tied=config.tie_word_embeddings
    )
    return OuterTensors(
        token_table=table,
        position_table=None,
        final_norm=_norm(read, "final_layer_norm", width),
        head=head,
    )


def read_layer(read: TensorReader, config: Config, index: int) -> LayerTensors:
    """Layer `index`."""
    prefix, width, mlp_width = f"layers.{index}", config.hidden_size, config.intermediate_size
    has_bias = config.attention_bias
    qkv = _linear(read, f"{prefix}.attention.query_key_value", width, 3 * width, has_bias)
    return LayerTensors(
        attention_norm=_norm(read, f"{prefix}.input_layernorm", width),
        qkv=_ungroup_heads(qkv, config.num_attention_heads),
        attention_output=_linear(read, f"{prefix}.attention.dense", width, width, has_bias),
        mlp_norm=_norm(read, f"{prefix}.post_attention_layernorm", width),
        mlp_up=_linear(read, f"{prefix}.mlp.dense_h_to_4h", width, mlp_width),
        mlp_down=_linear(read, f"{prefix}.mlp.dense_4h_to_h", mlp_width, width),
    )


def _norm(read: TensorReader, name: str, width: int) -> NormTensors:
    return NormTensors(read(f"{name}.weight", width), read(f"{name}.bias", width))


def _linear(
    read: TensorReader, name: str, in_features: int, out_features: int, has_bias: bool = True
) -> LinearTensors:
    bias = read(f"{name}.bias", out_features) if has_bias else None
    return LinearTensors(read(f"{name}.weight", out_features, in_features), bias)


def _ungroup_heads(qkv: LinearTensors, num_heads: int) -> LinearTensors:
    """Rows (head, q | k | v, feature), as stored, to rows (q | k | v, head, feature)."""
    order = torch.arange(qkv.weight.shape[0]).reshape(num_heads, 3, -1).transpose(0, 1).flatten()
    return LinearTensors(qkv.weight[order], None if qkv.bias is None else qkv.bias[order])
