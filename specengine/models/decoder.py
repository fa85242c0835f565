"""The one forward. It never asks whether it is prefilling, decoding or verifying: lengths are data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.program import (
    DraftRows,
    DrawKeys,
    ForwardBatch,
    JudgedLogits,
    LinearResidual,
    NormLinear,
    NormQkv,
    Op,
    PagedAttention,
    ParallelLinearResidual,
    ParallelNormLinear,
    Program,
)
from specengine.kernels.types.round import BoundRound, RoundTensors
from specengine.ops.backend import Backend, RoundModel


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for contexts longer than the one they were trained for.

    linear: all of them divided by `factor` (Chen et al., 2023)
    llama3: those whose wavelength is above original_max_positions / low_freq_factor are; those below
            original_max_positions / high_freq_factor are left alone; between them the two are mixed, linearly in
            original_max_positions / wavelength (Llama 3.1)
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class DecoderSpec:
    """What an architecture is, once its checkpoint's config has been read.

    vocab_size:        rows of the token embedding and of the head
    max_positions:     longest context, prompt and generated tokens together
    intermediate_size: width of the MLP's hidden layer
    norm:              `layer` (LayerNorm) or `rms` (RMSNorm)
    activation:        `relu`, `gelu`, `gelu_tanh` or `swiglu` (rows of mlp_up: gate, up, gate, up, …)
    rotary_dim:        features of each head that are rotated; 0 = learned positions
    parallel_residual: attention and MLP both read the layer's input (GPT-NeoX)
    bos_token_id, eos_token_ids: from the checkpoint, if it names them
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    activation: str
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    norm: Literal["layer", "rms"] = "layer"
    parallel_residual: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerWeights:
    """One layer, packed. `qkv` rows: queries, keys, values, each head contiguous.

    head_norm: `[2, head_dim]` fp32, RMSNorm weights of the queries' and the keys' heads, or None
    """

    attention_norm: Norm
    qkv: PackedLinear
    attention_output: PackedLinear
    mlp_norm: Norm
    mlp_up: PackedLinear
    mlp_down: PackedLinear
    head_norm: Tensor | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights. token_table `[V, D]`; position_table `[max_positions, D]`, None with rotary positions.

    head_token_ids: `[n]` int32, ascending, of a head that has only some of the tokens; None: it has all
    """

    token_table: Tensor
    position_table: Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: PackedLinear
    head_token_ids: Tensor | None = None


class Decoder:
    """A causal language model on the fused ops. Holds parameters only; the KV cache is the caller's."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, backend: Backend) -> None:
        self.spec = spec
        self.weights = weights
        self.backend = backend
        self._executor = backend.compile(build_program(spec, weights))

    def first_layers(self, num_layers: int) -> Decoder:
        """The first layers, then the final norm and the head: on the same tensors, and on the cache's first layers."""
        spec = replace(self.spec, num_layers=num_layers)
        return Decoder(spec, replace(self.weights, layers=self.weights.layers[:num_layers]), self.backend)

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        """Writes the batch's keys and values and returns the logits of `batch.logit_rows`.

        kv_cache:   `[layers, 2, N, Hkv, block_size, head_dim]`; layers beyond the decoder's are left alone
        vocab_size: ids from here on get -inf
        returns     `[R, V]` fp32, V = vocab_size rounded up to a multiple of 128
        """
        return self._executor.forward(batch, kv_cache, vocab_size)

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> JudgedLogits:
        """`forward`, and what is done to the logits before anybody draws from them or judges by them."""
        return self._executor.forward_stats(batch, kv_cache, vocab_size, keys)

    def draw(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        vocab_size: int,
        keys: DrawKeys,
        staging: Staging | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, then each logit row's draw with the target's noise; no logits are stored.

        Returns tokens `[R]` int32, and `[R]` int32 that is 1 where the logits were not a distribution. With `staging`
        they are staged as drafts, too.
        """
        return self._executor.draw(batch, kv_cache, vocab_size, keys, staging)

    def draft(
        self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor] | None:
        """Several draws in a row in one call, where the backend has it; see `specengine.ops.Executor`."""
        return self._executor.draft(rows, kv_cache, vocab_size, keys)

    def in_round(self, kv_cache: Tensor, vocab_size: int) -> RoundModel:
        """This model in rounds that run in one call."""
        return RoundModel(self._executor, kv_cache, vocab_size)

    def bind_round(
        self, own: RoundModel, draft: RoundModel | None, num_fed: int, tensors: RoundTensors
    ) -> BoundRound | None:
        """A round of this target in one call, where the backend has it; see `specengine.ops.Executor`."""
        return self._executor.bind_round(own, draft, num_fed, tensors)


def build_program(spec: DecoderSpec, weights: DecoderWeights) -> Program:
    """The one forward, as a list of ops: five a layer, three where attention and MLP are parallel."""
    build_layer = _parallel_layer if spec.parallel_residual else _sequential_layer
    ops = [op for index, layer in enumerate(weights.layers) for op in build_layer(spec, index, layer)]
    device = weights.token_table.device
    return Program(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        token_table=weights.token_table,
        position_table=weights.position_table,
        rotary=build_rotary_table(spec, device) if spec.rotary_dim else None,
        ops=tuple(ops),
        final_norm=weights.final_norm,
        head=weights.head,
        head_token_ids=weights.head_token_ids,
    )


def _sequential_layer(spec: DecoderSpec, index: int, layer: LayerWeights) -> list[Op]:
    return [
        NormQkv(index, layer.attention_norm, layer.qkv, layer.head_norm),
        PagedAttention(index),
        LinearResidual("attended", layer.attention_output, residual="hidden", out="residual"),
        NormLinear("residual", layer.mlp_norm, layer.mlp_up, spec.activation, out="expanded"),
        LinearResidual("expanded", layer.mlp_down, residual="residual", out="hidden"),
    ]


def _parallel_layer(spec: DecoderSpec, index: int, layer: LayerWeights) -> list[Op]:
    attention, mlp = (layer.attention_norm, layer.qkv), (layer.mlp_norm, layer.mlp_up)
    return [
        ParallelNormLinear(index, *attention, *mlp, spec.activation),
        PagedAttention(index),
        ParallelLinearResidual(layer.attention_output, layer.mlp_down),
    ]


def build_rotary_table(spec: DecoderSpec, device: torch.device) -> Tensor:
    """Cosines and sines `[max_positions, 2, rotary_dim / 2]` fp32 (Su et al., 2021)."""
    exponent = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequency = 1.0 / (spec.rotary_base**exponent)
    if spec.rotary_scaling is not None:
        frequency = _scaled(frequency, spec.rotary_scaling)
    angle = torch.outer(torch.arange(spec.max_positions).float(), frequency)
    return torch.stack((angle.cos(), angle.sin()), dim=1).to(device).contiguous()


def _scaled(frequency: Tensor, scaling: RotaryScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequency / scaling.factor + share * frequency
