"""The types of a GGUF file's tensors, and what each becomes: floats, a weight in groups, or a conversion to one.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.grouped import GroupedWeight
from specengine.models.checkpoints.gguf_header import TENSOR_TYPES

# Stored as they are.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_IQ4_NL_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def read_tensor(content: np.ndarray, type: str, shape: tuple[int, ...]) -> Tensor | GroupedWeight:
    """A tensor from its bytes.

    content: `[bytes]` uint8. Floats share its memory.
    type:    a name in `FLOATS`, `GROUPED` or `CONVERTED`
    returns  a matrix of a quantised type as a `GroupedWeight`; anything else as a tensor
    """
    if type in FLOATS:
        return torch.from_numpy(content).view(FLOATS[type]).view(shape)
    block, block_bytes = next((block, size) for name, block, size in TENSOR_TYPES.values() if name == type)
    blocks = content.reshape(-1, shape[-1] // block, block_bytes)
    weight = GROUPED[type](blocks) if type in GROUPED else _convert(blocks, type)
    return weight if len(shape) == 2 else weight.dequantize().view(shape)


def _half(blocks: np.ndarray, start: int) -> Tensor:
    """The fp16 number at byte `start` of each block: `[N, K / 32]`."""
    return torch.from_numpy(blocks[..., start : start + 2].copy()).view(torch.float16).squeeze(-1)


def _nibbles(blocks: np.ndarray, start: int) -> Tensor:
    """32 numbers of 4 bits from 16 bytes: the low halves, then the high ones. `[N, K / 32, 32]` int8, 0 … 15."""
    packed = torch.from_numpy(blocks[..., start : start + 16])
    return torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8)


def _q4_0(blocks: np.ndarray) -> GroupedWeight:
    return GroupedWeight((_nibbles(blocks, 2) - 8).flatten(1), _half(blocks, 0), None, 4)


def _q4_1(blocks: np.ndarray) -> GroupedWeight:
    return GroupedWeight(_nibbles(blocks, 4).flatten(1), _half(blocks, 0), _half(blocks, 2), 4)


def _q8_0(blocks: np.ndarray) -> GroupedWeight:
    codes = torch.from_numpy(blocks[..., 2:].copy()).view(torch.int8)
    return GroupedWeight(codes.flatten(1), _half(blocks, 0), None, 8)


def _q5_0(blocks: np.ndarray) -> GroupedWeight:
    high = torch.from_numpy(np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")).view(torch.int8)
    codes = _nibbles(blocks, 6) + 16 * high - 16
    return GroupedWeight(codes.flatten(1), _half(blocks, 0), None, 8)


def _iq4_nl(blocks: np.ndarray) -> GroupedWeight:
    codes = torch.tensor(_IQ4_NL_CODES, dtype=torch.int8)[_nibbles(blocks, 2).long()]
    return GroupedWeight(codes.flatten(1), _half(blocks, 0), None, 8)


# Held without loss.
GROUPED: dict[str, Callable[[np.ndarray], GroupedWeight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "IQ4_NL": _iq4_nl,
}
# Which formats the others become, the nearest that there is.
CONVERTED = {"Q4_K": "int4_min", **dict.fromkeys(("Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"), "int8_group")}
CONVERTED |= dict.fromkeys(
    ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M"), "int8_group"
)
CONVERTED |= dict.fromkeys(("TQ1_0", "TQ2_0", "MXFP4"), "int8_group")


def _convert(blocks: np.ndarray, type: str) -> GroupedWeight:
    from gguf import GGMLQuantizationType, quants

    if type == "Q4_K":
        return _q4_k(blocks)
    numbers = quants.dequantize(blocks.reshape(len(blocks), -1), GGMLQuantizationType[type])
    return reference.quantize_groups(torch.from_numpy(numbers), bits=8, has_minimum=False)


def _q4_k(blocks: np.ndarray) -> GroupedWeight:
    """Eight groups a block; their scales and minima, of 6 bits and a common factor, are rounded to fp16."""
    from gguf.quants import Q4_K

    scale, minimum = Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    shape = (*blocks.shape[:2], 8)
    factor, minimum_factor = (_half(blocks, start).float().unsqueeze(-1) for start in (0, 2))
    # Of 64 bytes in a row the low halves are one group, the high ones the next.
    packed = torch.from_numpy(blocks[..., 16:]).unflatten(-1, (4, 1, 32))
    codes = torch.cat((packed & 15, packed >> 4), dim=-2).view(torch.int8)
    return GroupedWeight(
        codes.flatten(1),
        (factor * torch.from_numpy(scale).view(shape)).half().flatten(1),
        (-minimum_factor * torch.from_numpy(minimum).view(shape)).half().flatten(1),
        4,
    )
