"""Device memory that launches share: counters that kernels leave at zero, and scratch that they write before reading.

One workspace a device and stream: launches on a stream follow each other, so they may all use the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_zeroed: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
_scratch: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
_MIN_COUNT = 4096


def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least `count` integers, all zero; whoever changes one sets it back to zero before the launch ends."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, dtype)
    if key not in _zeroed or _zeroed[key].numel() < count:
        _zeroed[key] = torch.zeros(_rounded(count), dtype=dtype, device=device)
    return _zeroed[key]


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least `count` elements that hold anything."""
    if device.type != "cuda":
        return torch.empty(count, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, dtype)
    if key not in _scratch or _scratch[key].numel() < count:
        _scratch[key] = torch.empty(_rounded(count), dtype=dtype, device=device)
    return _scratch[key]


def _rounded(count: int) -> int:
    return max(_MIN_COUNT, 1 << (count - 1).bit_length())
