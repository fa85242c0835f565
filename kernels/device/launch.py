"""The one way a kernel is launched, so that a launch can also be recorded instead of run.

`with record() as launches:` collects what the ops would launch. Nothing runs, so meta tensors of any size will do:
that is how kernels are compiled ahead of time at real shapes, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

# Triton decides when a kernel is decorated: this module's import is where it is decided for all of them.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments: by name, in the kernel's order, constexprs included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's, as profilers show it."""
        return str(self.kernel.fn.__name__)


_recorders: list[list[Launch]] = []


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Launches are collected, not run, until the end of the block."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 2, **constants: Any
) -> None:
    """Runs `kernel` with positional arguments and constexprs on a grid; an empty grid is nothing.

    Multiplications and additions are never contracted: two kernels that compute the same expression must agree on
    its bits.
    """
    if 0 in grid:
        return
    if _recorders:
        names = kernel.arg_names
        given = {**dict(zip(names, arguments, strict=False)), **constants}
        ordered = {name: given[name] for name in names}
        _recorders[-1].append(Launch(kernel, grid, ordered, num_warps, num_stages))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    kernel[grid](*arguments, **constants, **options)


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
