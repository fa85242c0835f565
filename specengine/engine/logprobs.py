"""Log-probabilities as callers get them."""

from __future__ import annotations

from collections.abc import Sequence as Collection

from torch import Tensor

from specengine.ops.backend import Backend
from specengine.outputs import TokenLogprob


def token_logprobs(
    backend: Backend, logits: Tensor, tokens: Tensor, limits: Collection[int], *, vocab_size: int
) -> list[TokenLogprob]:
    """Of each row's token, and of its most likely ones.

    logits: `[R, V]` fp32 as the target gives them
    tokens: `[R]` int32
    limits: how many of the most likely tokens each row wants
    """
    if not limits:
        return []
    num_top = min(max(limits), vocab_size)
    chosen, top_ids, top_values = backend.token_logprobs(logits, tokens, num_top)
    columns = (tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), limits)
    return [
        TokenLogprob(token, value, dict(zip(ids[:limit], values[:limit], strict=True)))
        for token, value, ids, values, limit in zip(*columns, strict=True)
    ]
