"""Device memory that launches share: counters that kernels leave at zero, and scratch that they write before reading.

One workspace a device and stream: launches on a stream follow each other, so they may all use the same memory. What
was outgrown is kept: CUDA graphs that were recorded with it go on using it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Key = tuple[torch.device, int, torch.dtype]
_Workspaces = dict[_Key, Tensor]

_zeroed: _Workspaces = {}
_scratch: _Workspaces = {}
_outgrown: list[Tensor] = []
_MIN_COUNT = 4096


def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least `count` integers, all zero; whoever changes one sets it back to zero before the launch ends."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, dtype)
    return _at_least(count, _zeroed, key, torch.zeros)


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least `count` elements that hold anything."""
    if device.type != "cuda":
        return torch.empty(count, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, dtype)
    return _at_least(count, _scratch, key, torch.empty)


def _at_least(count: int, known: _Workspaces, key: _Key, make: Callable[..., Tensor]) -> Tensor:
    old = known.get(key)
    if old is None or old.numel() < count:
        if old is not None:
            _outgrown.append(old)
        device, _, dtype = key
        size = max(_MIN_COUNT, 1 << (count - 1).bit_length())
        known[key] = make(size, dtype=dtype, device=device)
    return known[key]
