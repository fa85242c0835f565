"""Batches of paged attention to measure: rotating caches, and the same keys and values as PyTorch wants them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE, MAX_CONTEXT = 16, 1024


@dataclass(frozen=True)
class Case:
    """B sequences, each with as many queries and as many tokens in the cache.

    query:       `[T, H, head_dim]` fp32
    caches:      `[copies, 2, N, H, block_size, head_dim]`, one for each turn
    block_table: `[B, max_blocks]` int32, of which the first context / block_size columns are in use
    mask:        `[q_len, context]`, what a row sees; None if everything
    """

    query: Tensor
    caches: Tensor
    block_table: Tensor
    slots: Tensor
    q_start: Tensor
    context_len: Tensor
    context: int
    mask: Tensor | None

    def cache_at(self, turn: int) -> Tensor:
        return self.caches[turn % len(self.caches)]

    def run(self, op: Callable[..., Tensor], query: Tensor, turn: int) -> Tensor:
        return op(query, self.cache_at(turn), self.block_table, self.slots, self.q_start, self.context_len)

    @property
    def blocks(self) -> Tensor:
        return self.block_table[:, : self.context // BLOCK_SIZE]

    @property
    def num_bytes(self) -> int:
        """Of the keys and values."""
        return self.caches[0].nbytes

    def gather(self, cache: Tensor) -> Tensor:
        """`[2, B, H, context, head_dim]`, what PyTorch needs."""
        gathered = cache[:, self.blocks.flatten()].unflatten(1, self.blocks.shape)
        return gathered.transpose(2, 3).flatten(3, 4)

    def model_query(self) -> Tensor:
        """`[B, H, q_len, head_dim]` in the cache's dtype, what PyTorch needs."""
        return self.query.unflatten(0, (len(self.slots), -1)).transpose(1, 2).to(self.caches.dtype)

    def attend(self, query: Tensor, gathered: Tensor) -> Tensor:
        """`[T, H * head_dim]` by PyTorch."""
        is_causal = query.shape[2] == self.context
        mask = None if is_causal else self.mask
        out = F.scaled_dot_product_attention(query, *gathered, attn_mask=mask, is_causal=is_causal)
        return out.transpose(1, 2).reshape(len(self.query), -1)


def build_case(
    heads: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    num_copies: Callable[[int], int],
    device: torch.device,
) -> Case:
    (num_heads, head_dim), (batch, q_len, context) = heads, sizes
    generator = torch.Generator().manual_seed(0)
    num_blocks = batch * context // BLOCK_SIZE
    shape = (2, num_blocks, num_heads, BLOCK_SIZE, head_dim)
    copies = num_copies(math.prod(shape) * dtype.itemsize)
    # Some random blocks again and again: filling everything would take longer than measuring.
    some = torch.randn(127, *shape[2:], generator=generator).to(device, dtype)
    caches = some[torch.arange(copies * 2 * num_blocks, device=device) % len(some)].view(copies, *shape)
    block_table = torch.zeros(batch, MAX_CONTEXT // BLOCK_SIZE, dtype=torch.int32)
    blocks = torch.randperm(num_blocks, generator=generator).view(batch, -1)
    block_table[:, : blocks.shape[1]] = blocks
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    query = torch.randn(batch * q_len, num_heads, head_dim, generator=generator)
    mask = torch.ones(q_len, context, dtype=torch.bool, device=device).tril(context - q_len)
    return Case(
        query.to(device),
        caches,
        block_table.to(device),
        slots,
        q_start=torch.arange(batch + 1, dtype=torch.int32, device=device) * q_len,
        context_len=torch.full_like(slots, context),
        context=context,
        mask=mask if q_len > 1 else None,
    )


def shape_name(heads: tuple[int, int], batch: int, context: int) -> str:
    name = f"{heads[0]}x{heads[1]} context {context}"
    return f"{name} batch {batch}" if batch > 1 else name
