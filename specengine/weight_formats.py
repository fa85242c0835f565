"""How the weights of linear layers may be stored, by the names that `weight_dtype` has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PER_CHANNEL = 0


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a `[N, K]` weight.

    name:       what `weight_dtype` calls it
    element:    dtype of a stored weight, as PyTorch names it
    group_size: how many weights of an output channel share a scale, PER_CHANNEL for all K; None = floats, no scale
    """

    name: str
    element: str
    group_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """`element` as PyTorch has it."""
        import torch

        dtype = getattr(torch, self.element)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def has_scales(self) -> bool:
        """Whether a weight is its stored number times a scale."""
        return self.group_size is not None


INT8 = WeightFormat("int8", "int8", group_size=PER_CHANNEL)
WEIGHT_FORMATS = {
    format.name: format
    for format in (*(WeightFormat(name, name) for name in ("float32", "bfloat16", "float16")), INT8)
}
FLOAT_NAMES = tuple(name for name, format in WEIGHT_FORMATS.items() if not format.has_scales)
