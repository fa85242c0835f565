"""What the kernel tests share: earned tolerances, row invariance, random layers and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specengine import _C
from specengine.kernels.packed import Norm, PackedLinear
from specengine.native import NativeBackend

NATIVE = NativeBackend()
INSTRUCTION_SETS = _C.instruction_sets()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 127, 128, 129, 8191, 8192, 8193, 50257, 50272)
NEGATIVE_INFINITY = float("-inf")
# One unit in the last place of the largest result: no rounding to fp32 does better.
FLOAT32_UNIT = 2.0**-23


def assert_earned(actual: Tensor, honest: Tensor, exact: Tensor) -> None:
    """`actual` is at most twice as wrong as the honest low-precision reference, on average and at worst."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs()
    allowed = (honest.double() - exact).abs()
    floor = FLOAT32_UNIT * float(exact.abs().max())
    mean, mean_allowed = float(error.square().mean().sqrt()), float(allowed.square().mean().sqrt())
    assert mean <= 2 * mean_allowed + floor / 2, f"mean error {mean} against {mean_allowed}"
    worst, worst_allowed = float(error.max()), float(allowed.max())
    assert worst <= 2 * worst_allowed + floor, f"worst error {worst} against {worst_allowed}"


def assert_row_invariant(op: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """op's result for a row has the same bits in every subset and order of rows, and for 1 and 2 threads."""
    num_rows = rows.shape[0]
    together = op(rows)
    generator = torch.Generator().manual_seed(num_rows)
    for row in range(0, num_rows, max(1, num_rows // 8)):
        assert torch.equal(op(rows[row : row + 1])[0], together[row]), f"row {row} alone"
    for size in {1, 2, 3, 5, 6, 7, 8, 13, num_rows}:
        if size > num_rows:
            continue
        chosen = torch.randperm(num_rows, generator=generator)[:size]
        assert torch.equal(op(rows[chosen].contiguous()), together[chosen]), f"rows {chosen.tolist()}"
    with_default = _C.num_threads()
    try:
        for count in (1, 2, 3):
            _C.set_num_threads(count)
            assert torch.equal(op(rows), together), f"{count} threads"
    finally:
        _C.set_num_threads(with_default)


@dataclass(frozen=True)
class Layer:
    """One linear with its norm: packed for the native backend and plain for the reference."""

    norm: Norm
    packed: PackedLinear
    plain: PackedLinear


def random_layer(
    in_features: int, out_features: int, dtype: torch.dtype, has_bias: bool = True, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    weight = weight.to(dtype)
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    scale = 0.5 + torch.rand(in_features, generator=generator)
    norm = Norm(scale, torch.randn(in_features, generator=generator), 1e-5)
    plain = PackedLinear(weight, bias, in_features, out_features)
    return Layer(norm, NATIVE.pack_linear(weight, bias), plain)


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


def unfiltered_stats(logits: Tensor, temperature: Tensor) -> Tensor:
    count = logits.shape[0]
    off = torch.zeros(count)
    return NATIVE.filter_rows(logits, temperature, off.int(), torch.ones(count), off)
