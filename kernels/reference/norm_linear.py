"""Norm, linear, bias and activation in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine.kernels.types.packed import Norm, PackedLinear


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """`none`, `relu`, `gelu` (erf), `gelu_tanh` (the tanh approximation GPT-2 was trained with), or
    `swiglu`, which makes half as many columns: silu(x[2 i]) * x[2 i + 1] (Shazeer, 2020)."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "swiglu":
        return F.silu(x[..., 0::2]) * x[..., 1::2]
    raise ValueError(f"activation: {activation!r} is unknown; expected none, relu, gelu, gelu_tanh or swiglu")


def apply_norm(hidden: Tensor, norm: Norm) -> Tensor:
    """The norm over the last axis, in the input's dtype; see `Norm`."""
    weight, width = norm.weight.to(hidden.dtype), hidden.shape[-1:]
    if norm.bias is None:
        return F.rms_norm(hidden, width, weight, norm.eps)
    return F.layer_norm(hidden, width, weight, norm.bias.to(hidden.dtype), norm.eps)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: scale = max |w| / 127, w / scale rounded to nearest, ties to even.

    weight:  `[N, K]`, any float dtype
    returns  `[N, K]` int8 in -127 … 127 and `[N]` fp32; a zero row has the scale 0, one that is not finite NaN
    """
    values = weight.float()
    largest = values.abs().amax(dim=1)
    scale = torch.where(largest.isfinite(), largest, torch.nan) / 127
    divisor = torch.where(scale > 0, scale, torch.inf)[:, None]
    quantized = (values.nan_to_num(0.0, 0.0, 0.0) / divisor).round().clamp(-127, 127)
    return quantized.to(torch.int8), scale


def linear(x: Tensor, weight: PackedLinear) -> Tensor:
    """x W^T + b in the input's dtype; int8 weights are multiplied out first."""
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    matrix = weight.weight.to(x.dtype)
    if weight.scale is not None:
        matrix = matrix * weight.scale.to(x.dtype)[:, None]
    return F.linear(x, matrix, bias)


def norm_linear(hidden: Tensor, norm: Norm, weight: PackedLinear, activation: str) -> Tensor:
    """activation(norm(hidden) W^T + b).

    hidden:  `[T, D]` fp32
    weight:  D -> N
    returns  `[T, N]` fp32; `[T, N / 2]` with `swiglu`
    """
    return apply_activation(linear(apply_norm(hidden, norm), weight), activation)
