"""`backend="reference"`: every op in plain PyTorch, the oracle; any device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import PackedLinear
from specengine.kernels.types.program import Program
from specengine.ops.backend import Backend, Executor
from specengine.ops.encode import encode, encode_groups
from specengine.ops.interpreter import Interpreter
from specengine.weight_formats import WeightFormat


class ReferenceBackend:
    """Every op from `specengine.kernels.reference`."""

    name = "reference"
    has_padding = has_launches = False
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __getattr__(self, op: str) -> object:
        return getattr(reference, op)

    def compile(self, program: Program) -> Executor:
        return Interpreter(cast(Backend, self), program)

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(
        self, weight: Tensor | GroupedWeight, bias: Tensor | None, format: WeightFormat | None = None
    ) -> PackedLinear:
        out_features, in_features = weight.shape
        packed_bias = None if bias is None else bias.float()
        grouped = encode_groups(weight, format)
        if grouped is not None:
            return PackedLinear(
                grouped.codes, packed_bias, in_features, out_features, grouped.scale, grouped.minimum
            )
        assert isinstance(weight, Tensor)
        numbers, scale = encode(weight, format)
        return PackedLinear(numbers, packed_bias, in_features, out_features, scale)
