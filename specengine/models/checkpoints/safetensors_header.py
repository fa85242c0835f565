"""Reads and checks a safetensors header before anything else looks at the file.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes, which must cover the
rest of the file without gap or overlap: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specengine.errors import ModelLoadError
from specengine.json_file import LFS_POINTER, describe_lfs_pointer, parse_json, shorten

MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 16

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor. dtype is None where it is no floating-point type that a weight may have.

    format: what a quantised tensor is stored in, by the file's own name for it; its numbers are of `dtype`
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    num_bytes: int
    format: str | None = None


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name. Raises `ModelLoadError` naming file and tensor if it is malformed."""
    with open_regular(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ModelLoadError(describe_lfs_pointer(path))
        header_size = int.from_bytes(start[:8], "little")
        if file_size < 8 or not 2 <= header_size <= min(file_size - 8, MAX_HEADER_BYTES):
            raise ModelLoadError(
                f"{path}: the header claims {header_size} bytes, the file has {file_size} "
                f"(at most {MAX_HEADER_BYTES} are accepted): truncated, or no safetensors file"
            )
        file.seek(8)
        text = file.read(header_size)
    header = parse_json(text, f"{path}: header")
    header.pop("__metadata__", None)
    spans = {}
    for name, entry in header.items():
        spans[name] = _check_entry(entry, f"{path}: tensor {shorten(name)}")
    _check_coverage({name: span for name, (_, span) in spans.items()}, file_size - 8 - header_size, path)
    return {name: info for name, (info, _) in spans.items()}


def open_regular(path: Path) -> Any:
    """A file that is open for reading bytes. Raises `ModelLoadError` for what is no regular file."""
    # A named pipe would block for ever: open without waiting, then look.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelLoadError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def _check_entry(entry: Any, where: str) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where}: expected dtype, shape and data_offsets, found {shorten(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ModelLoadError(f"{where}: unknown dtype {shorten(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelLoadError(f"{where}: shape {shorten(shape)} is no list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelLoadError(f"{where}: data_offsets {shorten(offsets)} are no span")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != num_bytes * 8:
        raise ModelLoadError(
            f"{where}: shape {shorten(shape)} of {dtype} contradicts data_offsets of {num_bytes} bytes"
        )
    return TensorInfo(_TORCH_DTYPES.get(dtype), tuple(shape), num_bytes), (offsets[0], offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_coverage(spans: dict[str, tuple[int, int]], data_size: int, path: Path) -> None:
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            kind = "overlaps the one before" if start < end else "leaves a gap"
            raise ModelLoadError(
                f"{path}: tensor {shorten(name)}: data_offsets [{start}, {stop}] {kind} (at {end})"
            )
        end = stop
    if end != data_size:
        raise ModelLoadError(
            f"{path}: tensors take {end} bytes, the file has {data_size}: truncated or padded"
        )
