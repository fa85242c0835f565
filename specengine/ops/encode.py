"""A weight's numbers in a format, before a backend lays them out."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.grouped import GroupedWeight
from specengine.weight_formats import INT8, WeightFormat


def encode(weight: Tensor, format: WeightFormat | None) -> tuple[Tensor, Tensor | None]:
    """`[N, K]` weights of any float dtype and strides in a format without groups, and its scales, if it has any.

    With a format the numbers are in memory of their own; without one they stay the tensor they are.
    """
    check_floats(weight)
    if format is None:
        return weight, None
    if format == INT8:
        return reference.quantize_rows(weight)
    return weight.to(format.dtype, copy=True, memory_format=torch.contiguous_format), None


def encode_groups(weight: Tensor | GroupedWeight, format: WeightFormat | None) -> GroupedWeight | None:
    """A weight by group as it is, floats as such a format rounds them; None for another format."""
    if isinstance(weight, GroupedWeight):
        return weight
    if format is None or not format.is_grouped:
        return None
    check_floats(weight)
    if weight.shape[1] % (format.group_size or 1):
        raise ValueError(f"weight: {weight.shape[1]} input features are no groups of {format.group_size}")
    return reference.quantize_groups(weight, bits=format.bits, has_minimum=format.has_minimum)


def check_floats(weight: Tensor) -> None:
    """Raises `ValueError` unless it is a matrix of floats."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected [N, K] of floats, got {list(weight.shape)} {weight.dtype}")
