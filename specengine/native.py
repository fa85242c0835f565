"""`backend="native"`: every op in C++ (`specengine._C`), for CPUs.

Row-invariant by construction: an output row's bits depend on neither the rows computed with it nor the
number of threads. Arguments are checked once, in the C++ bindings (`ValueError`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import _C
from specengine.kernels.packed import Norm, PackedLinear


class NativeBackend:
    """The `Backend` protocol of `specengine.ops` on `specengine._C`; see `specengine.kernels.reference`."""

    name = "native"
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    embed = staticmethod(_C.embed)
    paged_attention = staticmethod(_C.paged_attention)
    filter_rows = staticmethod(_C.filter_rows)
    sample_rows = staticmethod(_C.sample_rows)
    match_verify = staticmethod(_C.match_verify)
    rejection_verify = staticmethod(_C.rejection_verify)
    token_logprobs = staticmethod(_C.token_logprobs)
    set_num_threads = staticmethod(_C.set_num_threads)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        out_features, in_features = weight.shape
        packed_bias = None if bias is None else bias.float().contiguous()
        return PackedLinear(_C.pack_linear(weight), packed_bias, in_features, out_features)

    def norm_linear(self, hidden: Tensor, norm: Norm, weight: PackedLinear, activation: str) -> Tensor:
        return _C.norm_linear(hidden, *_layer_arguments(norm, weight), activation)

    def norm_qkv(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        rotary: Tensor | None,
    ) -> Tensor:
        return _C.norm_qkv(
            hidden,
            *_layer_arguments(norm, weight),
            positions,
            kv_slots,
            kv_cache,
            rotary,
        )

    def linear_residual(self, x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor:
        return _C.linear_residual(x, *_linear_arguments(weight), residual)

    def head(self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int) -> Tensor:
        return _C.head(hidden, *_layer_arguments(norm, weight), vocab_size)


def _linear_arguments(weight: PackedLinear) -> tuple[Tensor, Tensor | None, int, int]:
    return weight.weight, weight.bias, weight.in_features, weight.out_features


def _layer_arguments(
    norm: Norm, weight: PackedLinear
) -> tuple[Tensor, Tensor, float, Tensor, Tensor | None, int, int]:
    return norm.weight, norm.bias, norm.eps, *_linear_arguments(weight)
