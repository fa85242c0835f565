"""The weight container that the ops share: a linear layer in its backend's own layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedLinear:
    """y = x W^T + b, packed once at load.

    weight:  backend-defined layout (reference: `[out_features, in_features]` in the storage dtype, or int8)
    bias:    `[out_features]` fp32, or None
    scale:   `[out_features]` fp32 of int8 weights: W[n, k] = scale[n] * weight[n, k]; else None. Of weights by group
             `[out_features, in_features / 32]` fp16, where the layout does not hold it
    minimum: of weights by group that have one (see `GroupedWeight`), as their scale
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    scale: Tensor | None = None
    minimum: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """What is done to each row before a linear layer: weight and bias `[features]` fp32.

    With a bias LayerNorm, (x - mean) / sqrt(var + eps) * weight + bias; without one RMSNorm (Zhang and Sennrich, 2019),
    x / sqrt(mean x^2 + eps) * weight.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
