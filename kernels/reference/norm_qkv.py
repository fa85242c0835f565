"""Norm, the fused query/key/value projection, rotary positions, and the KV append."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.reference.norm_linear import apply_norm, linear
from specengine.kernels.types.packed import Norm, PackedLinear


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding, half-split convention, on the first `rotary_dim` features of each head.

    x:      `[T, H, head_dim]`
    rotary: `[T, 2, rotary_dim / 2]`: cosines and sines (Su et al., 2021, RoFormer)
    """
    half = rotary.shape[-1]
    cos, sin = rotary[:, None, 0], rotary[:, None, 1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def norm_qkv(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    positions: Tensor,
    kv_slots: Tensor,
    kv_cache: Tensor,
    rotary: Tensor | None,
    head_norm: Tensor | None = None,
) -> Tensor:
    """Projects to queries, keys and values, norms and rotates queries and keys, writes keys and values to the cache.

    hidden:    `[T, D]` fp32
    weight:    D -> (H + 2 * Hkv) * head_dim, rows ordered queries, keys, values, each head contiguous
    positions: `[T]` int32, absolute
    kv_slots:  `[T]` int64, block * block_size + offset; -1 writes nothing (a padded row)
    kv_cache:  `[2, N, Hkv, block_size, head_dim]` in the KV dtype: one layer's keys and values; written
    rotary:    `[P, 2, rotary_dim / 2]` fp32 cosines and sines by position, or None
    head_norm: `[2, head_dim]` fp32 or None: weights of an RMSNorm, with the same eps, of each query's and key's head
    returns    `[T, H, head_dim]` fp32, the queries as they meet keys
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = weight.out_features // head_dim - 2 * num_kv_heads
    projected = linear(apply_norm(hidden, norm), weight).unflatten(-1, (-1, head_dim))
    query, key, value = projected.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if head_norm is not None:
        query = apply_norm(query, Norm(head_norm[0], None, norm.eps))
        key = apply_norm(key, Norm(head_norm[1], None, norm.eps))
    if rotary is not None:
        table = rotary[positions.long()].to(hidden.dtype)
        query, key = rotate(query, table), rotate(key, table)
    is_written = kv_slots >= 0
    block, offset = kv_slots[is_written] // block_size, kv_slots[is_written] % block_size
    kv_cache[0, block, :, offset] = key[is_written].to(kv_cache.dtype)
    kv_cache[1, block, :, offset] = value[is_written].to(kv_cache.dtype)
    rotated: Tensor = query.contiguous()
    return rotated
