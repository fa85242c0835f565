"""What the kernel tests share: earned tolerances, row invariance, random layers and logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from specengine import _C
from specengine.kernels.reference import quantize_rows
from specengine.kernels.reference.norm_linear import linear
from specengine.kernels.types.grouped import GROUP_SIZE
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend
from specengine.ops.load import load_backend
from specengine.ops.native import NativeBackend
from specengine.ops.reference import ReferenceBackend
from specengine.weight_formats import GROUPED_FORMATS, INT8, WEIGHT_FORMATS

# Weights of a dtype, or by group, in a format's name.
WeightDtype = torch.dtype | str

# The Triton kernels run on the GPU where there is one, else in Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OnDevice:
    """A backend that is given CPU tensors: it works on copies, on a GPU where there is one, and copies everything back.

    Without a GPU the copies are made all the same, so that what they break fails here too.
    """

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend

    def __getattr__(self, op: str) -> Any:
        function = getattr(self._backend, op)
        if not callable(function):
            return function

        def run(*arguments: Any, **named: Any) -> Any:
            copies: dict[int, tuple[Tensor, Tensor]] = {}

            def there(tensor: Tensor) -> Tensor:
                if tensor.device != torch.device("cpu"):
                    return tensor
                if id(tensor) not in copies:
                    copy = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE
                    )
                    copies[id(tensor)] = tensor, copy.copy_(tensor)
                return copies[id(tensor)][1]

            result = function(*with_tensors(arguments, there), **with_tensors(named, there))
            for original, copy in copies.values():
                original.copy_(copy)
            return with_tensors(
                result, lambda tensor: tensor.clone(memory_format=torch.preserve_format).cpu()
            )

        return run


def with_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """The same value with every tensor in it converted; what holds them keeps its type."""
    if isinstance(value, Tensor):
        return convert(value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **with_tensors(changes, convert))
    if isinstance(value, dict):
        return type(value)((key, with_tensors(each, convert)) for key, each in value.items())
    if isinstance(value, tuple | list):
        converted = [with_tensors(each, convert) for each in value]
        return type(value)(*converted) if hasattr(value, "_fields") else type(value)(converted)
    return value


NATIVE = NativeBackend()
REFERENCE = ReferenceBackend()
TRITON = cast(Backend, OnDevice(load_backend("triton", DEVICE)))
INSTRUCTION_SETS = _C.instruction_sets()
TILE_SETS = [name for name in INSTRUCTION_SETS if name in ("avx512_amx", "emulated_tiles")]
# Those with products of bf16, for which rows are rounded, and those whose multiply-adds round twice.
WITH_BF16_PRODUCTS = ("avx512_bf16", *TILE_SETS)
WITHOUT_FUSED_ADDS = ("portable", "emulated_tiles")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED = tuple(format.name for format in GROUPED_FORMATS)
WEIGHT_DTYPES: tuple[WeightDtype, ...] = (*DTYPES, torch.int8, *GROUPED)
VOCABULARIES = (1, 2, 127, 128, 129, 8191, 8192, 8193, 50257, 50272)
NEGATIVE_INFINITY = float("-inf")
# One unit in the last place of the largest result: no rounding to fp32 does better.
FLOAT32_UNIT = 2.0**-23


def assert_earned(actual: Tensor, honest: Tensor, exact: Tensor, units: int = 1) -> None:
    """`actual` is at most twice as wrong as the honest low-precision reference, on average and at worst, and
    `units` roundings of the largest result are free."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs()
    allowed = (honest.double() - exact).abs()
    floor = units * FLOAT32_UNIT * float(exact.abs().max())
    mean, mean_allowed = float(error.square().mean().sqrt()), float(allowed.square().mean().sqrt())
    assert mean <= 2 * mean_allowed + floor / 2, f"mean error {mean} against {mean_allowed}"
    worst, worst_allowed = float(error.max()), float(allowed.max())
    assert worst <= 2 * worst_allowed + floor, f"worst error {worst} against {worst_allowed}"


