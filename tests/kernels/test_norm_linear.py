"""norm_linear: norm, linear, bias, activation; the shape of every linear op of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import (
    DTYPES,
    INSTRUCTION_SETS,
    NATIVE,
    TRITON,
    WEIGHT_DTYPES,
    WITHOUT_FUSED_ADDS,
    Layer,
    WeightDtype,
    as_multiplied,
    assert_earned,
    assert_row_invariant,
    honest,
    random_layer,
    random_rows,
    tile_product,
    width_of,
)
from torch import Tensor

from specengine import _C
from specengine.kernels import norm_linear as kernel
from specengine.kernels import reference
from specengine.kernels.device import normed
from specengine.kernels.device.launch import record
from specengine.kernels.device.tiles import HELD_COLUMNS, Tile
from specengine.kernels.reference.norm_linear import apply_activation
from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import PackedLinear
from specengine.ops.backend import Backend
from specengine.weight_formats import GROUPED_FORMATS, INT8, WeightFormat

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "swiglu")
# Rows, in features, out features: ragged panels, odd K, several K chunks, several row blocks.
SHAPES = [(1, 1, 1), (3, 33, 50), (7, 129, 200), (6, 768, 256), (100, 300, 130), (2, 4096, 64)]


def check_norm_linear(
    ops: Backend,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    op=None,
    *,
    is_rms: bool = False,
) -> None:
    num_rows, width, num_columns = shape[0], width_of(shape[1], dtype), shape[2]
    if width != shape[1]:
        num_columns = max(num_columns, 64)  # a few sums may be right by luck
    num_columns += num_columns % 2 if activation == "swiglu" else 0
    layer = random_layer(width, num_columns, dtype, ops=ops, is_rms=is_rms)
    hidden = random_rows(num_rows, width)
    before = hidden.clone()
    exact = reference.norm_linear(hidden.double(), layer.norm, layer.plain, activation)
    expected = honest("norm_linear", ops)(hidden, layer.norm, layer.plain, activation)
    units = 2 if dtype == torch.int8 else 1  # two scales, of the row and of the column
    actual = (op or ops.norm_linear)(hidden, layer.norm, layer.packed, activation)
    assert_earned(actual, expected, exact, units)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_error_is_at_most_twice_the_honest_reference(
    every_ops: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for activation in ACTIVATIONS:
        check_norm_linear(every_ops, shape, dtype, activation, is_rms=activation in ("relu", "swiglu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_accurate_over_its_whole_range(every_ops: Backend, activation: str) -> None:
    """A zero weight leaves the bias: every float of interest goes through the activation alone."""
    points = torch.cat(
        [torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0])]
    )
    bias = torch.stack((points, torch.ones_like(points)), 1).flatten() if activation == "swiglu" else points
    layer = random_layer(4, bias.numel(), torch.float32, ops=every_ops)
    packed = PackedLinear(torch.zeros_like(layer.packed.weight), bias, 4, bias.numel())
    actual = every_ops.norm_linear(torch.ones(1, 4), layer.norm, packed, activation)[0]
    exact = apply_activation(bias.double(), activation)
    assert_earned(actual, apply_activation(bias, activation), exact)
    error = (actual.double() - exact).abs()
    # Within a few units in the last place of the input or, where the value is smaller, absolutely.
    assert float((error / (points.abs().double() + 1e-30)).max()) < 4 * 2.0**-23


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(every_ops: Backend, dtype: torch.dtype) -> None:
    is_native = every_ops is NATIVE
    for width, num_columns in [(96, 200), (1024, 512 if is_native else 128)]:
        for activation in ("gelu_tanh", "swiglu"):
            layer = random_layer(width, num_columns, dtype, ops=every_ops, is_rms=activation == "swiglu")
            assert_row_invariant(
                lambda rows, layer=layer, activation=activation: every_ops.norm_linear(
                    rows, layer.norm, layer.packed, activation
                ),
                random_rows(64 if is_native else 18, width),
                is_thorough=is_native,
            )


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_more_rows_than_one_pass_holds(ops: Backend, dtype: torch.dtype) -> None:
    layer = random_layer(160, 70, dtype, ops=ops)
    hidden = random_rows(521 if ops is NATIVE else 50, 160)
    together = ops.norm_linear(hidden, layer.norm, layer.packed, "relu")
    apart = [ops.norm_linear(rows, layer.norm, layer.packed, "relu") for rows in hidden.split(7)]
    assert torch.equal(together, torch.cat(apart))
    assert ops.norm_linear(hidden[:0], layer.norm, layer.packed, "relu").shape == (0, 70)


def test_fused_instruction_sets_agree_on_every_bit() -> None:
    if not {"avx512", "avx2"} <= set(_C.instruction_sets()):
        pytest.skip("needs AVX-512 and AVX2")
    hidden = random_rows(9, 320)
    results = []
    for name in ("avx512", "avx2"):
        _C.set_instruction_set(name)
        layers = [random_layer(320, 130, dtype, is_rms=dtype == torch.float16) for dtype in WEIGHT_DTYPES]
        results.append([NATIVE.norm_linear(hidden, x.norm, x.packed, a) for x in layers for a in ACTIVATIONS])
    _C.set_instruction_set("auto")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_large_offsets_do_not_cancel_in_the_norm(ops: Backend) -> None:
    layer = random_layer(256, 64, torch.float32, ops=ops)
    hidden = random_rows(4, 256) + 1000.0
    exact = reference.norm_linear(hidden.double(), layer.norm, layer.plain, "none")
    expected = reference.norm_linear(hidden, layer.norm, layer.plain, "none")
    assert_earned(ops.norm_linear(hidden, layer.norm, layer.packed, "none"), expected, exact)


def test_wrong_arguments_are_named(ops: Backend) -> None:
    layer = random_layer(32, 48, torch.float32, ops=ops)
    hidden = random_rows(2, 32)
    with pytest.raises(ValueError, match="activation: 'swish'"):
        ops.norm_linear(hidden, layer.norm, layer.packed, "swish")
    odd = random_layer(32, 47, torch.float32, ops=ops)
    with pytest.raises(ValueError, match="weight: 47 output features are no pairs"):
        ops.norm_linear(hidden, odd.norm, odd.packed, "swiglu")
    with pytest.raises(ValueError, match="hidden: expected"):
        ops.norm_linear(hidden[:, :31].contiguous(), layer.norm, layer.packed, "none")
    with pytest.raises(ValueError, match=r"hidden: expected .*contiguous"):
        ops.norm_linear(random_rows(2, 64)[:, ::2], layer.norm, layer.packed, "none")
    with pytest.raises(ValueError, match="hidden: expected"):
        ops.norm_linear(hidden.double(), layer.norm, layer.packed, "none")
    with pytest.raises(ValueError, match=r"weight: .* is not a packed 48 x 32"):
        ops.norm_linear(hidden, layer.norm, PackedLinear(torch.zeros(7), None, 32, 48), "none")
    with pytest.raises(ValueError, match="weight: expected"):
        ops.pack_linear(torch.zeros(3, 3, dtype=torch.int32), None)
    with pytest.raises(ValueError, match="weight: expected"):
        ops.pack_linear(torch.zeros(3, 3, dtype=torch.int8), None, INT8)
    rounded = random_layer(32, 48, torch.int8, ops=ops).packed
    with pytest.raises(
        ValueError, match=r"scale: int8 weights have one, others none; weight is .*(Char|int8)"
    ):
        ops.norm_linear(hidden, layer.norm, replace(rounded, scale=None), "none")
    with pytest.raises(
        ValueError, match=r"scale: int8 weights have one, others none; weight is .*(Float|float32)"
    ):
        ops.norm_linear(hidden, layer.norm, replace(layer.packed, scale=rounded.scale), "none")
    with pytest.raises(ValueError, match="scale: expected"):
        ops.norm_linear(hidden, layer.norm, replace(rounded, scale=torch.ones(47)), "none")


@pytest.mark.triton
def test_padded_rows_are_left_alone() -> None:
    layer = random_layer(64, 150, torch.float32, ops=TRITON)
    hidden, limit = random_rows(40, 64), torch.tensor([5], dtype=torch.int32)
    hidden[5:] = float("nan")
    out = torch.full((40, 150), 7.0)
    TRITON.norm_linear(hidden, layer.norm, layer.packed, "relu", out=out, num_rows=limit)
    assert torch.equal(out[:5], TRITON.norm_linear(hidden[:5], layer.norm, layer.packed, "relu"))
    assert (out[5:] == 7.0).all()


@pytest.mark.parametrize("fault", ["mean", "eps", "pair"])
def test_a_fault_in_rms_norm_or_swiglu_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, activation):
        if fault == "mean":
            hidden = hidden - hidden.mean(dim=1, keepdim=True)
        if fault == "eps":
            norm = replace(norm, eps=1e-2)
        out = ops.norm_linear(hidden, norm, weight, activation)
        return out.roll(1, dims=1) if fault == "pair" else out

    with pytest.raises(AssertionError):
        check_norm_linear(ops, (7, 129, 200), torch.float32, "swiglu", op=faulty, is_rms=True)


@pytest.mark.parametrize("fault", ["bias", "norm_bias", "activation", "last_column_of_k"])
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, activation):
        if fault == "bias":
            weight = PackedLinear(weight.weight, None, weight.in_features, weight.out_features)
        if fault == "norm_bias":
            norm = type(norm)(norm.weight, torch.zeros_like(norm.bias), norm.eps)
        if fault == "activation":
            activation = "gelu"
        if fault == "last_column_of_k":
            scale, shift = norm.weight.clone(), norm.bias.clone()
            scale[-1] = shift[-1] = 0.0
            norm = type(norm)(scale, shift, norm.eps)
        return ops.norm_linear(hidden, norm, weight, activation)

    with pytest.raises(AssertionError):
        check_norm_linear(ops, (7, 129, 200), torch.float32, "gelu_tanh", op=faulty)


# -- held weights --------------------------------------------------------------------------------------------------

HELD_WEIGHTS = [dtype for dtype in WEIGHT_DTYPES if dtype != torch.float32]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Triton, with tiles whose weights a program holds: what GPUs use for rows of up to 1,024 elements."""
    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(HELD_COLUMNS, 128))
    return TRITON


