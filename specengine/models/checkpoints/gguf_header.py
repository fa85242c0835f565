"""Reads and checks the header of a GGUF file before anything else looks at the file.

A file is the magic, a version, two counts, the metadata (keys with typed values), a description of each tensor, and
the tensors' bytes, each at a multiple of the alignment: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specengine.errors import ModelLoadError
from specengine.json_file import LFS_POINTER, describe_lfs_pointer, shorten
from specengine.models.checkpoints.safetensors_header import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Vocabularies of half a million tokens with their merges take a tenth of this.
MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 12
MAX_KEY_BYTES = 1 << 10
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21  # of all arrays together
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

# By the number that a file has for each kind of value: what it is called, and how one is unpacked.
_SCALARS = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<?"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
_STRING, _ARRAY = 8, 9

# By the number that a file has for each type of tensor: its name, and how many numbers a block of how many bytes has.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor.

    type:         a name in `TENSOR_TYPES`
    shape:        rows first, as PyTorch has it (a file lists dimensions the other way round)
    start, stop:  its bytes in the file
    """

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors' bytes.

    metadata: values by key: bool, int, float, str, a tuple of strings, or a numpy array of numbers
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file. Raises `ModelLoadError` naming file and field if it is malformed.

    Reads no tensor, and takes memory in proportion to the header, never to what the header claims.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ModelLoadError(describe_lfs_pointer(path))
        _check_start(start[:8], path)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _HeaderReader(content, size, path).read()


def _check_start(start: bytes, path: Path) -> None:
    if start[:4] != MAGIC or len(start) < 8:
        raise ModelLoadError(
            f"{path}: no GGUF file: it begins with {shorten(start[:4])} instead of {MAGIC.decode()}, or is truncated"
        )
    version = int.from_bytes(start[4:], "little")
    if version in VERSIONS:
        return
    if int.from_bytes(start[4:], "big") in VERSIONS:
        raise ModelLoadError(f"{path}: a big-endian GGUF file, which is not read: convert the model anew")
    known = " and ".join(map(str, VERSIONS))
    raise ModelLoadError(f"{path}: GGUF version {version} is not supported; known are {known}")


