"""Keyed randomness: every random number is a pure function of what it decides.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), keyed by the request's
64-bit seed and counted by

    (c0, position, stream, round_base)

`position` is the absolute position of the token being decided. Streams never mix: sharing noise between a
draft's draw and its acceptance test biases the output. `round_base` is 0 for the target's stream, and the
committed length at the round's start for the draft and acceptance streams, so that numbers looked at beyond
an accepted prefix are never looked at again.

Vocabulary noise: one Philox call serves four tokens, c0 = (v // 128) * 32 + v % 32 and lane = (v % 128) // 32,
so any tile that is a multiple of 128 tokens draws the same numbers. The C++ and Triton versions agree with
this file on every uint32.
"""

from __future__ import annotations

import secrets
from typing import TypeVar

import torch
from torch import Tensor

STREAM_TARGET = 0
STREAM_DRAFT = 1
STREAM_ACCEPT = 2

# A 32-bit word: an int64 tensor of them, or a Python int.
Word = TypeVar("Word", Tensor, int)

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10
_TWO_POW_MINUS_32 = 2.0**-32
# Sample j of a request keys its generator with Philox(counter = (j, 0, _STREAM_SAMPLE_SEED, 0), key = seed).
_STREAM_SAMPLE_SEED = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Ten rounds of Philox4x32 on int64 tensors that hold uint32 values (arguments broadcast), or on Python ints.

    Returns four of the same, uint32 values. Known answers: Random123's `kat_vectors`.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # In int64 tensors the product wraps modulo 2**64, which keeps both of its 32-bit halves exact.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & _MASK, product_0 & _MASK
        high_1, low_1 = (product_1 >> 32) & _MASK, product_1 & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def split_seed(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The key words (low, high) of 64-bit seeds held in an int64 tensor."""
    return seeds & _MASK, (seeds >> 32) & _MASK


def vocabulary_bits(
    seeds: Tensor, positions: Tensor, stream: int, round_base: Tensor, vocab_size: int
) -> Tensor:
    """uint32 values (as int64) for every token: `[R]` seeds, positions and round bases -> `[R, vocab_size]`."""
    num_groups = (vocab_size + 127) // 128
    c0 = torch.arange(num_groups * 32, device=seeds.device)[None, :]
    low, high = split_seed(seeds)
    lanes = philox4x32(
        (
            c0,
            positions.long()[:, None] & _MASK,
            torch.full_like(c0, stream),
            round_base.long()[:, None] & _MASK,
        ),
        (low[:, None], high[:, None]),
    )
    bits = torch.stack([lane.view(-1, num_groups, 32) for lane in lanes], dim=2)
    return bits.reshape(seeds.shape[0], -1)[:, :vocab_size]


def exponential(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard exponential variates -ln(1 - u) from uint32 values; never 0, resolved down to 2**-33."""
    u = (bits.to(torch.float64) + 0.5) * _TWO_POW_MINUS_32
    complement = ((_MASK - bits).to(torch.float64) + 0.5) * _TWO_POW_MINUS_32
    u, complement = u.to(dtype), complement.to(dtype)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return torch.where(u < 2.0**-5, series, -torch.log(complement))


def gumbel(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel variates -ln E from uint32 values."""
    return -torch.log(exponential(bits, dtype))


def accept_bits(seeds: Tensor, positions: Tensor, round_base: Tensor, candidate: int = 0) -> Tensor:
    """The uint32 (as int64) that decides whether the draft token at `positions` is accepted: lane 0."""
    low, high = split_seed(seeds)
    c1 = positions.long() & _MASK
    return philox4x32(
        (
            torch.full_like(c1, candidate),
            c1,
            torch.full_like(c1, STREAM_ACCEPT),
            round_base.long() & _MASK,
        ),
        (low, high),
    )[0]


def uniform(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """u = (r + 1/2) * 2**-32 in (0, 1]; in fp32 the largest values round to 1."""
    return ((bits.to(torch.float64) + 0.5) * _TWO_POW_MINUS_32).to(dtype)


def random_seed() -> int:
    """A fresh 63-bit seed from the operating system."""
    return secrets.randbits(63)


def derive_seed(seed: int, sample_index: int) -> int:
    """The seed of sample `sample_index` of a request: the request's own for sample 0."""
    if sample_index == 0:
        return seed
    low, high, _, _ = philox4x32(
        (sample_index, 0, _STREAM_SAMPLE_SEED, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return low | (high << 32)


def signed_seed(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed, as the state tensors hold it."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
