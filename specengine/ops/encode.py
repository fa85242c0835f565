"""A weight's numbers in a format, before a backend lays them out."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.weight_formats import INT8, WeightFormat


def encode(weight: Tensor, format: WeightFormat | None) -> tuple[Tensor, Tensor | None]:
    """`[N, K]` weights of any float dtype and strides as a format stores them, and its scales, if it has any.

    With a format the numbers are in memory of their own; without one they stay the tensor they are.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected [N, K] of floats, got {list(weight.shape)} {weight.dtype}")
    if format is None:
        return weight, None
    if format == INT8:
        return reference.quantize_rows(weight)
    if format.has_scales:
        raise ValueError(f"weight_dtype={format.name!r} is not available on this backend")
    return weight.to(format.dtype, copy=True, memory_format=torch.contiguous_format), None
