"""Several weights as one, row by row: floats, and weights by group, also of different formats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.models.architecture import LinearTensors, Weight
from specengine.weight_formats import INT4, INT8_GROUP


def stacked(parts: Sequence[LinearTensors]) -> LinearTensors:
    """Linear layers of the same input, their outputs behind each other."""
    biases = [part.bias for part in parts if part.bias is not None]
    weight = _joined([part.weight for part in parts], torch.cat)
    return LinearTensors(weight, torch.cat(biases) if biases else None)


def interleave(first: Weight, second: Weight) -> Weight:
    """`[2 N, K]` of two `[N, K]`, with their rows in turn."""
    return _joined((first, second), lambda tensors: torch.stack(tensors, dim=1).flatten(0, 1))


def _joined(parts: Sequence[Weight], join: Callable[[list[Tensor]], Tensor]) -> Weight:
    grouped = _of_one_format(parts)
    if grouped is None:
        return join([numbers(part) for part in parts])
    minima = [part.minimum for part in grouped if part.minimum is not None]
    codes, scale = join([part.codes for part in grouped]), join([part.scale for part in grouped])
    return GroupedWeight(codes, scale, join(minima) if minima else None, grouped[0].bits)


def _of_one_format(parts: Sequence[Weight]) -> list[GroupedWeight] | None:
    """Weights by group in a format that holds them all without loss, where there is one; None if some are floats."""
    grouped = [part for part in parts if isinstance(part, GroupedWeight)]
    if len(grouped) < len(parts):
        return None
    formats = {part.format for part in grouped}
    if len(formats) == 1:
        return grouped
    if formats == {INT4, INT8_GROUP}:
        return [GroupedWeight(part.codes, part.scale, None, bits=8) for part in grouped]
    if INT8_GROUP not in formats:
        above = [part.above_minimum() for part in grouped]
        if all(part is not None for part in above):
            return [part for part in above if part is not None]
    names = ", ".join(sorted(format.name for format in formats))
    warnings.warn(
        f"weights stored as {names} belong into one matrix: those rows are rounded to int8_group",
        stacklevel=2,
    )
    return [_rounded(part) for part in grouped]


def _rounded(weight: GroupedWeight) -> GroupedWeight:
    if weight.minimum is None:
        return GroupedWeight(weight.codes, weight.scale, None, bits=8)
    return reference.quantize_groups(weight.dequantize(), bits=8, has_minimum=False)
