"""The output of a layer with parallel residual: both projections and the residual in one op."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.linear_residual import linear_residual
from specengine.kernels.types.packed import PackedLinear


def parallel_linear_residual(
    attended: Tensor, weight: PackedLinear, expanded: Tensor, mlp_weight: PackedLinear, residual: Tensor
) -> Tensor:
    """residual + attended W^T + b + expanded Wm^T + bm (GPT-NeoX: attention and MLP stand side by side).

    attended:   `[T, K]` fp32
    weight:     K -> D
    expanded:   `[T, Km]` fp32
    mlp_weight: Km -> D
    residual:   `[T, D]` fp32
    returns     `[T, D]` fp32
    """
    return linear_residual(expanded, mlp_weight, linear_residual(attended, weight, residual))