@contextmanager
def native_threads(count: int) -> Iterator[None]:
    """`NATIVE` with so many threads."""
    before = NATIVE.num_threads
    NATIVE.set_num_threads(count)
    try:
        yield
    finally:
        NATIVE.set_num_threads(before)


def assert_row_invariant(op: Callable[[Tensor], Tensor], rows: Tensor, *, is_thorough: bool = True) -> None:
    """op's result for a row has the same bits in every subset and order of rows, and for 1 … 3 threads.

    is_thorough: every number of rows; without, those around 1, 16 and all of them (for Triton's interpreter)
    """
    num_rows = rows.shape[0]
    together = op(rows)
    generator = torch.Generator().manual_seed(num_rows)
    few = {1, 2, 3, 5, 6, 7, 8, 13, num_rows}
    for row in range(0, num_rows, max(1, num_rows // 8)):
        assert torch.equal(op(rows[row : row + 1])[0], together[row]), f"row {row} alone"
    for size in range(1, num_rows + 1) if is_thorough else (2, 15, 16, 17):
        assert torch.equal(op(rows[:size].contiguous()), together[:size]), f"the first {size} rows"
    for size in few if is_thorough else (1, 9, num_rows):
        if size > num_rows:
            continue
        chosen = torch.randperm(num_rows, generator=generator)[:size]
        assert torch.equal(op(rows[chosen].contiguous()), together[chosen]), f"rows {chosen.tolist()}"
    if not is_thorough:
        return
    for count in (1, 2, 3):
        with native_threads(count):
            assert torch.equal(op(rows), together), f"{count} threads"


def as_multiplied(x: Tensor, weight_dtype: WeightDtype, ops: Backend = NATIVE) -> Tensor:
    """Rows as a backend's linear multiplies them: with int8 weights rounded to 127ths of the largest value of each
    128; with 16-bit weights to the weights' type in Triton, and in C++ where the processor has that product; with
    weights by group to 23 bits of the largest value of each 32, in Triton not at all."""
    if isinstance(weight_dtype, str):
        if ops.name == "triton":
            return x
        groups = x.double().unflatten(1, (-1, GROUP_SIZE))
        unit = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-37) / 0x3F7F7F
        return ((groups / unit).round() * unit).flatten(1).to(x.dtype)
    if weight_dtype == torch.int8:
        chunks = x.split(128, dim=1)
        largest = [chunk.abs().amax(dim=1, keepdim=True).clamp_min(1e-37) for chunk in chunks]
        rounded = [(c / size * 127).round() * (size / 127) for c, size in zip(chunks, largest, strict=True)]
        return torch.cat(rounded, dim=1)
    if ops.name == "triton":
        return x.to(weight_dtype).to(x.dtype)
    if weight_dtype == torch.bfloat16 and _C.build_info()["instruction_set"] in WITH_BF16_PRODUCTS:
        return x.bfloat16().float()
    return x


def stored_as(weight: PackedLinear) -> WeightDtype:
    """The dtype of the reference's weights, or that they are by group."""
    is_grouped = weight.scale is not None and weight.scale.dim() == 2
    return "grouped" if is_grouped else weight.weight.dtype


def honest(op: str, ops: Backend = NATIVE) -> Callable[..., Tensor]:
    """The reference's `op` with a linear that rounds its rows as the backend's does."""
    module = importlib.import_module(f"specengine.kernels.reference.{op}")

    def run(*arguments: object) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                module, "linear", lambda x, weight: linear(as_multiplied(x, stored_as(weight), ops), weight)
            )
            result: Tensor = getattr(module, op)(*arguments)
            return result

    return run


@dataclass(frozen=True)
class Layer:
    """One linear with its norm: packed for a backend and plain for the reference."""

    norm: Norm
    packed: PackedLinear
    plain: PackedLinear


