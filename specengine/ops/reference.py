"""`backend="reference"`: every op in plain PyTorch, the oracle; any device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.packed import PackedLinear
from specengine.kernels.types.program import Program
from specengine.ops.backend import Backend, Executor
from specengine.ops.interpreter import Interpreter


class ReferenceBackend:
    """Every op from `specengine.kernels.reference`."""

    name = "reference"
    has_padding = False
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __getattr__(self, op: str) -> object:
        return getattr(reference, op)

    def compile(self, program: Program) -> Executor:
        return Interpreter(cast(Backend, self), program)

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        weight = as_floats(weight, dtype)
        return PackedLinear(weight, None if bias is None else bias.float(), weight.shape[1], weight.shape[0])

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        quantized, scale = reference.quantize_rows(as_floats(weight, None))
        packed_bias = None if bias is None else bias.float()
        return PackedLinear(quantized, packed_bias, weight.shape[1], weight.shape[0], scale)


def as_floats(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`[N, K]` weights, checked; with a `dtype` converted to it in memory of their own."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected [N, K] of floats, got {list(weight.shape)} {weight.dtype}")
    if dtype is None:
        return weight
    return weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
