"""Norm, linear, bias and activation in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine.kernels.types.grouped import GROUP_SIZE, GroupedWeight, dequantize
from specengine.kernels.types.packed import Norm, PackedLinear

_ROUNDED_AT_ONCE = 1 << 17


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


def quantize_groups(weight: Tensor, *, bits: int, has_minimum: bool) -> GroupedWeight:
    """Rounds to groups of 32 as `gguf.quants.quantize` does to Q4_0, Q4_1 (has_minimum) and Q8_0: the same codes.

    weight:  `[N, K]`, any float dtype and strides, K a multiple of 32
    returns  codes that mean NaN where a group is not finite
    """
    size = weight.shape
    codes = torch.empty(size, dtype=torch.int8, device=weight.device)
    scale = torch.empty(size[0], size[1] // GROUP_SIZE, dtype=torch.float16, device=weight.device)
    minimum = torch.empty_like(scale) if has_minimum else None
    rows = max(
        1, _ROUNDED_AT_ONCE // size[1]
    )  # so that what is between stays small, and in the processor's cache
    for first in range(0, size[0], rows):
        part = slice(first, first + rows)
        groups = weight[part].float().unflatten(1, (-1, GROUP_SIZE))
        if minimum is not None:
            numbers, scale[part], minimum[part] = _round_above_minimum(groups)
        else:
            numbers, scale[part] = _round_to_4_bits(groups) if bits == 4 else _round_to_8_bits(groups)
        codes[part] = numbers.nan_to_num(0.0, 0.0, 0.0).flatten(1)
    return GroupedWeight(codes, scale, minimum, bits)


def _round_to_4_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """-8 is the number that is furthest from zero."""
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = furthest / -8
    return (groups * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8, scale.squeeze(2)


def _round_above_minimum(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    minimum = groups.amin(dim=2, keepdim=True)
    scale = (groups.amax(dim=2, keepdim=True) - minimum) / 15
    codes = ((groups - minimum) * _inverse(scale) + 0.5).trunc().clamp(0, 15)
    return codes, scale.squeeze(2), minimum.squeeze(2)


def _round_to_8_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = groups.abs().amax(dim=2, keepdim=True) / 127
    steps = groups * _inverse(scale)
    size = steps.abs()
    whole = size.floor()
    return steps.sign() * (whole + (2 * (size - whole)).floor()), scale.squeeze(2)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def linear(x: Tensor, weight: PackedLinear) -> Tensor:
    """x W^T + b in the input's dtype; what has scales is multiplied out first, by group in fp32."""
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    if weight.scale is not None and weight.scale.dim() == 2:
        return F.linear(x, dequantize(weight.weight, weight.scale, weight.minimum).to(x.dtype), bias)
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