def width_of(in_features: int, dtype: WeightDtype) -> int:
    """Input features that weights of a dtype may have: whole groups."""
    return -(-in_features // GROUP_SIZE) * GROUP_SIZE if isinstance(dtype, str) else in_features


def random_layer(
    in_features: int,
    out_features: int,
    dtype: WeightDtype,
    has_bias: bool = True,
    seed: int = 0,
    ops: Backend = NATIVE,
    is_rms: bool = False,
    chosen: Tensor | None = None,
) -> Layer:
    """in_features: rounded up where weights by group want that, see `width_of`
    chosen:      only these of the layer's rows
    """
    in_features = width_of(in_features, dtype)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    if chosen is not None:
        weight, bias, out_features = weight[chosen], None if bias is None else bias[chosen], chosen.numel()
    scale = 0.5 + torch.rand(in_features, generator=generator)
    shift = torch.randn(in_features, generator=generator)
    norm = Norm(scale, None if is_rms else shift, 1e-5)
    if isinstance(dtype, str):
        format = WEIGHT_FORMATS[dtype]
        plain = REFERENCE.pack_linear(weight, bias, format)
        return Layer(norm, ops.pack_linear(weight, bias, format), plain)
    if dtype == torch.int8:
        quantized, row_scale = quantize_rows(weight)
        plain = PackedLinear(quantized, bias, in_features, out_features, row_scale)
        return Layer(norm, ops.pack_linear(weight, bias, INT8), plain)
    weight = weight.to(dtype)
    plain = PackedLinear(weight, bias, in_features, out_features)
    return Layer(norm, ops.pack_linear(weight, bias), plain)


def random_tokens(num_tokens: int, vocab_size: int) -> Tensor:
    """`[num_tokens]` int32, ascending: some of a vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return torch.randperm(vocab_size, generator=generator)[:num_tokens].sort().values.int()


def random_rows(num_rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) + 0.25


def random_logits(num_rows: int, vocab_size: int, seed: int = 2, spread: float = 3.0) -> Tensor:
    """Logits where GPT-2's lie: far below zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * spread - 60.0


def random_seeds(count: int, seed: int = 3) -> Tensor:
    """int64 bits of 64-bit seeds, high bits set in half of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def unfiltered_stats(logits: Tensor, temperature: Tensor, ops: Backend = NATIVE) -> Tensor:
    return ops.filter_rows(logits, SamplingRows.empty(logits.shape[0])._replace(temperature=temperature))


def rounded_to_normal(x: np.ndarray) -> np.ndarray:
    """To fp32, and what is below its normal numbers to zero."""
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    return np.where(np.abs(rounded) < 2.0**-126, rounded * np.float32(0), rounded)


def bfloat16_numbers(x: Tensor) -> np.ndarray:
    """Rounded to bf16, as doubles; what is below the normal numbers is zero."""
    return rounded_to_normal(x.bfloat16().double().numpy()).astype(np.float64)


def tile_product(x: Tensor, weight: Tensor, fault: str | None = None) -> Tensor:
    """`[R, N]`: x W^T as the processor's bf16 tiles multiply. Of 32 k the sixteen pairs' first and second halves are
    summed apart, each sum a chain of fused multiply-adds (the product of two bf16 has 16 bits, so that a double holds
    what is rounded); their sum is added to the sums before. No denormal number goes in or comes out."""
    num_rows, width = x.shape
    padding = (0, -width % 32)
    rows = bfloat16_numbers(torch.nn.functional.pad(x, padding))
    columns = bfloat16_numbers(torch.nn.functional.pad(weight.float(), padding))
    if fault == "tail":
        rows, columns = rows[:, : width // 32 * 32], columns[:, : width // 32 * 32]
    total = np.zeros((num_rows, len(weight)), dtype=np.float32)
    for begin in range(0, rows.shape[1], 32):
        chains = [np.zeros_like(total), np.zeros_like(total)]
        order = range(begin, begin + 32)
        for k in reversed(order) if fault == "order" else order:
            parity = 0 if fault == "one chain" else k % 2
            exact = rows[:, k, None] * columns[None, :, k] + chains[parity].astype(np.float64)
            chains[parity] = exact.astype(np.float32) if fault == "denormal" else rounded_to_normal(exact)
        total = rounded_to_normal(total + rounded_to_normal(chains[0] + chains[1]))
    return torch.from_numpy(total)
