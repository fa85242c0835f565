"""Linear layers to measure: copies of one layer that outgrow the caches, for us and for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_timing import num_copies
from gpu_timing import Gpu
from kernel_cases import NATIVE, assert_earned, honest
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.reference.norm_qkv import rotate
from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.ops.backend import Backend
from specengine.weight_formats import GROUPED_FORMATS, INT8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
# Weights by group, beside what PyTorch has instead: the numbers that they mean, in fp32.
GROUPED = {format.name: format for format in GROUPED_FORMATS}
# In what a PyTorch model computes, and keeps its cache, that has weights of a dtype.
MODEL_DTYPE = {**DTYPES, "int8": torch.float16, **dict.fromkeys(GROUPED, torch.float32)}
CPU_ROWS = (1, 2, 4, 6, 8, 9, 16, 64)
GPU_ROWS = (1, 4, 9, 16, 64)
VOCAB_SIZE, PADDED_VOCAB_SIZE = 50257, 50304
HEAD_SHAPE = (PADDED_VOCAB_SIZE, 1024)
# Of the root mean square of the output: what rounding weights and activations to the dtype may cost.
RELATIVE_ERROR = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3, "int8": 0.02}
NORM_EPS = 1e-5
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Layers:
    """Copies of a linear layer, and the norm before it.

    dtype:   a name of DTYPES or GROUPED
    plain:   before packing and quantization, for the reference; of GROUPED the numbers that the groups mean
    packed:  ours
    pytorch: PyTorch's, as the builder makes them
    """

    dtype: str
    norm: Norm
    plain: PackedLinear
    packed: list[PackedLinear]
    pytorch: list[Any]

    @property
    def shape(self) -> str:
        return f"{self.plain.out_features}x{self.plain.in_features}"

    @property
    def num_bytes(self) -> int:
        """Of one copy's weights."""
        return round(self.plain.weight.numel() * bytes_a_weight(self.dtype))

    def packed_at(self, turn: int) -> PackedLinear:
        return self.packed[turn % len(self.packed)]

    def pytorch_at(self, turn: int) -> Any:
        return self.pytorch[turn % len(self.pytorch)]

    def to_model(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In the dtype that a PyTorch model with these weights computes in."""
        return tuple(tensor.to(MODEL_DTYPE[self.dtype]) for tensor in tensors)


def bytes_a_weight(dtype: str) -> float:
    """Of weights by group with the fp16 scale, and minimum, of their group."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize
    format = GROUPED[dtype]
    assert format.group_size, "these have groups"
    return format.bits / 8 + 2 * (1 + format.has_minimum) / format.group_size


def over_layers(fixture: str, shapes: list[tuple[int, int]]) -> pytest.MarkDecorator:
    """A test of every layer in every dtype; `fixture` is "native_layers" or "gpu_layers"."""
    dtypes = [*DTYPES, *(GROUPED if fixture == "native_layers" else ())]
    cases = [(shape, dtype) for dtype in dtypes for shape in shapes]
    names = [f"{dtype}-{shape[0]}x{shape[1]}" for shape, dtype in cases]
    return pytest.mark.parametrize(fixture, cases, ids=names, indirect=True)


def check_native(layers: Layers, actual: Tensor, op: str, run: Callable[..., Tensor], x: Tensor) -> None:
    """Against the reference op, as `run` calls it: as good as it in this dtype; for int8, near the fp32 layer."""
    exact = run(getattr(reference, op), x.double(), layers.plain)
    if layers.dtype == "int8":
        assert_near(actual, exact, layers.dtype)
    else:
        assert_earned(actual, run(honest(op), x, layers.plain), exact)


def assert_near(actual: Tensor, exact: Tensor, dtype: str) -> None:
    """As near to the float64 layer as weights of `dtype` let it be."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    error = float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error < RELATIVE_ERROR[dtype], f"relative error {error:.2e}, {dtype}"


def build_native_layers(shape: tuple[int, int], dtype: str) -> Layers:
    """PyTorch's copies are functions of the rows."""
    build = pytorch_int8 if dtype == "int8" else pytorch_linear
    return _build(shape, dtype, NATIVE, num_copies, build, torch.device("cpu"), None)


def pytorch_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x.to(weight.dtype), weight)


