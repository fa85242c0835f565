"""FlashInfer's kernels for what is measured here, as rivals.

Nothing is imported before a rival's first turn: where FlashInfer is missing, or its version has another interface,
the rival is left out and the row says why.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import deferred
from timing import Call
from torch import Tensor

WORKSPACE_BYTES = 128 << 20


def attention(
    query: Tensor, cache_at: Callable[[int], Tensor], blocks: Tensor, expected: Tensor
) -> dict[str, Call]:
    """Decode attention, or append attention where a sequence has several queries, planned beforehand.

    query:    `[T, H, head_dim]` in the cache's dtype, as many rows for each sequence
    cache_at: `[2, N, Hkv, block_size, head_dim]`
    blocks:   `[B, blocks]` int32, all full
    expected: of turn 0, `[T, H * head_dim]`
    """

    def build() -> Call:
        flashinfer = importlib.import_module("flashinfer")
        num_heads, head_dim = query.shape[1:]
        num_kv_heads, block_size = cache_at(0).shape[2:4]
        starts = torch.arange(len(blocks) + 1, dtype=torch.int32, device=query.device)
        last_page_len = torch.full_like(starts[1:], block_size)
        pages = (starts * blocks.shape[1], blocks.flatten(), last_page_len)
        heads = (num_heads, num_kv_heads, head_dim, block_size)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
        if len(query) == len(blocks):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(*pages, *heads, q_data_type=query.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            q_starts = starts * (len(query) // len(blocks))
            wrapper.plan(q_starts, *pages, *heads, causal=True, q_data_type=query.dtype)

        def call(turn: int) -> Tensor:
            return wrapper.run(query, tuple(cache_at(turn)))

        torch.testing.assert_close(call(0).flatten(1).double(), expected, rtol=0.03, atol=0.03)
        return call

    return {"flashinfer": deferred(build)}


def renormalise(logits_at: Callable[[int], Tensor], top_k: int, top_p: float) -> dict[str, Call]:
    """The filtered distributions of rows of logits."""

    def build() -> Call:
        sampling = importlib.import_module("flashinfer.sampling")

        def call(turn: int) -> Tensor:
            probs = sampling.softmax(logits_at(turn))
            if top_k > 0:
                probs = sampling.top_k_renorm_probs(probs, top_k)
            return sampling.top_p_renorm_probs(probs, top_p) if top_p < 1.0 else probs

        return call

    return {"flashinfer": deferred(build)}


def sample(logits_at: Callable[[int], Tensor], then: Callable[[int, Tensor], Any]) -> dict[str, Call]:
    """A token of each row of logits, and what `then` makes of a turn's tokens."""

    def build() -> Call:
        draw = _seeded(importlib.import_module("flashinfer.sampling").sampling_from_logits)
        return lambda turn: then(turn, draw(logits_at(turn)))

    return {"flashinfer": deferred(build)}


def verify_chain(
    logits_at: Callable[[int], Tensor],
    draft_tokens_at: Callable[[int], Tensor],
    draft_probs_at: Callable[[int], Tensor],
) -> dict[str, Call]:
    """Rejection verification of chains: logits `[B, k + 1, V]`, draft tokens `[B, k]` and probabilities `[B, k, V]`."""

    def build() -> Call:
        sampling = importlib.import_module("flashinfer.sampling")
        wanted, found = "target_probs", list(_parameters(sampling.chain_speculative_sampling))[2]
        if found != wanted:
            raise TypeError(f"chain_speculative_sampling takes {found} where newer versions take {wanted}")
        verify = _seeded(sampling.chain_speculative_sampling)

        def call(turn: int) -> Any:
            logits = logits_at(turn)
            probs = sampling.softmax(logits.flatten(0, 1)).view(logits.shape)
            return verify(draft_probs_at(turn), draft_tokens_at(turn), probs)

        return call

    return {"flashinfer": deferred(build)}


def _parameters(function: Callable[..., Any]) -> Any:
    return inspect.signature(function).parameters


def _seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """With a seed of its own: while a graph is captured no generator's state can be read."""
    return partial(function, seed=0, offset=0) if "seed" in _parameters(function) else function
