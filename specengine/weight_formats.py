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

    name:        what `weight_dtype` calls it
    element:     dtype of a stored weight, as PyTorch names it; of a code, where there are groups
    group_size:  how many weights of an output channel share a scale, PER_CHANNEL for all K; None = floats, no scale
    bits:        of a code, where there are groups
    has_minimum: whether a group has a minimum beside its scale
    """

    name: str
    element: str
    group_size: int | None = None
    bits: int = 8
    has_minimum: bool = False

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

    @property
    def is_grouped(self) -> bool:
        """Whether scales are by group, as `specengine.kernels.types.grouped.GroupedWeight` has them."""
        return bool(self.group_size)


_FLOATS = tuple(WeightFormat(name, name) for name in ("float32", "bfloat16", "float16"))
INT8 = WeightFormat("int8", "int8", group_size=PER_CHANNEL)
# GGUF's Q4_0, Q4_1 and Q8_0.
INT4 = WeightFormat("int4", "int8", group_size=32, bits=4)
INT4_MIN = WeightFormat("int4_min", "int8", group_size=32, bits=4, has_minimum=True)
INT8_GROUP = WeightFormat("int8_group", "int8", group_size=32)
GROUPED_FORMATS = (INT4, INT4_MIN, INT8_GROUP)
WEIGHT_FORMATS = {format.name: format for format in (*_FLOATS, INT8, *GROUPED_FORMATS)}
FLOAT_NAMES = tuple(name for name, format in WEIGHT_FORMATS.items() if not format.has_scales)


def float_format(dtype: torch.dtype) -> WeightFormat:
    """Weights of a float dtype as they are."""
    return WEIGHT_FORMATS[str(dtype).removeprefix("torch.")]
