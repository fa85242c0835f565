"""What one request asks to be added to its logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

FOREVER = 2**31 - 1
_BAN = float("-inf")


class LogitEntry(NamedTuple):
    """`value` is added to `token`'s logit at the positions first … end - 1 that come right after `prefix`, tokens of
    the prompt or the output. Adding -inf is a ban."""

    token: int
    value: float
    first: int = 0
    end: int = FOREVER
    prefix: tuple[int, ...] = ()


def build_entries(
    logit_bias: Iterable[tuple[int, float]],
    banned: Iterable[int],
    banned_until: int,
    bad_words: Iterable[Sequence[int]] = (),
) -> list[LogitEntry]:
    """Biases that hold everywhere, tokens that are banned before a position, and sequences of tokens that are never
    completed."""
    entries = [LogitEntry(token, value) for token, value in logit_bias]
    entries += [LogitEntry(token, _BAN, end=banned_until) for token in banned]
    return entries + [LogitEntry(word[-1], _BAN, prefix=tuple(word[:-1])) for word in bad_words]
