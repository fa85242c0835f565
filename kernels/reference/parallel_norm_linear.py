"""What a layer with parallel residual reads from its input: queries, keys and values, and the MLP's inner layer."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.norm_linear import norm_linear
from specengine.kernels.reference.norm_qkv import norm_qkv
from specengine.kernels.types.packed import Norm, PackedLinear


def parallel_norm_linear(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    mlp_norm: Norm,
    mlp_weight: PackedLinear,
    activation: str,
    positions: Tensor,
    kv_slots: Tensor,
    kv_cache: Tensor,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`norm_qkv` and `norm_linear` of the same rows (GPT-NeoX: attention and MLP stand side by side).

    hidden:               `[T, D]` fp32
    norm, weight:         of the attention, as in `norm_qkv`, as are positions, kv_slots, kv_cache and rotary
    mlp_norm, mlp_weight: of the MLP, D -> N, as in `norm_linear`
    returns               queries `[T, H, head_dim]` fp32 and `[T, N]` fp32
    """
    query = norm_qkv(hidden, norm, weight, positions, kv_slots, kv_cache, rotary)
    return query, norm_linear(hidden, mlp_norm, mlp_weight, activation)