class _HeaderReader:
    """Reads one value after the other, each only if the file still has its bytes."""

    def __init__(self, content: mmap.mmap, size: int, path: Path) -> None:
        self._content = content
        self._size = size
        self._end = min(size, MAX_HEADER_BYTES)
        self._at = 8
        self._path = path
        self._strings_left = MAX_STRINGS

    def read(self) -> GgufHeader:
        num_tensors = self._count("tensor count", MAX_TENSORS)
        num_keys = self._count("number of metadata keys", MAX_KEYS)
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self._string(f"metadata key {index}", MAX_KEY_BYTES)
            where = f"metadata {shorten(key)}"
            if key in metadata:
                raise self._error(f"{where} occurs twice")
            metadata[key] = self._value(self._number("<I", where), where)
        described: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for index in range(num_tensors):
            name = self._string(f"name of tensor {index}", MAX_KEY_BYTES)
            if name in described:
                raise self._error(f"tensor {shorten(name)} occurs twice")
            described[name] = self._tensor(f"tensor {shorten(name)}")
        return GgufHeader(metadata, self._place(described, self._alignment(metadata)))

    def _error(self, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path}: {problem}")

    def _take(self, num_bytes: int, where: str) -> int:
        """Where the next bytes begin; they are the caller's from here on."""
        start = self._at
        if num_bytes > self._end - start:
            limit = "the file" if self._end == self._size else f"a header ({MAX_HEADER_BYTES} bytes at most)"
            raise self._error(
                f"{where}: {num_bytes} bytes are claimed at {start}, {limit} has {self._end - start} left: "
                "truncated or malformed"
            )
        self._at = start + num_bytes
        return start

    def _number(self, format: str, where: str) -> Any:
        return struct.unpack_from(format, self._content, self._take(struct.calcsize(format), where))[0]

    def _count(self, where: str, most: int) -> int:
        count: int = self._number("<Q", where)
        if count > most:
            raise self._error(f"{where}: {count} are claimed, at most {most} are accepted")
        return count

    def _string(self, where: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self._number("<Q", where)
        if length > most:
            raise self._error(f"{where}: a string of {length} bytes; at most {most} are accepted")
        start = self._take(length, where)
        try:
            return self._content[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{where}: no UTF-8 ({error.reason} at byte {error.start})") from error

    def _value(self, kind: int, where: str) -> Any:
        if kind == _STRING:
            return self._string(where)
        if kind == _ARRAY:
            return self._array(where)
        if kind not in _SCALARS:
            raise self._error(f"{where}: {kind} is no type of value")
        return self._number(_SCALARS[kind][1], where)

    def _array(self, where: str) -> Any:
        kind, length = self._number("<I", where), self._number("<Q", where)
        if kind == _ARRAY:
            raise self._error(f"{where}: an array of arrays, which is not supported")
        if kind == _STRING:
            if length > self._strings_left:
                raise self._error(
                    f"{where}: an array of {length} strings; all have at most {MAX_STRINGS} together"
                )
            self._strings_left -= length
            return self._strings(length, where)
        if kind not in _SCALARS:
            raise self._error(f"{where}: {kind} is no type of value")
        dtype = np.dtype(_SCALARS[kind][1])
        start = self._take(length * dtype.itemsize, where)
        return np.frombuffer(self._content[start : self._at], dtype)

    def _strings(self, length: int, where: str) -> tuple[str, ...]:
        """As `_string` for each, in a third of the time: vocabularies have hundreds of thousands."""
        content, at, end = self._content, self._at, self._end
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for index in range(length):
            stop = at + 8
            if stop <= end:
                stop += unpack(content, at)[0]
            if stop > end:
                self._at = at
                self._string(f"{where}[{index}]")
            try:
                found.append(content[at + 8 : stop].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self._error(
                    f"{where}[{index}]: no UTF-8 ({error.reason} at byte {error.start})"
                ) from error
            at = stop
        self._at = at
        return tuple(found)

    def _tensor(self, where: str) -> tuple[str, tuple[int, ...], int]:
        num_dimensions = self._number("<I", where)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._error(f"{where}: {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are accepted")
        sizes = [self._number("<Q", where) for _ in range(num_dimensions)]
        kind, offset = self._number("<I", where), self._number("<Q", where)
        if kind not in TENSOR_TYPES:
            raise self._error(f"{where}: {kind} is no type of tensor that is known")
        name, block, _ = TENSOR_TYPES[kind]
        if not all(0 < size < 1 << 62 for size in sizes):
            raise self._error(f"{where}: {shorten(sizes)} are no sizes")
        if sizes[0] % block:
            raise self._error(
                f"{where}: rows of {sizes[0]} are no multiple of the {block} in a block of {name}"
            )
        # As PyTorch has it, without the ones that some writers append.
        return name, tuple(reversed(sizes)), offset

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        is_power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
        if isinstance(alignment, bool) or not is_power or alignment > MAX_ALIGNMENT:
            raise self._error(
                f"metadata 'general.alignment': {shorten(alignment)} is no power of two up to {MAX_ALIGNMENT}"
            )
        return int(alignment)

    def _place(
        self, described: Mapping[str, tuple[str, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufTensor]:
        data_start = -(-self._at // alignment) * alignment
        sizes = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}
        tensors = {}
        for name, (type, shape, offset) in described.items():
            block, block_bytes = sizes[type]
            num_bytes = math.prod(shape) // block * block_bytes
            start = data_start + offset
            where = f"tensor {shorten(name)}"
            if offset % alignment:
                raise self._error(f"{where}: offset {offset} is no multiple of the alignment {alignment}")
            if start + num_bytes > self._size:
                raise self._error(
                    f"{where}: shape {shorten(list(shape))} of {type} takes {num_bytes} bytes at {start}, the file "
                    f"has {self._size}: truncated or malformed"
                )
            tensors[name] = GgufTensor(type, shape, start, start + num_bytes)
        self._check_overlap(tensors)
        return tensors

    def _check_overlap(self, tensors: Mapping[str, GgufTensor]) -> None:
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self._error(f"tensor {shorten(name)} overlaps {shorten(before)}")
            end, before = tensor.stop, name
