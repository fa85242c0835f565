"""parallel_norm_linear: norm_qkv and norm_linear of the same rows, side by side."""

from __future__ import annotations

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

WIDTH, EXPANDED, HEADS, HEAD_DIM, ROTARY_DIM = 40, 150, 3, 20, 6


def layers(dtype: torch.dtype, ops: Backend) -> tuple[Layer, Layer]:
    attention = random_layer(WIDTH, 3 * HEADS * HEAD_DIM, dtype, ops=ops)
    return attention, random_layer(WIDTH, EXPANDED, dtype, seed=5, ops=ops)


def rotary() -> Tensor:
    angles = torch.randn(50, ROTARY_DIM // 2, generator=torch.Generator().manual_seed(4))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def run(
    op, hidden: Tensor, norms: tuple[Layer, Layer], kind: str, cache: Tensor, **options
) -> tuple[Tensor, ...]:
    """All that the op writes: queries, the MLP's inner layer, keys and values."""
    count = hidden.shape[0]
    one, two = norms
    positions = torch.arange(count, dtype=torch.int32) * 2 % 50
    kv_slots = torch.arange(count) * 3 % cache.shape[1]
    places = (positions, kv_slots, cache, rotary())
    weights = (one.norm, getattr(one, kind), two.norm, getattr(two, kind), "gelu")
    query, expanded = op(hidden, *weights, *places, **options)
    return query, expanded, cache


def empty_cache(num_rows: int = 32) -> Tensor:
    return torch.full((2, num_rows, HEADS, 1, HEAD_DIM), 7.0)


def check_parallel_norm_linear(ops: Backend, dtype: torch.dtype, op=None) -> None:
    hidden, norms = random_rows(21, width_of(WIDTH, dtype)), layers(dtype, ops)
    results = run(op or ops.parallel_norm_linear, hidden, norms, "packed", empty_cache())
    one, two = norms
    cache = empty_cache()
    places = (torch.arange(21, dtype=torch.int32) * 2 % 50, torch.arange(21) * 3 % 32, cache, rotary())
    expected = (
        honest("norm_qkv", ops)(hidden, one.norm, one.plain, *places),
        honest("norm_linear", ops)(hidden, two.norm, two.plain, "gelu"),
        cache,
    )
    exact = run(reference.parallel_norm_linear, hidden.double(), norms, "plain", empty_cache().double())
    units = 2 if dtype == torch.int8 else 1
    for actual, each, truth in zip(results, expected, exact, strict=True):
        assert_earned(actual, each, truth, units)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_both_halves(every_ops: Backend, dtype: torch.dtype) -> None:
    check_parallel_norm_linear(every_ops, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(ops: Backend, dtype: torch.dtype) -> None:
    norms = layers(dtype, ops)

    def op(rows: Tensor) -> Tensor:
        count = rows.shape[0]
        cache = torch.zeros(2, count, HEADS, 1, HEAD_DIM)
        positions = (rows[:, 0].abs() * 10).int()
        one, two = norms
        weights = (one.norm, one.packed, two.norm, two.packed, "relu")
        places = (positions, torch.arange(count), cache, rotary())
        query, expanded = ops.parallel_norm_linear(rows, *weights, *places)
        return torch.cat((query.flatten(1), expanded, cache[0].flatten(1), cache[1].flatten(1)), dim=1)

    assert_row_invariant(op, random_rows(40 if ops is NATIVE else 17, WIDTH), is_thorough=ops is NATIVE)


@pytest.mark.triton
def test_padded_rows_are_left_alone() -> None:
    hidden, norms = random_rows(20, WIDTH), layers(torch.float32, TRITON)
    few = run(TRITON.parallel_norm_linear, hidden[:5], norms, "packed", empty_cache())
    limit = torch.tensor([5], dtype=torch.int32)
    many = run(TRITON.parallel_norm_linear, hidden, norms, "packed", empty_cache(), num_rows=limit)
    for ours, theirs in zip(many[:2], few[:2], strict=True):
        assert torch.equal(ours[:5], theirs)
    assert torch.equal(many[2], few[2])


def test_wrong_arguments_are_named(ops: Backend) -> None:
    norms = layers(torch.float32, ops)
    with pytest.raises(ValueError, match="hidden: expected"):
        run(ops.parallel_norm_linear, random_rows(2, WIDTH + 1), norms, "packed", empty_cache())
    with pytest.raises(ValueError, match="kv_cache: expected"):
        run(ops.parallel_norm_linear, random_rows(2, WIDTH), norms, "packed", empty_cache()[:1])


@pytest.mark.parametrize("fault", ["the attention's norm for both", "the MLP's rows shifted"])
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, mlp_norm, mlp_weight, *rest):
        if fault == "the attention's norm for both":
            return ops.parallel_norm_linear(hidden, norm, weight, norm, mlp_weight, *rest)
        query, expanded = ops.parallel_norm_linear(hidden, norm, weight, mlp_norm, mlp_weight, *rest)
        return query, expanded.roll(1, dims=0)

    with pytest.raises(AssertionError):
        check_parallel_norm_linear(ops, torch.float32, op=faulty)
