"""Rounding to 16 bits. Triton's interpreter truncates to bfloat16 and cannot multiply it: it gets help here."""

from __future__ import annotations

import triton
import triton.language as tl

from specengine.kernels.device.launch import INTERPRETED


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest, ties to even; or x that is in it already."""
    if x.dtype == dtype:
        return x
    elif INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def as_operand(x):
    """What `tl.dot` multiplies for x: x itself, and in the interpreter fp32 of the same value for 16-bit types."""
    if INTERPRETED and x.dtype != tl.float32:
        return x.to(tl.float32)
    else:
        return x
