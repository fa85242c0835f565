"""What one request asks to be added to its logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

FOREVER = 2**31 - 1


class LogitEntry(NamedTuple):
    """`value` is added to `token`'s logit at the positions first … end - 1. Adding -inf is a ban."""

    token: int
    value: float
    first: int = 0
    end: int = FOREVER


def build_entries(
    logit_bias: Iterable[tuple[int, float]], banned: Iterable[int], banned_until: int
) -> list[LogitEntry]:
    """Biases that hold everywhere, and tokens that are banned before a position."""
    biases = [LogitEntry(token, value) for token, value in logit_bias]
    return biases + [LogitEntry(token, float("-inf"), end=banned_until) for token in banned]
