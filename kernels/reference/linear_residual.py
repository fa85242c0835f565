"""Linear, bias and residual in one op."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.norm_linear import linear
from specengine.kernels.types.packed import PackedLinear


def linear_residual(x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor:
    """residual + x W^T + b.

    x:        `[T, K]` fp32
    weight:   K -> D
    residual: `[T, D]` fp32
    returns   `[T, D]` fp32
    """
    return residual + linear(x, weight)
