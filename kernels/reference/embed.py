"""Token embedding plus learned positions."""

from __future__ import annotations

from torch import Tensor


def embed(token_ids: Tensor, positions: Tensor, token_table: Tensor, position_table: Tensor | None) -> Tensor:
    """hidden[t] = token_table[token_ids[t]] (+ position_table[positions[t]]), in fp32.

    token_ids:      `[T]` int32
    positions:      `[T]` int32, absolute
    token_table:    `[V, D]` in the storage dtype
    position_table: `[P, D]` in the storage dtype, or None (rotary models)
    returns         `[T, D]` fp32
    """
    hidden = token_table[token_ids.long()].float()
    if position_table is not None:
        hidden = hidden + position_table[positions.long()].float()
    return hidden
