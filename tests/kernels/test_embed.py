"""embed: table rows plus positions, exactly, and nothing outside the tables."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, NATIVE, TRITON
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend


def check_embed(op, dtype: torch.dtype, num_rows: int, width: int, has_positions: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randn(50, width, generator=generator).to(dtype)
    places = torch.randn(20, width, generator=generator).to(dtype) if has_positions else None
    ids = torch.randint(0, 50, (num_rows,), generator=generator, dtype=torch.int32)
    positions = torch.randint(0, 20, (num_rows,), generator=generator, dtype=torch.int32)
    expected = reference.embed(ids, positions, tokens, places)
    assert torch.equal(op(ids, positions, tokens, places), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_positions", [True, False])
def test_equals_the_reference_bit_for_bit(ops: Backend, dtype: torch.dtype, has_positions: bool) -> None:
    for num_rows, width in [(1, 1), (1, 64), (7, 33), (300, 768)]:
        check_embed(ops.embed, dtype, num_rows, width, has_positions)


def test_special_half_values_survive(ops: Backend) -> None:
    table = torch.tensor([[0.0, -0.0, 1e-7, -6e-8, 65504.0, float("inf"), float("-inf")]]).half()
    ids = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(ops.embed(ids, ids, table, None), table.float())


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_ids_outside_a_table_are_refused_on_a_cpu(bad: int) -> None:
    table = torch.zeros(50, 8)
    good, wrong = torch.tensor([3], dtype=torch.int32), torch.tensor([bad], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"token_ids: {bad}"):
        NATIVE.embed(wrong, good, table, table)
    with pytest.raises(ValueError, match=f"positions: {bad}"):
        NATIVE.embed(good, wrong, table, table)


@pytest.mark.triton
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_ids_outside_a_table_read_a_row_of_it_on_a_gpu(bad: int) -> None:
    table = torch.randn(50, 8)
    good, wrong = torch.zeros(1, dtype=torch.int32), torch.tensor([bad], dtype=torch.int32)
    nearest = table[max(0, min(bad, 49))]
    assert torch.equal(TRITON.embed(wrong, good, table, None)[0], nearest)
    assert torch.equal(TRITON.embed(good, wrong, table, table)[0], table[0] + nearest)


@pytest.mark.triton
def test_padded_rows_are_left_alone() -> None:
    table, ids = torch.randn(50, 8), torch.arange(6, dtype=torch.int32)
    poisoned = torch.cat((ids[:4], ids[4:] + 2**30))
    out = TRITON.embed(poisoned, ids, table, None, num_rows=torch.tensor([4], dtype=torch.int32))
    assert torch.equal(out[:4], table[:4])


def test_wrong_arguments_are_named(ops: Backend) -> None:
    table, ids = torch.zeros(50, 8), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="token_ids: expected"):
        ops.embed(ids.long(), ids, table, table)
    with pytest.raises(ValueError, match="position_table: expected"):
        ops.embed(ids, ids, table, torch.zeros(20, 9))


def test_a_position_off_by_one_is_noticed(ops: Backend) -> None:
    def off_by_one(ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        return ops.embed(ids, (positions - 1).clamp_min(0), tokens, places)

    with pytest.raises(AssertionError):
        check_embed(off_by_one, torch.float32, 7, 33, has_positions=True)
