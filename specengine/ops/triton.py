"""`backend="triton"`: every op as a Triton kernel, for GPUs, and in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import PackedLinear
from specengine.kernels.types.program import Program
from specengine.ops.backend import Backend, Executor
from specengine.ops.encode import encode, encode_groups
from specengine.ops.interpreter import Interpreter
from specengine.weight_formats import WeightFormat


class TritonBackend:
    """Every op from the module of its name in `specengine.kernels`."""

    name = "triton"
    has_padding = has_launches = True
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __getattr__(self, op: str) -> object:
        if op.startswith("_"):
            raise AttributeError(op)
        function = getattr(importlib.import_module(f"specengine.kernels.{op}"), op)
        setattr(self, op, function)
        return function

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(
        self, weight: Tensor | GroupedWeight, bias: Tensor | None, format: WeightFormat | None = None
    ) -> PackedLinear:
        from specengine.kernels.device.linear import pack_groups, pack_rows

        grouped = encode_groups(weight, format)
        if grouped is not None:
            return pack_groups(grouped, bias)
        assert isinstance(weight, Tensor)
        numbers, scale = encode(weight, format)
        return replace(pack_rows(numbers, bias), scale=scale)

    def compile(self, program: Program) -> Executor:
        return Interpreter(cast(Backend, self), program)
