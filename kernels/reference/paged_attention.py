"""Causal attention of ragged query chunks over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    context_len: Tensor,
) -> Tensor:
    """softmax(q K^T / sqrt(head_dim)) V, row i of sequence b seeing positions <= context_len[b] - q_len[b] + i.

    query:       `[T, H, head_dim]` fp32
    kv_cache:    `[2, N, Hkv, block_size, head_dim]`: one layer; this forward's keys and values are in it
    block_table: `[S, max_blocks]` int32, one row a sequence slot
    slots:       `[B]` int32, the block_table row of each sequence of the batch
    q_start:     `[B + 1]` int32, rows q_start[b] … q_start[b + 1] - 1 belong to sequence b
    context_len: `[B]` int32, tokens of sequence b in the cache after this forward's writes
    returns      `[T, H * head_dim]` fp32
    """
    num_heads, head_dim = query.shape[1:]
    block_size = kv_cache.shape[3]
    group = num_heads // kv_cache.shape[2]
    outputs = []
    bounds = q_start.tolist()
    for b, (slot, length) in enumerate(zip(slots.tolist(), context_len.tolist(), strict=True)):
        rows = query[bounds[b] : bounds[b + 1]]
        blocks = block_table[slot, : (length + block_size - 1) // block_size].long()
        # [2, n, Hkv, block_size, D] -> [2, Hkv, n * block_size, D], in logical order
        cached = kv_cache[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :length].to(query.dtype)
        key, value = cached.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,hsd->hts", rows, key) * head_dim**-0.5
        position = torch.arange(length, device=query.device)
        is_visible = position[None, :] <= position[length - rows.shape[0] :, None]
        weights = scores.masked_fill(~is_visible, float("-inf")).softmax(dim=-1)
        # A value that is no number would be none with the weight 0 either: it is for the rows that see it.
        is_number = value.isfinite()
        mixed = torch.einsum("hts,hsd->thd", weights, value.where(is_number, 0.0))
        if not is_number.all():
            num_unusable = torch.einsum(
                "ts,hsd->thd", is_visible.to(value.dtype), (~is_number).to(value.dtype)
            )
            mixed.masked_fill_(num_unusable > 0, float("nan"))
        outputs.append(mixed.flatten(1))
    return torch.cat(outputs)
