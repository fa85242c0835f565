"""Philox noise on the device, bit-equal to `specengine.rng` on every uint32, and the races that it decides."""

from __future__ import annotations

import triton
import triton.language as tl

from specengine.kernels.device.launch import INTERPRETED

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
_TWO_POW_MINUS_32 = tl.constexpr(2.0**-32)
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGEST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def fast_log(x):
    """ln x of fp32 x > 0 (never denormal): 22 bits on the device, as the noise has them to spare."""
    if INTERPRETED:
        return tl.log(x)
    else:
        base_2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return base_2 * _LN_2


@triton.jit
def uniform(bits):
    """(r + 1/2) 2**-32 in (0, 1] fp32 from uint32 r."""
    return (bits.to(tl.float32) + 0.5) * _TWO_POW_MINUS_32


@triton.jit
def gumbel(bits):
    """-ln E, E = -ln(1 - u): a series where u < 1/32 keeps E's relative precision down to 2**-33."""
    u = uniform(bits)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    exponential = tl.where(u < 0.03125, series, -fast_log(uniform(bits ^ 0xFFFFFFFF)))
    return -fast_log(exponential)


@triton.jit
def philox_lanes(counter, position, stream: tl.constexpr, base, seed):
    """Four uint32 lanes of Philox4x32-10: counter (c0, position, stream, base), key the 64 bits of `seed` (int64).

    counter: any int32 shape; position, base (int32) and seed broadcast to it.
    """
    zero = counter * 0
    c0 = counter.to(tl.uint32, bitcast=True)
    c1 = (zero + position).to(tl.uint32, bitcast=True)
    c2 = (zero + stream).to(tl.uint32, bitcast=True)
    c3 = (zero + base).to(tl.uint32, bitcast=True)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = zero.to(tl.uint32, bitcast=True) + low
    k1 = zero.to(tl.uint32, bitcast=True) + high
    return tl.philox_impl(c0, c1, c2, c3, k0, k1)


@triton.jit
def vocabulary_counter(token):
    """c0 of the Philox call that serves tokens v: its lane for v is (v % 128) // 32."""
    return (token // 128) * 32 + token % 32


@triton.jit
def race_key(score, token):
    """int64 >= 0 whose order is that of (score, lower id first); 0 is below every score.

    score: fp32, no NaN (+0 and -0 tie); token: int32 >= 0 of the same shape
    """
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (ordered << 31) | (token ^ _LARGEST_ID).to(tl.int64)


@triton.jit
def key_token(key):
    """The token of a `race_key`, int32."""
    return ((key & _LARGEST_ID) ^ _LARGEST_ID).to(tl.int32)


@triton.jit
def key_score(key):
    """The score of a `race_key`, fp32."""
    ordered = (((key >> 31) & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def sanitise(logits):
    """NaN -> -inf, +inf -> 3e38."""
    clean = tl.where(logits != logits, NEGATIVE_INFINITY, logits)
    return tl.where(clean == float("inf"), 3e38, clean)


@triton.jit
def scale_logits(logits, temperature):
    """z / T, sanitised after the division; greedy rows (T <= 0) are left unscaled. One IEEE division everywhere."""
    divisor = tl.where(temperature > 0.0, temperature, 1.0)
    return sanitise(tl.div_rn(logits, divisor))
