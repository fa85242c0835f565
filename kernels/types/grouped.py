"""A weight matrix whose numbers share a scale in groups of 32 along K, as checkpoints hold it and backends pack it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specengine.weight_formats import INT4, INT4_MIN, INT8_GROUP, WeightFormat

GROUP_SIZE = 32
_LARGEST_OFFSET_SCALE = 65504 / 8  # of which eight are an fp16 number


@dataclass(frozen=True)
class GroupedWeight:
    """W[n, k] = scale[n, k // 32] * codes[n, k] + minimum[n, k // 32], in fp32; without a minimum the product alone.

    codes:   `[N, K]` int8, K a multiple of 32. 4 bits: -8 … 7, with a minimum 0 … 15. 8 bits: -128 … 127
    scale:   `[N, K / 32]` fp16
    minimum: `[N, K / 32]` fp16, or None
    bits:    4 or 8; with 8 there is no minimum

    These are GGUF's Q4_0 (4 bits), Q4_1 (4 bits with a minimum) and Q8_0, number for number. The product is exact in
    fp32; with a minimum the sum is rounded once.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int

    @property
    def shape(self) -> torch.Size:
        """`[N, K]`."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.codes.device

    @property
    def format(self) -> WeightFormat:
        """What `weight_dtype` calls it."""
        if self.bits == 8:
            return INT8_GROUP
        return INT4 if self.minimum is None else INT4_MIN

    def __getitem__(self, rows: Tensor | slice) -> GroupedWeight:
        """Some of its rows."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> GroupedWeight:
        """The same there; itself where it is there already."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> GroupedWeight:
        minimum = None if self.minimum is None else change(self.minimum)
        return GroupedWeight(change(self.codes), change(self.scale), minimum, self.bits)

    def above_minimum(self) -> GroupedWeight | None:
        """The same numbers of 4 bits with a minimum: codes + 8 above -8 scales. None where that is beyond fp16."""
        assert self.bits == 4, self.bits
        if self.minimum is not None:
            return self
        if not bool((self.scale.abs() <= _LARGEST_OFFSET_SCALE).all()):
            return None
        return GroupedWeight(self.codes + 8, self.scale, self.scale * -8, bits=4)

    def dequantize(self) -> Tensor:
        """The numbers themselves, `[N, K]` fp32."""
        return dequantize(self.codes, self.scale, self.minimum)


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """See `GroupedWeight`."""
    groups: Tensor = codes.float().unflatten(1, (-1, GROUP_SIZE)) * scale.float().unsqueeze(-1)
    if minimum is not None:
        groups = groups + minimum.float().unsqueeze(-1)
    return groups.flatten(1)


def numbers(weight: Tensor | GroupedWeight) -> Tensor:
    """`[N, K]` floats: what a weight by group means, any other as it is."""
    return weight.dequantize() if isinstance(weight, GroupedWeight) else weight
