"""A weight matrix whose numbers share a scale in groups of 32 along K, as checkpoints hold it and backends pack it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZE = 32


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

    def dequantize(self) -> Tensor:
        """The numbers themselves, `[N, K]` fp32."""
        groups: Tensor = self.codes.float().unflatten(1, (-1, GROUP_SIZE)) * self.scale.float().unsqueeze(-1)
        if self.minimum is not None:
            groups = groups + self.minimum.float().unsqueeze(-1)
        return groups.flatten(1)
