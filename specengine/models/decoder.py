"""The one forward. It never asks whether it is prefilling, decoding or verifying: lengths are data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specengine.kernels.packed import Norm, PackedLinear
from specengine.ops import Backend


@dataclass(frozen=True)
class DecoderSpec:
    """What an architecture is, once its checkpoint's config has been read.

    vocab_size:        rows of the token embedding and of the head
    max_positions:     longest context, prompt and generated tokens together
    intermediate_size: width of the MLP's hidden layer
    activation:        `relu`, `gelu` or `gelu_tanh`
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
    parallel_residual: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerWeights:
    """One layer, packed. `qkv` rows: queries, keys, values, each head contiguous."""

    attention_norm: Norm
    qkv: PackedLinear
    attention_output: PackedLinear
    mlp_norm: Norm
    mlp_up: PackedLinear
    mlp_down: PackedLinear


@dataclass(frozen=True)
class DecoderWeights:
    """All weights. token_table `[V, D]`; position_table `[max_positions, D]`, None with rotary positions."""

    token_table: Tensor
    position_table: Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: PackedLinear


@dataclass(frozen=True)
class ForwardBatch:
    """A ragged batch of B sequences and T tokens; a prompt chunk, one token or k + 1 tokens are all the same.

    token_ids:   `[T]` int32
    positions:   `[T]` int32, absolute
    kv_slots:    `[T]` int64, block * block_size + offset where this token's keys and values go; -1 = nowhere
    q_start:     `[B + 1]` int32, tokens q_start[b] … q_start[b + 1] - 1 belong to sequence b
    context_len: `[B]` int32, tokens of sequence b in the cache after this forward's writes
    slots:       `[B]` int32, row of each sequence in block_table
    block_table: `[S, max_blocks]` int32
    logit_rows:  `[R]` int64, the tokens whose logits are wanted
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    q_start: Tensor
    context_len: Tensor
    slots: Tensor
    block_table: Tensor
    logit_rows: Tensor


class Decoder:
    """A causal language model on the fused ops. Holds parameters only; the KV cache is the caller's."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, backend: Backend) -> None:
        self.spec = spec
        self.weights = weights
        self.backend = backend
        device = weights.token_table.device
        self._rotary = build_rotary_table(spec, device) if spec.rotary_dim else None

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        """Writes the batch's keys and values and returns the logits of `batch.logit_rows`.

        kv_cache:   `[layers, 2, N, Hkv, block_size, head_dim]`
        vocab_size: ids from here on get -inf
        returns     `[R, V]` fp32, V = vocab_size rounded up to a multiple of 128
        """
        ops, weights = self.backend, self.weights
        hidden = ops.embed(batch.token_ids, batch.positions, weights.token_table, weights.position_table)
        for layer, layer_cache in zip(weights.layers, kv_cache, strict=True):
            hidden = self._layer(layer, hidden, batch, layer_cache)
        if batch.logit_rows.numel() != hidden.shape[0]:
            hidden = hidden[batch.logit_rows]
        return ops.head(hidden, weights.final_norm, weights.head, vocab_size)

    def _layer(self, layer: LayerWeights, hidden: Tensor, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        ops, activation = self.backend, self.spec.activation
        query = ops.norm_qkv(
            hidden, layer.attention_norm, layer.qkv, batch.positions, batch.kv_slots, kv_cache, self._rotary
        )
        attended = ops.paged_attention(
            query, kv_cache, batch.block_table, batch.slots, batch.q_start, batch.context_len
        )
        residual = ops.linear_residual(attended, layer.attention_output, hidden)
        mlp_input = hidden if self.spec.parallel_residual else residual
        expanded = ops.norm_linear(mlp_input, layer.mlp_norm, layer.mlp_up, activation)
        return ops.linear_residual(expanded, layer.mlp_down, residual)


def build_rotary_table(spec: DecoderSpec, device: torch.device) -> Tensor:
    """Cosines and sines `[max_positions, 2, rotary_dim / 2]` fp32 (Su et al., 2021)."""
    exponent = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequency = 1.0 / (spec.rotary_base**exponent)
    angle = torch.outer(torch.arange(spec.max_positions).float(), frequency)
    return torch.stack((angle.cos(), angle.sin()), dim=1).to(device).contiguous()
