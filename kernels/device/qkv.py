"""One head's part of a query/key/value projection: rotated, and written to where queries, keys and values go."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.launch import ceil_div
from specengine.kernels.device.rounding import round_to
from specengine.kernels.types.packed import PackedLinear


@triton.jit
def head_columns(tile, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """The head of a column tile, the features of that head it covers `[BLOCK_N]`, and which of them exist."""
    TILES_A_HEAD: tl.constexpr = (HEAD_DIM + BLOCK_N - 1) // BLOCK_N
    features = (tile % TILES_A_HEAD) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tile // TILES_A_HEAD, features, features < HEAD_DIM


@triton.jit
def rotate(x, rotary_ptr, positions, row_mask, features, ROTARY_DIM: tl.constexpr):
    """x `[BLOCK_M, BLOCK_N]` with its first ROTARY_DIM features rotated, half-split (Su et al., 2021).

    All of them lie in the tile that begins with feature 0: BLOCK_N >= ROTARY_DIM.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    is_first, is_rotated = features < HALF, features < ROTARY_DIM
    partner = tl.where(is_first, features + HALF, features - HALF)
    partner = tl.where(is_rotated, partner, 0)
    other = tl.gather(x, tl.broadcast_to(partner[None, :], x.shape), axis=1)
    at = positions[:, None].to(tl.int64) * ROTARY_DIM + (features % HALF)[None, :]
    mask = row_mask[:, None] & is_rotated[None, :]
    cosine = tl.load(rotary_ptr + at, mask, other=1.0)
    sine = tl.load(rotary_ptr + at + HALF, mask, other=0.0)
    signed = tl.where(is_first[None, :], -other, other)
    return tl.where(is_rotated[None, :], x * cosine + signed * sine, x)


@triton.jit
def norm_head(x, weight_ptr, features, has_feature, HEAD_DIM: tl.constexpr, eps):
    """RMSNorm of a head's features, all of which x `[BLOCK_M, BLOCK_N]` holds."""
    squares = tl.sum(tl.where(has_feature[None, :], x * x, 0.0), axis=1)
    inverse = 1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps)
    weight = tl.load(weight_ptr + features, mask=has_feature, other=0.0)
    return x * inverse[:, None] * weight[None, :]


@triton.jit
def store_head(
    x,
    head,
    features,
    has_feature,
    rows,
    row_mask,
    query_ptr,
    positions_ptr,
    kv_slots_ptr,
    kv_cache_ptr,
    num_blocks,
    rotary_ptr,
    head_norm_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """Writes x `[BLOCK_M, BLOCK_N]`, features of head `head` (queries, then keys, then values).

    head_norm_ptr: None, or see `norm_qkv`; then a tile holds whole heads
    """
    if head_norm_ptr is not None:
        if head < NUM_HEADS + NUM_KV_HEADS:
            is_key = tl.where(head >= NUM_HEADS, HEAD_DIM, 0)
            x = norm_head(x, head_norm_ptr + is_key, features, has_feature, HEAD_DIM, eps)
    if ROTARY_DIM > 0:
        if (head < NUM_HEADS + NUM_KV_HEADS) & (tl.min(features, axis=0) < ROTARY_DIM):
            positions = tl.load(positions_ptr + rows, row_mask, other=0)
            x = rotate(x, rotary_ptr, positions, row_mask, features, ROTARY_DIM)
    if head < NUM_HEADS:
        at = (rows.to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + features[None, :]
        tl.store(query_ptr + at, x, row_mask[:, None] & has_feature[None, :])
    else:
        is_value = head >= NUM_HEADS + NUM_KV_HEADS
        kv_head = head - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
        slots = tl.load(kv_slots_ptr + rows, row_mask, other=-1)
        block = slots // BLOCK_SIZE + tl.where(is_value, num_blocks, 0)
        place = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slots % BLOCK_SIZE
        at = place[:, None] * HEAD_DIM + features[None, :]
        written = round_to(x, kv_cache_ptr.dtype.element_ty)
        tl.store(kv_cache_ptr + at, written, (slots >= 0)[:, None] & has_feature[None, :])


def check_places(
    num_rows: int,
    weight: PackedLinear,
    positions: Tensor,
    kv_slots: Tensor,
    kv_cache: Tensor,
    rotary: Tensor | None,
    head_norm: Tensor | None = None,
) -> int:
    """Checks what a projection reads and writes besides its rows; returns the number of query heads."""
    if kv_cache.dim() != 5 or kv_cache.shape[0] != 2 or not kv_cache.is_contiguous():
        raise ValueError(
            f"kv_cache: expected contiguous [2, N, Hkv, block_size, head_dim], got {list(kv_cache.shape)}"
        )
    if kv_cache.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"kv_cache: expected float32, float16 or bfloat16, got {kv_cache.dtype}")
    for name, tensor, dtype in (("positions", positions, torch.int32), ("kv_slots", kv_slots, torch.int64)):
        if tensor.shape != (num_rows,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [{num_rows}] {dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )
    num_kv_heads, head_dim = kv_cache.shape[2], kv_cache.shape[4]
    num_heads = weight.out_features // head_dim - 2 * num_kv_heads
    if weight.out_features % head_dim or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"weight: {weight.out_features} output features are no whole heads of {head_dim} beside "
            f"{num_kv_heads} key and value heads"
        )
    if head_norm is not None and (
        head_norm.shape != (2, head_dim) or head_norm.dtype != torch.float32 or not head_norm.is_contiguous()
    ):
        raise ValueError(
            f"head_norm: expected contiguous [2, {head_dim}] torch.float32, got {list(head_norm.shape)} "
            f"{head_norm.dtype}"
        )
    if rotary is not None:
        is_table = rotary.dim() == 3 and rotary.shape[1] == 2 and rotary.is_contiguous()
        if not is_table or rotary.dtype != torch.float32 or 2 * rotary.shape[2] > head_dim:
            raise ValueError(
                f"rotary: expected contiguous [P, 2, rotary_dim / 2] torch.float32 with rotary_dim <= {head_dim}, "
                f"got {list(rotary.shape)} {rotary.dtype}"
            )
    return num_heads


def head_tiles(
    num_heads: int, head_dim: int, rotary: Tensor | None, head_norm: Tensor | None = None, *, block_n: int
) -> tuple[int, int]:
    """Column tiles of `num_heads` heads and their width: at least `block_n`, and in one tile all features that are
    rotated, all of a head that is normed."""
    together = 2 * rotary.shape[2] if rotary is not None else 1
    if head_norm is not None:
        together = head_dim
    block_n = max(block_n, triton.next_power_of_2(together))
    return num_heads * ceil_div(head_dim, block_n), block_n
