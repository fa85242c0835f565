"""Code of a request's own between its logits and its draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

# (token ids so far, `[V]` fp32 logits of the next token) -> logits
LogitsProcessor = Callable[[list[int], Tensor], Tensor]


def process(processors: Sequence[LogitsProcessor], token_ids: list[int], logits: Tensor) -> Tensor:
    """What the processors, one after the other, make of the logits `[V]` of the token after `token_ids`.

    They may write both. What they raise is passed on; `TypeError` and `ValueError` for what is no such row of logits.
    """
    for processor in processors:
        given = processor(list(token_ids), logits.clone())
        if not isinstance(given, Tensor):
            raise TypeError(f"logits_processor {processor!r} must return a tensor, got {given!r}")
        if given.shape != logits.shape:
            raise ValueError(
                f"logits_processor {processor!r} must return logits of shape {list(logits.shape)}, "
                f"got {list(given.shape)}"
            )
        logits = given.to(logits)
    return logits
