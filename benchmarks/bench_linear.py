"""Linear layers of gpt2-medium and its head: the time of reading the weights, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import NATIVE, assert_earned, honest, random_rows
from measure import Report, Subject, num_copies
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.packed import Norm, PackedLinear

ROWS = (1, 2, 4, 6, 8, 9, 16, 64)
# [out_features, in_features]: the two of the MLP, query-key-value, the head padded to a multiple of 128
SHAPES = {"4096x1024": (4096, 1024), "1024x4096": (1024, 4096), "3072x1024": (3072, 1024)}
HEAD, VOCAB_SIZE = "50304x1024", 50257
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
# Of the root mean square of the output: what rounding weights and activations to 8 bits may cost.
INT8_ERROR = 0.02


@dataclass(frozen=True)
class Layers:
    """Copies of one layer, as many as it takes to outgrow the caches."""

    shape: tuple[int, int]
    dtype: torch.dtype
    weight: Tensor
    norm: Norm
    packed: list[PackedLinear]
    pytorch: list[Callable[[Tensor], Tensor]]

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.dtype.itemsize

    def check(self, actual: Tensor, op: str, run: Callable[..., Tensor], x: Tensor) -> None:
        """Against the reference op, as `run` calls it: as good as it in this dtype; for int8, near the fp32 layer."""
        plain = PackedLinear(self.weight, None, self.shape[1], self.shape[0])
        exact = run(getattr(reference, op), x.double(), plain)
        if self.dtype != torch.int8:
            return assert_earned(actual, run(honest(op), x, plain), exact)
        error = (actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < INT8_ERROR, f"relative error {error:.4f}"
        return None


def build_layers(shape: tuple[int, int], dtype: torch.dtype) -> Layers:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    norm = Norm(1 + 0.1 * torch.randn(shape[1], generator=generator), torch.zeros(shape[1]), 1e-5)
    if dtype == torch.int8:
        pack, build = NATIVE.pack_linear_int8, pytorch_int8
    else:
        weight = weight.to(dtype)
        pack, build = NATIVE.pack_linear, pytorch_linear
    count = num_copies(weight.numel() * dtype.itemsize)
    return Layers(
        shape,
        dtype,
        weight,
        norm,
        [pack(weight, None) for _ in range(count)],
        [build(weight) for _ in range(count)],
    )


def pytorch_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    copy = weight.clone()
    return lambda x: F.linear(x.to(copy.dtype), copy)


def pytorch_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.ao's dynamic quantization, per output channel, without the module around it."""
    scales = weight.abs().amax(dim=1).double() / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def layers(request: pytest.FixtureRequest, dtype: str) -> Layers:
    return build_layers(SHAPES[request.param], DTYPES[dtype])


@pytest.fixture(scope="module")
def head_layers(dtype: str) -> Layers:
    return build_layers((50304, 1024), DTYPES[dtype])


@pytest.mark.parametrize("rows", ROWS)
def test_linear(benchmark: BenchmarkFixture, report: Report, layers: Layers, dtype: str, rows: int) -> None:
    x = random_rows(rows, layers.shape[1])
    residual = torch.zeros(rows, layers.shape[0])

    def native(turn: int) -> Tensor:
        return NATIVE.linear_residual(x, layers.packed[turn % len(layers.packed)], residual)

    layers.check(native(0), "linear_residual", lambda op, x, weight: op(x, weight, residual), x)
    shape = "x".join(map(str, layers.shape))
    name = "F.linear" if dtype != "int8" else "quantized.linear_dynamic"
    subject = Subject(
        "linear_residual", shape, dtype, rows, layers.num_bytes, f"{name} (without the residual)"
    )
    report.compare(benchmark, subject, native, lambda turn: layers.pytorch[turn % len(layers.pytorch)](x))


@pytest.mark.parametrize("rows", ROWS)
def test_head(
    benchmark: BenchmarkFixture, report: Report, head_layers: Layers, dtype: str, rows: int
) -> None:
    layers, norm = head_layers, head_layers.norm
    x = random_rows(rows, layers.shape[1])

    def native(turn: int) -> Tensor:
        return NATIVE.head(x, norm, layers.packed[turn % len(layers.packed)], VOCAB_SIZE)

    def pytorch(turn: int) -> Tensor:
        normed = F.layer_norm(x, (layers.shape[1],), norm.weight, norm.bias, norm.eps)
        return layers.pytorch[turn % len(layers.pytorch)](normed)

    def without_padding(op: Callable[..., Tensor], x: Tensor, weight: PackedLinear) -> Tensor:
        return op(x, norm, weight, VOCAB_SIZE)[:, :VOCAB_SIZE]

    layers.check(native(0)[:, :VOCAB_SIZE], "head", without_padding, x)
    name = "F.layer_norm, " + ("F.linear" if dtype != "int8" else "quantized.linear_dynamic")
    subject = Subject("head", HEAD, dtype, rows, layers.num_bytes, name)
    report.compare(benchmark, subject, native, pytorch)
