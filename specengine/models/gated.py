"""What Llama and its relatives have in common: RMSNorm, rotary positions on whole heads, grouped queries, SwiGLU."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from specengine.models.architecture import (
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
from specengine.models.decoder import DecoderSpec, RotaryScaling
from specengine.models.stacking import interleave, stacked

PREFIXES = ("model.", "")

Theta = Annotated[float, Field(gt=0.0, le=1e12)]
Factor = Annotated[float, Field(ge=1.0, le=1e6)]


class RopeParameters(BaseModel):
    """`rope_scaling`, and `rope_parameters` of transformers 5. Other kinds of scaling are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rope_type: Literal["default", "linear", "llama3"] | None = None
    type: Literal["default", "linear", "llama3"] | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: Literal[1, 1.0] | None = None  # type: ignore[valid-type]
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: NumPositions | None = None

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"

    @model_validator(mode="after")
    def _check_complete(self) -> RopeParameters:
        wanted = {
            "default": (),
            "linear": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        }[self.kind]
        missing = [name for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type={self.kind!r} needs {', '.join(missing)}")
        if self.kind == "llama3" and not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self

    def scaling(self) -> RotaryScaling | None:
        """None for `default`."""
        if self.kind == "linear":
            return RotaryScaling("linear", self.factor or 1.0)
        if self.kind == "llama3":
            return RotaryScaling(
                "llama3",
                self.factor or 1.0,
                self.low_freq_factor or 1.0,
                self.high_freq_factor or 1.0,
                self.original_max_position_embeddings or 1,
            )
        return None


class GatedConfig(ArchitectureConfig):
    """The keys of `config.json` that these architectures share.

    Rotary settings come as `rope_theta` and `rope_scaling`, or as `rope_parameters`, which win.
    """

    vocab_size: NumTokens
    max_position_embeddings: NumPositions
    hidden_size: Width
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    num_key_value_heads: NumHeads | None = None
    head_dim: Width | None = None
    intermediate_size: Width
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Theta = 10000.0
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> GatedConfig:
        if self.head_dim is None:
            head_dim_of(self.hidden_size, self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads are no multiple of {self.kv_heads} key and value heads"
            )
        if self.features % 2:
            raise ValueError(f"head_dim={self.features} must be even")
        return self

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def features(self) -> int:
        """Features of one head."""
        return self.head_dim or head_dim_of(self.hidden_size, self.num_attention_heads)

    @property
    def window(self) -> int | None:
        """How many tokens back a layer sees, where that is less than the context."""
        return None

    def spec(self, model_type: str) -> DecoderSpec:
        """The decoder that this config describes. Up to a sliding window, attention is attention to everything: the
        context ends there."""
        rope = self.rope_parameters or self.rope_scaling or RopeParameters()
        positions = self.max_position_embeddings
        return DecoderSpec(
            architecture=model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.features,
            intermediate_size=self.intermediate_size,
            max_positions=positions if self.window is None else min(positions, self.window),
            norm_eps=self.rms_norm_eps,
            norm="rms",
            activation="swiglu",
            rotary_dim=self.features,
            rotary_base=rope.rope_theta or self.rope_theta,
            rotary_scaling=rope.scaling(),
            tie_word_embeddings=self.tie_word_embeddings,
            **self.special_token_ids(self.vocab_size),
        )


class QwenConfig(GatedConfig):
    """Those of Qwen2, Qwen3: a sliding window counts only where it is switched on."""

    use_sliding_window: bool = False
    sliding_window: NumPositions | None = None

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None


def read_outer(read: TensorReader, config: GatedConfig) -> OuterTensors:
    """The token table, the final norm and the head."""
    table, head = read.table_and_head(
        "embed_tokens.weight",
        ("lm_head.weight",),
        config.vocab_size,
        config.hidden_size,
        is_tied=config.tie_word_embeddings,
    )
    norm = NormTensors(read("norm.weight", config.hidden_size), None)
    return OuterTensors(token_table=table, position_table=None, final_norm=norm, head=head)


def read_layer(
    read: TensorReader,
    config: GatedConfig,
    index: int,
    *,
    has_qkv_bias: bool = False,
    has_output_bias: bool = False,
    has_mlp_bias: bool = False,
    has_head_norm: bool = False,
) -> LayerTensors:
    """Layer `index`: which biases it has and whether it norms the heads of queries and keys is what differs."""
    prefix, width, mlp_width = f"layers.{index}", config.hidden_size, config.intermediate_size
    query_width, kv_width = (
        heads * config.features for heads in (config.num_attention_heads, config.kv_heads)
    )

    def linear(name: str, in_features: int, out_features: int, has_bias: bool) -> LinearTensors:
        bias = read(f"{prefix}.{name}.bias", out_features) if has_bias else None
        return LinearTensors(read.matrix(f"{prefix}.{name}.weight", out_features, in_features), bias)

    projections = (("q_proj", query_width), ("k_proj", kv_width), ("v_proj", kv_width))
    qkv = [linear(f"self_attn.{name}", width, size, has_qkv_bias) for name, size in projections]
    head_norm = None
    if has_head_norm:
        names = ("q_norm", "k_norm")
        head_norm = torch.stack(
            [read(f"{prefix}.self_attn.{name}.weight", config.features) for name in names]
        )
    gate, up = (linear(f"mlp.{name}", width, mlp_width, has_mlp_bias) for name in ("gate_proj", "up_proj"))
    return LayerTensors(
        attention_norm=NormTensors(read(f"{prefix}.input_layernorm.weight", width), None),
        qkv=stacked(qkv),
        attention_output=linear("self_attn.o_proj", query_width, width, has_output_bias),
        mlp_norm=NormTensors(read(f"{prefix}.post_attention_layernorm.weight", width), None),
        mlp_up=_interleaved(gate, up),
        mlp_down=linear("mlp.down_proj", mlp_width, width, has_mlp_bias),
        head_norm=head_norm,
    )


def _interleaved(gate: LinearTensors, up: LinearTensors) -> LinearTensors:
    """Rows gate, up, gate, up, …"""
    weight = interleave(gate.weight, up.weight)
    if gate.bias is None or up.bias is None:
        return LinearTensors(weight, None)
    return LinearTensors(weight, torch.stack((gate.bias, up.bias), dim=1).flatten())
