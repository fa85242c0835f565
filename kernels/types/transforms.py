"""What sequences ask to be done to their logits, in tables that live on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Transforms(NamedTuple):
    """Sparse additions to the logits, a row a slot: entry e of slot s adds value[s, e] to token[s, e]'s logit while the
    position being decided is in first[s, e] … end[s, e] - 1, and the entry's prefix stands right before it. Adding -inf
    is a ban.

    history:     `[S, L]` int32, each slot's tokens: before the position being decided, what a row may look at
    num_entries: `[S]` int32
    token:       `[S, E]` int32, ascending in each slot; a token's entries add up in their order
    value:       `[S, E]` fp32
    first, end:  `[S, E]` int32
    prefix_start, prefix_length: `[S, E]` int32, an entry's prefix is the prefix_length[s, e] tokens of prefix[s] from
                 prefix_start[s, e] on; none stands before every position
    prefix:      `[S, P]` int32
    """

    history: Tensor
    num_entries: Tensor
    token: Tensor
    value: Tensor
    first: Tensor
    end: Tensor
    prefix_start: Tensor
    prefix_length: Tensor
    prefix: Tensor