@pytest.mark.triton
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 33, 50), (18, 129, 40), (7, 768, 48), (4, 1024, 32), (2, 1600, 16)]
)
@pytest.mark.parametrize("dtype", HELD_WEIGHTS)
def test_held_weights_are_multiplied_as_honestly(
    held: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for activation in ("none", "gelu_tanh", "swiglu"):
        check_norm_linear(held, shape, dtype, activation, is_rms=activation == "swiglu")


@pytest.mark.triton
@pytest.mark.parametrize("dtype", HELD_WEIGHTS)
def test_a_row_keeps_its_bits_in_whatever_group_of_rows_it_meets_held_weights(
    held: Backend, dtype: torch.dtype
) -> None:
    for width, is_rms in [(96, False), (1024, True)]:
        layer = random_layer(width, 40, dtype, ops=held, is_rms=is_rms)
        assert_row_invariant(
            lambda rows, layer=layer: held.norm_linear(rows, layer.norm, layer.packed, "gelu_tanh"),
            random_rows(18, width),
            is_thorough=False,
        )


@pytest.mark.triton
@pytest.mark.parametrize("dtype", HELD_WEIGHTS)
def test_a_prompt_goes_through_larger_tiles_of_rows_with_the_same_bits(
    held: Backend, dtype: torch.dtype
) -> None:
    width = width_of(72, dtype)
    layer, hidden = random_layer(width, 24, dtype, ops=held), random_rows(90, width)
    with record() as launches:
        held.norm_linear(hidden, layer.norm, layer.packed, "relu")
        held.norm_linear(hidden[:64], layer.norm, layer.packed, "relu")
    assert [launch.arguments.get("BLOCK_M") for launch in launches] in ([None, 64, 16], [64, 16])
    together = held.norm_linear(hidden, layer.norm, layer.packed, "relu")
    apart = [held.norm_linear(rows, layer.norm, layer.packed, "relu") for rows in hidden.split(11)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.triton
@pytest.mark.parametrize("width", [16, 128, 200, 400, 512, 576, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("is_rms", [False, True])
def test_rows_that_are_normed_first_have_the_bits_of_those_that_meet_held_weights(
    held: Backend, width: int, dtype: torch.dtype, is_rms: bool
) -> None:
    """However many parts K has: one to eight."""
    layer, hidden = random_layer(width, 40, dtype, ops=held, is_rms=is_rms), random_rows(70, width)
    hidden[3] = 0.0
    check_normed_first(held, layer, hidden)


@pytest.mark.triton
@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("is_rms", [False, True])
def test_rows_that_are_normed_first_have_the_bits_of_those_that_a_loop_norms(
    monkeypatch: pytest.MonkeyPatch, block_n: int, dtype: torch.dtype, is_rms: bool
) -> None:
    monkeypatch.setattr(kernel, "choose_tile", lambda *layer: Tile(block_n, 128))
    layer = random_layer(1100, 40, dtype, ops=TRITON, is_rms=is_rms)
    with record() as launches:
        TRITON.norm_linear(random_rows(70, 1100), layer.norm, layer.packed, "gelu_tanh")
    assert [launch.arguments["HELD"] for launch in launches] == [0, 0]
    check_normed_first(TRITON, layer, random_rows(70, 1100))


def check_normed_first(ops: Backend, layer: Layer, hidden: torch.Tensor) -> None:
    together = ops.norm_linear(hidden, layer.norm, layer.packed, "gelu_tanh")
    apart = [ops.norm_linear(rows, layer.norm, layer.packed, "gelu_tanh") for rows in hidden.split(35)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.triton
@pytest.mark.parametrize("fault", ["order", "last row", "last part"])
def test_a_fault_in_rows_that_are_normed_first_is_noticed(
    held: Backend, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def faulty(hidden, norm, weight, tile, num_rows):
        given = normed.norm_first(hidden, norm, weight, tile, num_rows)
        if given.rows is hidden:
            return given
        rows = given.rows
        if fault == "order":  # of the parts, in rows and weights
            places = torch.arange(1024).view(8, 128)[[1, 0, 2, 3, 4, 5, 6, 7]].flatten()
            weight.weight.copy_(weight.weight[:, places])
            rows = rows[:, places].contiguous()
        elif fault == "last row":
            rows[-1] = rows[-2]
        else:
            rows[:, -128:] = 0
        return given._replace(rows=rows)

    layer, hidden = random_layer(1024, 40, torch.float16, ops=held), random_rows(70, 1024)
    apart = [held.norm_linear(rows, layer.norm, layer.packed, "none") for rows in hidden.split(35)]
    assert torch.equal(held.norm_linear(hidden, layer.norm, layer.packed, "none"), torch.cat(apart))
    monkeypatch.setattr(kernel, "norm_first", faulty)
    assert not torch.equal(held.norm_linear(hidden, layer.norm, layer.packed, "none"), torch.cat(apart))


@pytest.mark.triton
def test_the_longest_prompts_go_through_tiles_of_128_rows_with_the_same_bits(held: Backend) -> None:
    layer, hidden = random_layer(64, 8, torch.float16, ops=held), random_rows(520, 64)
    with record() as launches:
        held.norm_linear(hidden, layer.norm, layer.packed, "relu")
    assert launches[-1].arguments["BLOCK_M"] == 128
    together = held.norm_linear(hidden, layer.norm, layer.packed, "relu")
    few = held.norm_linear(hidden[500:], layer.norm, layer.packed, "relu")
    assert torch.equal(together[500:], few)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("count", "most"), [(0, 40), (1, 40), (4, 40), (5, 40), (17, 40), (40, 40), (0, 90), (3, 90), (71, 90)]
)
def test_rows_of_padding_are_left_alone_by_held_weights(held: Backend, count: int, most: int) -> None:
    layer = random_layer(64, 50, torch.float16, ops=held)
    hidden, limit = random_rows(most, 64), torch.tensor([count], dtype=torch.int32)
    hidden[count:] = float("nan")
    out = torch.full((most, 50), 7.0)
    held.norm_linear(hidden, layer.norm, layer.packed, "relu", out=out, num_rows=limit)
    assert torch.equal(out[:count], held.norm_linear(hidden[:count], layer.norm, layer.packed, "relu"))
    assert (out[count:] == 7.0).all()


@pytest.mark.triton
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("dtype", HELD_WEIGHTS)
def test_rows_that_are_no_numbers_spoil_no_others_of_their_group(
    held: Backend, dtype: torch.dtype, is_rms: bool
) -> None:
    width = width_of(260, dtype)
    for count in (6, 66):
        layer, rows = random_layer(width, 40, dtype, ops=held, is_rms=is_rms), random_rows(count, width)
        rows[0, 5], rows[2, -1], rows[3] = float("nan"), float("inf"), 0.0
        out = held.norm_linear(rows, layer.norm, layer.packed, "none")
        assert out[[0, 2]].isnan().all()
        others = [1, *range(3, count)]
        assert torch.equal(out[others], held.norm_linear(rows[others], layer.norm, layer.packed, "none"))
        assert out[others].isfinite().all()


@pytest.mark.triton
@pytest.mark.parametrize("fault", ["first_column_of_k", "last_column_of_k", "other_row"])
def test_a_fault_with_held_weights_is_noticed(held: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, activation):
        if fault == "other_row":
            hidden = hidden[[0, 1, 2, 3, 0, 5, 6]]
        else:
            at = 0 if fault == "first_column_of_k" else -1
            scale, shift = norm.weight.clone(), norm.bias.clone()
            scale[at] = shift[at] = 0.0
            norm = type(norm)(scale, shift, norm.eps)
        return held.norm_linear(hidden, norm, weight, activation)

    with pytest.raises(AssertionError):
        check_norm_linear(held, (7, 129, 200), torch.float16, "gelu_tanh", op=faulty)


# -- int8 ----------------------------------------------------------------------------------------------------------


def unpack(panels: torch.Tensor, num_columns: int, width: int) -> torch.Tensor:
    """`[num_columns, width]` from int8 panels of whole quads of weights + 128 (csrc/core/kernels.h)."""
    tiles = panels.view(-1, width // 4, 64, 4) ^ -128  # panel, quad, column, k
    return tiles.permute(0, 2, 1, 3).reshape(-1, width)[:num_columns]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_rounded_as_the_reference_rounds(dtype: torch.dtype) -> None:
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    weight[3] = 0
    weight[4] = torch.arange(256) - 127.0  # the scale is 128 / 127: ties and near ties
    weight[5] = 2.0**-14 * torch.arange(256)
    weight[6] = torch.arange(256) / 2 - 63.5  # the scale is 64 / 127
    weight[7, 9], weight[8, 0] = float("nan"), float("-inf")
    quantized, scale = reference.quantize_rows(weight)
    packed = NATIVE.pack_linear(weight, None, INT8)
    assert torch.equal(unpack(packed.weight, 100, 256), quantized)
    assert torch.allclose(packed.scale, scale, rtol=0, atol=0, equal_nan=True)
    assert scale.isnan().tolist() == [row in (7, 8) for row in range(100)]


def test_tiny_int8_weights_are_finite() -> None:
    weight = torch.full((4, 128), 1e-40)
    weight[1], weight[2] = 1e-45, 3e-38
    quantized, scale = reference.quantize_rows(weight)
    packed = NATIVE.pack_linear(weight, None, INT8)
    assert torch.equal(unpack(packed.weight, 4, 128), quantized)
    assert torch.equal(packed.scale, scale)
    assert scale.isfinite().all()


def check_unusual_rows(
    ops: Backend, layer: Layer, tiny: float, rounds: Callable[[Tensor], Tensor], tolerance: float
) -> Tensor:
    """Zeros, tiny numbers and huge ones give what `rounds` makes of them, each beside its own row's largest result.
    Returns the results of a row with a NaN and of one with an infinity."""
    rows, residual = random_rows(8, layer.plain.in_features), torch.zeros(8, 70)
    rows[1], rows[2], rows[3], rows[4] = 0.0, 1e-44, tiny, 1e34
    rows[5, -1], rows[6, 0] = float("nan"), float("inf")
    out = ops.linear_residual(rows, layer.packed, residual)
    finite = [0, 1, 2, 3, 4, 7]
    expected = reference.linear_residual(rounds(rows[finite].double()), layer.plain, residual[:6].double())
    assert torch.equal(out[1], layer.packed.bias)
    error = (out[finite].double() - expected).abs().amax(dim=1)
    assert (error <= tolerance * expected.abs().amax(dim=1)).all()
    return out[5:7]


def test_int8_rows_that_are_zero_tiny_huge_or_not_finite(every_ops: Backend) -> None:
    layer = random_layer(130, 70, torch.int8, ops=every_ops)
    unusable = check_unusual_rows(every_ops, layer, 1e-38, lambda rows: as_multiplied(rows, torch.int8), 1e-4)
    assert unusable.isnan().all()


def test_int8_has_the_same_bits_with_every_instruction_set() -> None:
    layer, rows = random_layer(301, 130, torch.int8), random_rows(9, 301)
    results = []
    for name in INSTRUCTION_SETS:
        _C.set_instruction_set(name)
        results.append(NATIVE.linear_residual(rows, layer.packed, torch.zeros(9, 130)))
    _C.set_instruction_set("auto")
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("fault", ["scale", "weight"])
def test_a_fault_in_int8_weights_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, activation):
        if fault == "scale":
            return ops.norm_linear(hidden, norm, replace(weight, scale=weight.scale.roll(1)), activation)
        packed = weight.weight.clone()
        packed.view(-1)[0] ^= 64
        return ops.norm_linear(hidden, norm, replace(weight, weight=packed), activation)

    with pytest.raises(AssertionError):
        check_norm_linear(ops, (7, 129, 200), torch.int8, "none", op=faulty)


# -- tiles ---------------------------------------------------------------------------------------------------------


def check_tile_bits(num_rows: int, width: int, num_columns: int, fault: str | None = None) -> None:
    weight = random_layer(width, num_columns, torch.bfloat16, has_bias=False).plain.weight
    weight[1] *= 2.0**-61
    rows = random_rows(num_rows, width)
    rows[-1] *= 2.0**-61  # some of their products vanish
    packed = NATIVE.pack_linear(weight, None)
    result = NATIVE.linear_residual(rows, packed, torch.zeros(num_rows, num_columns))
    expected = tile_product(rows, weight, fault)
    assert torch.equal(result, expected), f"{num_rows} rows of {width}"


@pytest.mark.usefixtures("tile_set")
@pytest.mark.parametrize(
    ("width", "num_columns"), [(1, 2), (31, 66), (32, 2), (33, 64), (70, 130), (129, 3), (320, 66), (601, 20)]
)
def test_tiles_of_bf16_have_the_bits_that_are_specified(width: int, num_columns: int) -> None:
    """Ragged steps, chunks and panels; rows for one tile, several, and several passes."""
    for num_rows in (1, 2, 15, 16, 17, 33, 64):
        check_tile_bits(num_rows, width, num_columns)
    if width == 601:
        check_tile_bits(300, width, num_columns)


@pytest.mark.usefixtures("tile_set")
@pytest.mark.parametrize("fault", ["tail", "one chain", "order", "denormal"])
def test_another_order_of_a_tile_product_is_noticed(fault: str) -> None:
    with pytest.raises(AssertionError, match="17 rows of 70"):
        check_tile_bits(17, 70, 130, fault)


def test_bf16_rows_that_are_zero_tiny_huge_or_not_finite(every_ops: Backend) -> None:
    layer = random_layer(130, 70, torch.bfloat16, ops=every_ops)
    unusable = check_unusual_rows(
        every_ops, layer, 1e-36, lambda rows: as_multiplied(rows, torch.bfloat16, every_ops), 1e-5
    )
    assert not unusable.isfinite().any()


# -- by group ------------------------------------------------------------------------------------------------------


def fused(a: Tensor, b: Tensor, c: Tensor, is_fused: bool) -> Tensor:
    """a * b + c in fp32, rounded once; where there is no such instruction twice."""
    product = a.double() * b.double()
    return (product if is_fused else product.float()).add(c.double()).float()


def grouped_product(x: Tensor, weight: GroupedWeight, is_fused: bool) -> Tensor:
    """`[R, N]`: x W^T as C++ is specified to round it. A group of a row becomes integers of 23 bits with one scale;
    their products with the codes are summed exactly: in two parts, the products with the integers' last 8 bits and
    with the rest, each from its part of -(what is added to the codes so that they have no sign) * (sum of the
    integers) on."""
    offset = 128 if weight.bits == 8 else 8
    codes = weight.codes.long() + (0 if weight.minimum is not None else offset)
    total = torch.zeros(x.shape[0], weight.shape[0])
    for group in range(x.shape[1] // 32):
        columns = slice(32 * group, 32 * group + 32)
        values = x[:, columns]
        largest = values.abs().amax(dim=1, keepdim=True)
        whole = (values * (torch.tensor(float(0x3F7F7F)) / largest)).round().long()
        scale, sums = largest / 0x3F7F7F, whole.sum(dim=1, keepdim=True)
        parts = []
        for numbers in (whole, -offset * sums):
            low = (numbers + 128 & 255) - 128
            parts += [low, numbers - low >> 8]
        low, high, low_start, high_start = parts
        low_sum, high_sum = ((part @ codes[:, columns].t()) for part in (low, high))
        value = fused(
            (high_sum + high_start).float(),
            torch.tensor(256.0),
            (low_sum + low_start).float(),
            is_fused,
        )
        factor = weight.scale[:, group].float()
        total = fused(factor, value * scale, total, is_fused)
        if weight.minimum is not None:
            centre = fused(factor, torch.tensor(8.0), weight.minimum[:, group], is_fused)
            total = fused(centre, sums.float() * scale, total, is_fused)
    return total


def check_grouped_bits(
    instructions: str, format: WeightFormat, fault: Callable[[GroupedWeight], GroupedWeight] | None = None
) -> None:
    """For every block of rows, with several chunks, a ragged last panel and a ragged last chunk."""
    for width, num_columns in ((32, 2), (96, 130), (480, 66)):
        layer = random_layer(width, num_columns, format.name)
        weight = GroupedWeight(layer.plain.weight, layer.plain.scale, layer.plain.minimum, format.bits)
        packed = NATIVE.pack_linear(weight if fault is None else fault(weight), None)
        for num_rows in (1, 2, 3, 4, 5, 6, 7, 40):
            hidden = random_rows(num_rows, width)
            result = NATIVE.linear_residual(hidden, packed, torch.zeros(num_rows, num_columns))
            expected = grouped_product(hidden, weight, is_fused=instructions not in WITHOUT_FUSED_ADDS)
            assert torch.equal(result, expected), f"{num_rows} rows of {width}"


@pytest.mark.parametrize("format", GROUPED_FORMATS, ids=lambda format: format.name)
def test_groups_have_the_bits_that_are_specified(instruction_set: str, format: WeightFormat) -> None:
    check_grouped_bits(instruction_set, format)


@pytest.mark.parametrize("format", GROUPED_FORMATS, ids=lambda format: format.name)
def test_every_code_and_the_largest_numbers_are_summed_exactly(
    instruction_set: str, format: WeightFormat
) -> None:
    """Sums at the limits of what 16 and 32 bits hold: every code of a type against rows of one value."""
    lowest, highest = {"int4": (-8, 7), "int4_min": (0, 15), "int8_group": (-128, 127)}[format.name]
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8)[:, None].expand(-1, 64)
    scale = torch.ones(len(codes), 2, dtype=torch.float16)
    minimum = torch.zeros_like(scale) if format.has_minimum else None
    packed = NATIVE.pack_linear(GroupedWeight(codes, scale, minimum, format.bits), None)
    for largest in (0x3F7F7F, -0x3F7F7F):
        for value in (largest, 0x80, -0x80, 0x7F80, -0x7F80):
            rows = torch.full((5, 64), float(value))
            rows[:, ::32] = largest
            out = NATIVE.linear_residual(rows, packed, torch.zeros(5, len(codes)))
            exact = (rows[0].double() @ codes.double().t()).expand(5, -1)
            assert (out - exact).abs().max() <= 2**-23 * exact.abs().max()


@pytest.mark.parametrize("format", GROUPED_FORMATS, ids=lambda format: format.name)
def test_one_code_of_another_value_is_noticed(format: WeightFormat) -> None:
    def faulty(weight: GroupedWeight) -> GroupedWeight:
        codes = weight.codes.clone()
        codes[-1, -1] ^= 1
        return replace(weight, codes=codes)

    with pytest.raises(AssertionError, match="rows of 32"):
        check_grouped_bits("auto", format, faulty)


@pytest.mark.parametrize("dtype", [format.name for format in GROUPED_FORMATS])
def test_grouped_rows_that_are_zero_tiny_huge_or_not_finite(every_ops: Backend, dtype: WeightDtype) -> None:
    layer = random_layer(128, 70, dtype, ops=every_ops)
    unusable = check_unusual_rows(every_ops, layer, 1e-36, lambda rows: rows, 1e-5)
    assert not unusable.isfinite().any()


GGUF_TYPES = {"int4": "Q4_0", "int4_min": "Q4_1", "int8_group": "Q8_0"}


@pytest.mark.parametrize("format", GROUPED_FORMATS, ids=lambda format: format.name)
def test_groups_are_rounded_as_gguf_rounds_them(format: WeightFormat) -> None:
    import gguf

    weight = torch.randn(5000, 96, generator=torch.Generator().manual_seed(6))  # rounded in several parts
    weight[3] = 0
    weight[4] = torch.arange(96) - 48.0  # ties
    weight[5, ::2] = -weight[5, 1::2]  # two are furthest from zero
    weight[6] = 2.0**-20 * torch.arange(96)
    weight[7] = 1e-40
    weight[8] = 3.0
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[format.name]]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(weight.numpy(), kind)
    for values in (weight, weight.t().contiguous().t()):
        grouped = reference.quantize_groups(values, bits=format.bits, has_minimum=format.has_minimum)
        parts = [grouped.scale, *([] if grouped.minimum is None else [grouped.minimum])]
        blocks = [part.view(torch.uint8).unflatten(1, (-1, 2)) for part in parts]
        codes = grouped.codes.unflatten(1, (-1, 32))
        if format.bits == 4:
            codes = (codes + (0 if format.has_minimum else 8)).unflatten(2, (2, 16))
            codes = codes[:, :, 0] | codes[:, :, 1] << 4
        blocks.append(codes.view(torch.uint8))
        assert torch.equal(torch.cat(blocks, dim=2).flatten(1), torch.from_numpy(expected))
        assert np.array_equal(grouped.dequantize().numpy(), gguf.quants.dequantize(expected, kind))


@pytest.mark.parametrize("format", GROUPED_FORMATS, ids=lambda format: format.name)
def test_a_group_that_is_not_finite_gives_no_number(format: WeightFormat) -> None:
    weight = torch.ones(3, 64)
    weight[1, 40], weight[2, 3] = float("nan"), float("inf")
    packed = NATIVE.pack_linear(weight, None, format)
    out = NATIVE.linear_residual(torch.ones(1, 64), packed, torch.zeros(1, 3))
    assert out.isfinite().tolist() == [[True, False, False]]


def test_inputs_that_are_no_whole_groups_are_refused() -> None:
    for format in GROUPED_FORMATS:
        with pytest.raises(ValueError, match="weight: 33 input features are no groups of 32"):
            NATIVE.pack_linear(torch.zeros(4, 33), None, format)
