"""A test that launches Triton kernels carries the marker `triton`: that is how `-m gpu` finds it on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton.runtime.jit import KernelInterface

MARKERS = ("triton", "gpu")
_running: list[pytest.Item] = []


@contextmanager
def running(item: pytest.Item) -> Iterator[None]:
    """Meanwhile launches are the test's."""
    _running.append(item)
    try:
        yield
    finally:
        _running.pop()


def watch_launches() -> None:
    """From now on a launch of a test without the marker fails."""
    launcher = KernelInterface.__getitem__

    def checked(self: Any, grid: Any) -> Any:
        item = _running[-1] if _running else None
        if item is not None and not any(map(item.get_closest_marker, MARKERS)):
            pytest.fail(f"{item.nodeid} launches Triton kernels without the marker triton", pytrace=False)
        return launcher(self, grid)

    KernelInterface.__getitem__ = checked  # type: ignore[method-assign]
