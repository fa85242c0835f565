"""What a prompt is: text, or token ids in anything that has an order."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from specengine.kinds import check_ids, check_text

Prompt = str | Sequence[int]
MAX_NUM_IDS = 2**31


class Rendered(str):
    """A conversation as a template wrote it: its special tokens are spelled out, and none are added around it."""

    __slots__ = ()


def check_prompts(prompts: object, *, num_ids: int = MAX_NUM_IDS) -> tuple[list[str | list[int]], bool]:
    """The prompts as a list of texts and lists of ids, and whether a single one was given.

    A prompt is text or token ids: a list, a tuple, a range, a one-dimensional array or tensor. Several are a list of
    these. An id is whatever Python takes as an index: an int, one of NumPy's, a tensor without dimensions; `num_ids`
    and above are refused.

    Raises `ValueError` for what is empty or out of range, `TypeError` for anything else.
    """
    if isinstance(prompts, str):
        return [check_prompt("prompt", prompts, num_ids=num_ids)], True
    items = _as_list("prompt", prompts)
    if not items:
        raise ValueError("prompt must not be empty, got []")
    if not isinstance(items[0], list | tuple | range | str) and hasattr(items[0], "__index__"):
        return [_check_ids("prompt", items, num_ids)], True
    return [
        check_prompt(f"prompt[{index}]", item, num_ids=num_ids) for index, item in enumerate(items)
    ], False


def check_prompt(name: str, prompt: object, *, num_ids: int = MAX_NUM_IDS) -> str | list[int]:
    """One prompt, as text or a list of ids; `check_prompts` says what may be one, and what is raised."""
    if not isinstance(prompt, str):
        return _check_ids(name, _as_list(name, prompt), num_ids)
    if not prompt:
        raise ValueError(f"{name} must not be empty, got ''")
    return check_text(name, prompt)


def _check_ids(name: str, ids: list[Any], num_ids: int) -> list[int]:
    if not ids:
        raise ValueError(f"{name} must not be empty, got []")
    return check_ids(name, ids, num_ids - 1)


def _as_list(name: str, value: object) -> list[Any]:
    """Ordered things as lists, arrays and tensors among and in them as Python's own."""
    converted = _plain(value)
    if not isinstance(converted, Sequence) or isinstance(converted, str | bytes | bytearray | memoryview):
        raise TypeError(
            f"{name} must be a string, a list of token ids or a list of these, got {reprlib.repr(value)}"
        )
    items = list(converted)
    return items if set(map(type, items)) == {int} else [_plain(item) for item in items]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value
