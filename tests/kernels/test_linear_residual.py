"""linear_residual: linear, bias and the residual stream."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    GROUPED,
    NATIVE,
    TRITON,
    WEIGHT_DTYPES,
    assert_earned,
    assert_row_invariant,
    honest,
    random_layer,
    random_rows,
    width_of,
)

from specengine.kernels import linear_residual as kernel
from specengine.kernels import reference
from specengine.kernels.device import rounded
from specengine.kernels.device.launch import record
from specengine.kernels.device.tiles import Tile
from specengine.ops.backend import Backend

SHAPES = [(1, 1, 1), (5, 33, 50), (6, 3072, 96), (2, 128, 1024), (65, 100, 70)]


def check_linear_residual(
    ops: Backend, shape: tuple[int, int, int], dtype: torch.dtype, has_bias: bool, op=None
) -> None:
    num_rows, width, num_columns = shape[0], width_of(shape[1], dtype), shape[2]
    if width != shape[1]:
        num_columns = max(num_columns, 64)  # a few sums may be right by luck
    layer = random_layer(width, num_columns, dtype, has_bias, ops=ops)
    x, residual = random_rows(num_rows, width), random_rows(num_rows, num_columns, seed=9)
    copies = x.clone(), residual.clone()
    exact = reference.linear_residual(x.double(), layer.plain, residual.double())
    expected = honest("linear_residual", ops)(x, layer.plain, residual)
    units = 2 if dtype == torch.int8 else 1  # two scales, of the row and of the column
    assert_earned((op or ops.linear_residual)(x, layer.packed, residual), expected, exact, units)
    assert torch.equal(x, copies[0])
    assert torch.equal(residual, copies[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_error_is_at_most_twice_the_honest_reference(
    every_ops: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for has_bias in (True, False):
        check_linear_residual(every_ops, shape, dtype, has_bias)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(every_ops: Backend, dtype: torch.dtype) -> None:
    layer = random_layer(301, 130, dtype, ops=every_ops)

    def op(rows: torch.Tensor) -> torch.Tensor:
        return every_ops.linear_residual(rows, layer.packed, rows[:, :130].contiguous())

    assert_row_invariant(
        op,
        random_rows(64 if every_ops is NATIVE else 20, width_of(301, dtype)),
        is_thorough=every_ops is NATIVE,
    )


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_groups_of_a_prompts_rows_are_as_alone(dtype: torch.dtype, num_threads: int) -> None:
    """403 rows of 1100 numbers are two groups (int8) or three, of unequal sizes; five panels are unequal parts."""
    layer = random_layer(1100, 290, dtype, ops=NATIVE)
    x, residual = random_rows(403, width_of(1100, dtype)), random_rows(403, 290, seed=9)
    before = NATIVE.num_threads
    NATIVE.set_num_threads(num_threads)
    together = NATIVE.linear_residual(x, layer.packed, residual)
    NATIVE.set_num_threads(before)
    pairs = zip(x.split(50), residual.split(50), strict=True)
    apart = [NATIVE.linear_residual(rows, layer.packed, others) for rows, others in pairs]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.triton
@pytest.mark.parametrize("block_n", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *GROUPED])
def test_a_prompt_goes_through_larger_tiles_of_rows_with_the_same_bits(
    dtype: torch.dtype, block_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixteen columns, or of weights by group, warps share out every block of K."""
    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(block_n, 128, split_k=2))
    width = width_of(300, dtype)
    layer = random_layer(width, 24, dtype, ops=TRITON)
    x, residual = random_rows(512, width), random_rows(512, 24)
    sizes = {64: 16, 65: 64, 511: 64, 512: 128 if dtype in (torch.float16, torch.bfloat16) else 64}
    with record() as launches:
        for count in sizes:
            TRITON.linear_residual(x[:count], layer.packed, residual[:count])
    assert [launch.arguments["BLOCK_M"] for launch in launches] == list(sizes.values())
    found = [TRITON.linear_residual(x[:count], layer.packed, residual[:count]) for count in sizes]
    for count, out in zip(sizes, found, strict=True):
        assert torch.equal(out, found[-1][:count])
    x, residual, together = x[:90], residual[:90], found[-1][:90]
    pairs = zip(x.split(11), residual.split(11), strict=True)
    apart = [TRITON.linear_residual(rows, layer.packed, others) for rows, others in pairs]
    assert torch.equal(together, torch.cat(apart))
    limit, out = torch.tensor([70], dtype=torch.int32), torch.full((90, 24), 7.0)
    TRITON.linear_residual(x, layer.packed, residual, out=out, num_rows=limit)
    assert torch.equal(out[:70], together[:70])
    assert (out[70:] == 7.0).all()


