"""What the head's kernels share: a tile of logits, and the draw from it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.linear import check_linear, norm_multiply
from specengine.kernels.device.noise import NEGATIVE_INFINITY, gumbel, philox_lanes, vocabulary_counter
from specengine.kernels.device.race import check_small
from specengine.kernels.types.packed import PackedLinear

# Tokens of a tile: the noise comes in groups of 128, and padded rows of logits are whole tiles.
TILE_TOKENS = 128


def check_head(hidden: Tensor, weight: PackedLinear, vocab_size: int, token_ids: Tensor | None = None) -> int:
    """Raises `ValueError` unless the head has `vocab_size` tokens, or a row for each of `token_ids`; returns the number
    of rows to compute. That ids ascend is left to the caller: they lie on the device."""
    check_linear("hidden", hidden, weight)
    if token_ids is not None:
        check_small("token_ids", token_ids, (weight.out_features,), torch.int32)
    if vocab_size < 1 or (token_ids is None and vocab_size > weight.out_features):
        raise ValueError(f"vocab_size: {vocab_size} is not in 1 ... {weight.out_features}")
    return vocab_size if token_ids is None else weight.out_features


@triton.jit
def logit_tile(
    hidden_ptr,
    hidden_stride,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    first_row,
    num_rows,
    tokens,
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logits of `tokens`, `[BLOCK_M, BLOCK_N]` fp32; -inf beyond the vocabulary."""
    logits = norm_multiply(
        hidden_ptr,
        hidden_stride,
        norm_weight_ptr,
        norm_bias_ptr,
        eps,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        first_row,
        num_rows,
        tl.minimum(tokens, VOCAB_SIZE - 1),
        WIDTH,
        WEIGHT_STRIDE,
        CHUNK,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    return tl.where((tokens < VOCAB_SIZE)[None, :], logits, NEGATIVE_INFINITY)


@triton.jit
def token_noise(seeds, positions, tokens, M: tl.constexpr):
    """The same noise `[M, N]` of any tokens `[N]`: a Philox call for each, where a tile's share theirs in fours."""
    counters = tl.broadcast_to(vocabulary_counter(tokens)[None, :], (M, tokens.shape[0]))
    bits = philox_lanes(counters, positions[:, None], 0, 0, seeds[:, None])
    lane = ((tokens % 128) // 32)[None, :]
    return gumbel(
        tl.where(lane < 2, tl.where(lane == 0, bits[0], bits[1]), tl.where(lane == 2, bits[2], bits[3]))
    )


@triton.jit
def tile_noise(seeds, positions, first_token, M: tl.constexpr):
    """Gumbel noise `[M, 128]` of the target's stream for tokens first_token (a multiple of 128) … + 127.

    seeds, positions: `[M]`, of each row
    """
    counter = vocabulary_counter(first_token) + tl.arange(0, 32)
    counters = tl.broadcast_to(counter[None, :], (M, 32))
    bits = philox_lanes(counters, positions[:, None], 0, 0, seeds[:, None])
    even = tl.join(gumbel(bits[0]), gumbel(bits[2]))
    odd = tl.join(gumbel(bits[1]), gumbel(bits[3]))
    by_lane = tl.reshape(tl.join(even, odd), (M, 32, 4))
    return tl.reshape(tl.permute(by_lane, (0, 2, 1)), (M, 128))
