"""The one way a kernel is launched, so that a launch can also be recorded instead of run.

`with record() as launches:` collects what the ops would launch. Nothing runs, so meta tensors of any size will do:
that is how kernels are compiled ahead of time at real shapes, and counted.

It also decides which launches are dependent (`specengine.kernels.device.dependent`): those of kernels with a constexpr
PDL, on GPUs that can. The environment variable SPECENGINE_PDL=0 turns it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides when a kernel is decorated: this module's import is where it is decided for all of them.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
if IS_INTERPRETED:
    from specengine.kernels.device.interpreted import make_products_row_invariant

    make_products_row_invariant()

_assumed = 90


def capability_of(device: torch.device) -> int:
    """A device's generation, 80 or 90 (and later); what cannot be asked (CPU, meta) counts as 90."""
    if device.type != "cuda":
        return _assumed
    major, minor = torch.cuda.get_device_capability(device)
    return 90 if 10 * major + minor >= 90 else 80


def assume_capability(capability: int) -> None:
    """What `capability_of` says of devices that have none: for compiling ahead of time."""
    global _assumed
    _assumed = capability


def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on a device begin while the one before them still runs."""
    wanted = os.environ.get("SPECENGINE_PDL", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"SPECENGINE_PDL={wanted!r}: expected 0 or 1")
    return wanted == "1" and not IS_INTERPRETED and capability_of(device) >= 90


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments: by name, in the kernel's order, constexprs included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

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
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Runs `kernel` with positional arguments and constexprs on a grid; an empty grid is nothing.

    Multiplications and additions are never contracted: two kernels that compute the same expression must agree on
    its bits. PDL, where the kernel has it, is set here.
    """
    if 0 in grid:
        return
    if "PDL" in kernel.arg_names:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        constants["PDL"] = has_dependent_launch(device)
    if _recorders:
        names = kernel.arg_names
        given = {**dict(zip(names, arguments, strict=False)), **constants}
        ordered = {name: given[name] for name in names}
        _recorders[-1].append(Launch(kernel, grid, ordered, num_warps, num_stages, max_registers))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    kernel[grid](*arguments, **constants, **options, launch_pdl=constants.get("PDL", False))


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
