"""parallel_linear_residual: two linears, their biases and the residual in one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    NATIVE,
    TRITON,
    WEIGHT_DTYPES,
    Layer,
    assert_earned,
    assert_row_invariant,
    honest,
    random_layer,
    random_rows,
    width_of,
)
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend

# Rows, attention width, MLP width, columns.
SHAPES = [(1, 1, 1, 1), (5, 33, 70, 50), (21, 128, 512, 130), (3, 300, 1200, 300)]


def layers(shape: tuple[int, int, int, int], dtype: torch.dtype, ops: Backend) -> tuple[Layer, Layer]:
    _, width, mlp_width, columns = shape
    one = random_layer(width, columns, dtype, ops=ops)
    return one, random_layer(mlp_width, columns, dtype, seed=5, ops=ops)


def check_parallel_linear_residual(
    ops: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype, op=None
) -> None:
    num_rows, columns = shape[0], shape[3]
    width, mlp_width = width_of(shape[1], dtype), width_of(shape[2], dtype)
    one, two = layers(shape, dtype, ops)
    attended, expanded = random_rows(num_rows, width), random_rows(num_rows, mlp_width, seed=2)
    residual = random_rows(num_rows, columns, seed=3)
    actual = (op or ops.parallel_linear_residual)(attended, one.packed, expanded, two.packed, residual)
    linear = honest("linear_residual", ops)
    expected = linear(expanded, two.plain, linear(attended, one.plain, residual))
    exact = reference.parallel_linear_residual(
        attended.double(), one.plain, expanded.double(), two.plain, residual.double()
    )
    assert_earned(actual, expected, exact, units=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_error_is_at_most_twice_the_honest_reference(
    every_ops: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check_parallel_linear_residual(every_ops, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(ops: Backend, dtype: torch.dtype) -> None:
    one, two = layers((0, 64, 300, 60), dtype, ops)

    def op(rows: Tensor) -> Tensor:
        attended, residual = rows[:, :64].contiguous(), rows[:, :60].contiguous()
        return ops.parallel_linear_residual(attended, one.packed, rows, two.packed, residual)

    assert_row_invariant(op, random_rows(40 if ops is NATIVE else 17, 300), is_thorough=ops is NATIVE)


@pytest.mark.triton
def test_padded_rows_are_left_alone_and_counters_return_to_zero() -> None:
    one, two = layers((0, 64, 300, 60), torch.float32, TRITON)
    attended, expanded, residual = random_rows(20, 64), random_rows(20, 300), random_rows(20, 60)
    out, limit = torch.full((20, 60), 7.0), torch.tensor([5], dtype=torch.int32)
    for _ in range(2):
        TRITON.parallel_linear_residual(
            attended, one.packed, expanded, two.packed, residual, out=out, num_rows=limit
        )
        few = TRITON.parallel_linear_residual(
            attended[:5], one.packed, expanded[:5], two.packed, residual[:5]
        )
        assert torch.equal(out[:5], few)
        assert (out[5:] == 7.0).all()


def test_wrong_arguments_are_named(ops: Backend) -> None:
    one, two = layers((0, 64, 300, 60), torch.float32, ops)
    rows = random_rows(2, 300)
    with pytest.raises(ValueError, match="residual: expected"):
        ops.parallel_linear_residual(random_rows(2, 64), one.packed, rows, two.packed, random_rows(3, 60))


@pytest.mark.parametrize("fault", ["no second bias", "one sum for both"])
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(attended, weight, expanded, mlp_weight, residual):
        if fault == "no second bias":
            mlp_weight = replace(mlp_weight, bias=None)
        else:
            expanded = torch.cat((expanded[:, :35], 0 * expanded[:, 35:]), dim=1)
        return ops.parallel_linear_residual(attended, weight, expanded, mlp_weight, residual)

    with pytest.raises(AssertionError):
        check_parallel_linear_residual(ops, (5, 33, 70, 50), torch.float32, op=faulty)