@pytest.mark.triton
@pytest.mark.parametrize("width", [130, 1100])
def test_int8_in_blocks_of_four_chunks(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs use: a chunk, with a scale of its own, is a warp's (`multiply_parts`)."""
    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(16, 512, split_k=2 if width > 512 else 1))
    check_linear_residual(TRITON, (7, width, 40), torch.int8, has_bias=True)
    layer = random_layer(width, 24, torch.int8, ops=TRITON)
    assert_row_invariant(
        lambda rows: TRITON.linear_residual(rows, layer.packed, rows[:, :24].contiguous()),
        random_rows(18, width),
        is_thorough=False,
    )
    rows = random_rows(3, width)
    rows[0, 5], rows[2, -1] = float("nan"), float("inf")
    out = TRITON.linear_residual(rows, layer.packed, torch.zeros(3, 24))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert out[2].isnan().all()


def test_wrong_arguments_are_named(ops: Backend) -> None:
    layer = random_layer(32, 48, torch.float32, ops=ops)
    with pytest.raises(ValueError, match="residual: expected"):
        ops.linear_residual(random_rows(2, 32), layer.packed, random_rows(3, 48))
    with pytest.raises(ValueError, match="x: expected"):
        ops.linear_residual(random_rows(2, 33), layer.packed, random_rows(2, 48))


def test_a_dropped_residual_or_a_shifted_row_is_noticed(ops: Backend) -> None:
    def dropped(x, weight, residual):
        return ops.linear_residual(x, weight, torch.zeros_like(residual))

    def shifted(x, weight, residual):
        return ops.linear_residual(x, weight, residual.roll(1, dims=0).contiguous())

    for fault in (dropped, shifted):
        with pytest.raises(AssertionError):
            check_linear_residual(ops, (5, 33, 50), torch.float32, has_bias=True, op=fault)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("width", "block_k", "split_k"),
    [
        (40, 512, 1),
        (640, 512, 2),
        (1540, 512, 2),
        (1540, 512, 4),
        (100, 128, 2),
        (300, 128, 2),
        (600, 128, 4),
    ],
)
def test_int8_rows_of_a_prompt_are_rounded_once_with_the_same_bits(
    width: int, block_k: int, split_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many ranges as blocks, of more (some are empty) and of fewer, which have more than a block each."""
    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(16, block_k, split_k=split_k))
    layer = random_layer(width, 40, torch.int8, ops=TRITON)
    x, residual = random_rows(90, width), random_rows(90, 40, seed=9)
    x[3, 5], x[70, -1], x[8] = float("nan"), float("inf"), 0.0
    x[20:25] *= torch.logspace(-30, 30, 5)[:, None]
    with record() as launches:
        TRITON.linear_residual(x, layer.packed, residual)
    assert [launch.name for launch in launches] == ["spec_round_rows", "spec_linear_residual"]
    assert launches[1].grid == (2, 2, 1)
    together = TRITON.linear_residual(x, layer.packed, residual)
    pairs = zip(x.split(11), residual.split(11), strict=True)
    apart = torch.cat([TRITON.linear_residual(rows, layer.packed, others) for rows, others in pairs])
    assert torch.equal(together.view(torch.int32), apart.view(torch.int32))
    limit, out = torch.tensor([70], dtype=torch.int32), torch.full((90, 40), 7.0)
    TRITON.linear_residual(x, layer.packed, residual, out=out, num_rows=limit)
    assert torch.equal(out[:70].view(torch.int32), together[:70].view(torch.int32))
    assert (out[70:] == 7.0).all()


@pytest.mark.triton
@pytest.mark.parametrize("fault", ["order", "last row", "last unit"])
def test_a_fault_in_rows_that_are_rounded_first_is_noticed(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def faulty(x, weight, num_rows):
        rows, units = rounded.round_rows(x, weight, num_rows)
        if fault == "order":  # of two chunks, in rows, units and weights
            places = torch.arange(512).view(4, 128)[[1, 0, 2, 3]]
            weight.weight.copy_(weight.weight[:, places.flatten()])
            rows, units = (
                rows[:, places.flatten()].contiguous(),
                units.view(-1, 4)[:, [1, 0, 2, 3]].contiguous(),
            )
        elif fault == "last row":
            rows[-1] = rows[-2]
        else:
            units[-1] *= 1.001
        return rows, units

    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(16, 512))
    layer = random_layer(512, 40, torch.int8, ops=TRITON)
    x, residual = random_rows(70, 512), random_rows(70, 40)
    pairs = zip(x.split(35), residual.split(35), strict=True)
    apart = torch.cat([TRITON.linear_residual(rows, layer.packed, others) for rows, others in pairs])
    assert torch.equal(TRITON.linear_residual(x, layer.packed, residual), apart)
    monkeypatch.setattr(kernel, "round_rows", faulty)
    assert not torch.equal(TRITON.linear_residual(x, layer.packed, residual), apart)
