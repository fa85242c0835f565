"""`backend="reference"`: every op in plain PyTorch, the oracle; any device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.packed import PackedLinear
from specengine.kernels.types.program import Program
from specengine.ops.backend import Backend, Executor
from specengine.ops.encode import encode
from specengine.ops.interpreter import Interpreter
from specengine.weight_formats import WeightFormat


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
        self, weight: Tensor, bias: Tensor | None, format: WeightFormat | None = None
    ) -> PackedLinear:
        numbers, scale = encode(weight, format)
        out_features, in_features = weight.shape
        return PackedLinear(numbers, None if bias is None else bias.float(), in_features, out_features, scale)
