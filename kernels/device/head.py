"""What the head's kernels share: a tile of logits, and the draw from it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.linear import check_linear, norm_multiply
from specengine.kernels.device.noise import NEGATIVE_INFINITY, gumbel, philox_lanes, vocabulary_counter
from specengine.kernels.types.packed import PackedLinear

# Tokens of a tile: the noise comes in groups of 128, and padded rows of logits are whole tiles.
TILE_TOKENS = 128


def check_head(hidden: Tensor, weight: PackedLinear, vocab_size: int) -> int:
    """Raises `ValueError` unless the head has `vocab_size` tokens; returns the number of tiles."""
    check_linear("hidden", hidden, weight)
    if not 0 < vocab_size <= weight.out_features:
        raise ValueError(f"vocab_size: {vocab_size} is not in 1 ... {weight.out_features}")
    return -(-vocab_size // TILE_TOKENS)


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
    rows,
    row_mask,
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
        rows,
        row_mask,
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
