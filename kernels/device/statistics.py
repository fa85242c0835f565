"""The log-normaliser of a row, from sums that do not depend on who adds them up.

exp(z - max) is summed in fixed point: over each 128 tokens against their own maximum, then over the row against the
row's. Integer sums are exact in any order, so the head's epilogue and a kernel that reads the logits agree on every
bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specengine.kernels.device.noise import NEGATIVE_INFINITY

GROUP = tl.constexpr(128)  # tokens that share a maximum
_TILE_UNIT = tl.constexpr(2.0**30)
_ROW_UNIT = tl.constexpr(2.0**10)  # on top of the tile's
_TOTAL_UNIT = tl.constexpr(2.0**-40)


@triton.jit
def group_sum(scaled, maximum):
    """The sum of exp(scaled - maximum) over the last axis, 128 tokens, as fp32 in units of 2**-30.

    scaled: `[M, 128]` fp32, sanitised; maximum: `[M]`, the largest of each row
    """
    base = tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)
    weight = tl.exp(scaled - base[:, None])
    return tl.sum((weight * _TILE_UNIT + 0.5).to(tl.int64), axis=1).to(tl.float32)


@triton.jit
def group_share(group_sums, group_maxima, maximum):
    """A group's part of the row's sum against the row's maximum, int64 in units of 2**-40: add these up."""
    base = tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)
    return (group_sums * tl.exp(group_maxima - base) * _ROW_UNIT + 0.5).to(tl.int64)


@triton.jit
def log_normaliser(maximum, total):
    """max + ln(sum of exp(z - max)) from the sum of all `group_share`."""
    return maximum + tl.log(total.to(tl.float32) * _TOTAL_UNIT)