def pytorch_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.ao's dynamic quantization, per output channel, without the module around it."""
    scales = weight.abs().amax(dim=1).double() / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def build_gpu_layers(shape: tuple[int, int], dtype: str, gpu: Gpu) -> Layers:
    """With a bias, as models have it, but for the head. PyTorch's copies are (weight, bias, scale) for `linear`."""
    bias = None
    if shape != HEAD_SHAPE:
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(gpu.device)
    model_bias = None if bias is None else bias.to(MODEL_DTYPE[dtype])

    def build(weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scale = None
        if dtype == "int8":
            weight, scale = reference.quantize_rows(weight)
            scale = scale.to(MODEL_DTYPE[dtype])
        return weight, model_bias, scale

    return _build(shape, dtype, gpu.ops, gpu.num_copies, build, gpu.device, bias)


def _build(
    shape: tuple[int, int],
    dtype: str,
    ops: Backend,
    num_copies: Callable[[int], int],
    for_pytorch: Callable[[Tensor], Any],
    device: torch.device,
    bias: Tensor | None,
) -> Layers:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    weight = torch.randn(shape, generator=generator) * in_features**-0.5
    norm_weight = 1 + 0.1 * torch.randn(in_features, generator=generator)
    stored: Tensor | GroupedWeight
    if dtype in GROUPED:
        format = GROUPED[dtype]
        stored = reference.quantize_groups(weight, bits=format.bits, has_minimum=format.has_minimum)
        weight = stored.dequantize()
    else:
        stored = weight = weight.to(device, torch.float32 if dtype == "int8" else DTYPES[dtype])
    norm = Norm(norm_weight.to(device), torch.zeros(in_features, device=device), NORM_EPS)
    layers = Layers(dtype, norm, PackedLinear(weight, bias, in_features, out_features), [], [])
    for _ in range(num_copies(layers.num_bytes)):
        copy = weight.clone()
        packed = stored if dtype in GROUPED else copy
        layers.packed.append(ops.pack_linear(packed, bias, INT8 if dtype == "int8" else None))
        layers.pytorch.append(for_pytorch(copy))
    return layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """F.linear; int8 weights are multiplied out on the way, which torch.compile fuses."""
    if scale is None:
        return F.linear(x, weight, bias)
    out = F.linear(x, weight.to(x.dtype)) * scale
    return out if bias is None else out + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)


@dataclass(frozen=True)
class Places:
    """Where the keys and values of some rows go: positions and slots `[T]`, one layer's cache."""

    positions: Tensor
    kv_slots: Tensor
    kv_cache: Tensor


def build_places(rows: int, num_heads: int, head_dim: int, dtype: str, device: torch.device) -> Places:
    num_blocks = rows // BLOCK_SIZE + 1
    slots = torch.randperm(num_blocks * BLOCK_SIZE, generator=torch.Generator().manual_seed(4))[:rows]
    positions = 100 + torch.arange(rows, dtype=torch.int32)
    shape = (2, num_blocks, num_heads, BLOCK_SIZE, head_dim)
    cache = torch.zeros(shape, dtype=MODEL_DTYPE[dtype], device=device)
    return Places(positions.to(device), slots.to(device), cache)


def split_heads(projected: Tensor, places: Places, rotary: Tensor | None) -> Tensor:
    """The queries `[T, H, head_dim]` of `[T, 3 * H * head_dim]`; keys and values go to their places."""
    _, _, num_heads, block_size, head_dim = places.kv_cache.shape
    query, key, value = projected.unflatten(-1, (3, num_heads, head_dim)).unbind(1)
    if rotary is not None:
        table = rotary[places.positions.long()]
        query, key = rotate(query, table), rotate(key, table)
    block, offset = places.kv_slots // block_size, places.kv_slots % block_size
    places.kv_cache[0, block, :, offset] = key
    places.kv_cache[1, block, :, offset] = value
    return query
