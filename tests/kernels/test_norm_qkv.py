"""norm_qkv: queries out, keys and values into the right slots of the cache and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_cases import (
    DTYPES,
    GROUPED,
    NATIVE,
    TRITON,
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
from specengine.kernels.device.launch import record
from specengine.kernels.types.packed import PackedLinear
from specengine.ops.backend import Backend

NUM_BLOCKS, BLOCK_SIZE, WIDTH = 7, 4, 40


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    is_normed: bool = False


HEADS = [
    Heads(4, 4, 16),
    Heads(4, 2, 8, rotary_dim=8),
    Heads(3, 1, 20, rotary_dim=6),
    Heads(2, 2, 64, rotary_dim=64),
    Heads(6, 2, 20, rotary_dim=20, is_normed=True),
]


def layer_of(heads: Heads, dtype: torch.dtype, ops: Backend) -> Layer:
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    return random_layer(WIDTH, width, dtype, ops=ops, is_rms=heads.is_normed)


def head_norm_of(heads: Heads) -> Tensor | None:
    if not heads.is_normed:
        return None
    return 0.5 + torch.rand(2, heads.head_dim, generator=torch.Generator().manual_seed(6))


def rotary_of(heads: Heads) -> Tensor | None:
    if heads.rotary_dim == 0:
        return None
    angles = torch.randn(50, heads.rotary_dim // 2, generator=torch.Generator().manual_seed(4))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def empty_cache(heads: Heads, dtype: torch.dtype) -> Tensor:
    return torch.full((2, NUM_BLOCKS, heads.num_kv_heads, BLOCK_SIZE, heads.head_dim), 7.0).to(dtype)


def check_norm_qkv(
    ops: Backend, heads: Heads, weight_dtype: torch.dtype, kv_dtype: torch.dtype, op=None
) -> None:
    layer, rotary, head_norm = layer_of(heads, weight_dtype, ops), rotary_of(heads), head_norm_of(heads)
    hidden = random_rows(9, width_of(WIDTH, weight_dtype))
    positions = torch.tensor([0, 1, 2, 3, 49, 7, 8, 30, 31], dtype=torch.int32)
    kv_slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(5))[:9]
    kv_slots[4] = -1
    caches = [empty_cache(heads, dtype) for dtype in (kv_dtype, kv_dtype, torch.float64)]
    arguments = (hidden, layer.norm, layer.packed, positions, kv_slots, caches[0], rotary, head_norm)
    query = (op or ops.norm_qkv)(*arguments)
    expected = honest("norm_qkv", ops)(
        hidden, layer.norm, layer.plain, positions, kv_slots, caches[1], rotary, head_norm
    )
    exact = reference.norm_qkv(
        hidden.double(), layer.norm, layer.plain, positions, kv_slots, caches[2], rotary, head_norm
    )
    assert_earned(query, expected, exact)
    assert_earned(caches[0], caches[1], caches[2])
    untouched = caches[2] == 7.0
    assert (caches[0][untouched] == 7.0).all()
    assert int((~untouched).sum()) == 8 * 2 * heads.num_kv_heads * heads.head_dim


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_queries_and_cache(every_ops: Backend, heads: Heads, kv_dtype: torch.dtype) -> None:
    for weight_dtype in (torch.float32, torch.bfloat16, torch.int8, *GROUPED):
        check_norm_qkv(every_ops, heads, weight_dtype, kv_dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(every_ops: Backend, heads: Heads) -> None:
    layer, rotary, head_norm = (
        layer_of(heads, torch.float32, every_ops),
        rotary_of(heads),
        head_norm_of(heads),
    )

    def op(rows: Tensor) -> Tensor:
        """Query, key and value of each row; its position is a function of the row."""
        count = rows.shape[0]
        positions = (rows[:, 0].abs() * 10).int()
        cache = torch.zeros(2, count, heads.num_kv_heads, 1, heads.head_dim)
        query = every_ops.norm_qkv(
            rows, layer.norm, layer.packed, positions, torch.arange(count), cache, rotary, head_norm
        )
        return torch.cat((query.flatten(1), cache[0].flatten(1), cache[1].flatten(1)), dim=1)

    assert_row_invariant(
        op, random_rows(64 if every_ops is NATIVE else 18, WIDTH), is_thorough=every_ops is NATIVE
    )


def test_rounding_to_the_cache_is_to_nearest_even(ops: Backend) -> None:
    """A zero weight leaves the bias: chosen values, ties and denormals included, reach the cache."""
    values = torch.tensor([1.00390625, 1.01171875, 1.00048828125, 3.3e38, 65519.9, 65520.0, 6e-8, 2.9e-8])
    values = torch.cat((values, -values))
    for kv_dtype in DTYPES:
        weight = torch.zeros(48, 16)
        packed = ops.pack_linear(weight, values.repeat(3))
        norm = random_layer(16, 48, torch.float32).norm
        cache = torch.zeros(2, 1, 1, 1, 16, dtype=kv_dtype)
        zero = torch.zeros(1, dtype=torch.int32)
        ops.norm_qkv(torch.ones(1, 16), norm, packed, zero, zero.long(), cache, None)
        assert torch.equal(cache.flatten(1), values.to(kv_dtype).expand(2, -1))


def test_places_outside_are_refused_on_a_cpu() -> None:
    heads = HEADS[1]
    layer, rotary = layer_of(heads, torch.float32, NATIVE), rotary_of(heads)
    hidden, positions = random_rows(1, WIDTH), torch.zeros(1, dtype=torch.int32)
    cache = empty_cache(heads, torch.float32)
    before = cache.clone()
    for slot in (-2, NUM_BLOCKS * BLOCK_SIZE, 2**40):
        with pytest.raises(ValueError, match=f"kv_slots: {slot}"):
            NATIVE.norm_qkv(hidden, layer.norm, layer.packed, positions, torch.tensor([slot]), cache, rotary)
    with pytest.raises(ValueError, match="positions: 50"):
        NATIVE.norm_qkv(hidden, layer.norm, layer.packed, positions + 50, torch.tensor([0]), cache, rotary)
    assert torch.equal(cache, before)


def test_wrong_arguments_are_named(ops: Backend) -> None:
    heads = HEADS[1]
    layer, rotary = layer_of(heads, torch.float32, ops), rotary_of(heads)
    hidden, positions = random_rows(1, WIDTH), torch.zeros(1, dtype=torch.int32)
    cache, slots = empty_cache(heads, torch.float32), torch.tensor([0])
    other = empty_cache(HEADS[2], torch.float32)
    wrong = {
        "weight: 64 output features": (positions, slots, other, None),
        "positions: expected": (positions.long(), slots, cache, rotary),
        "kv_slots: expected": (positions, slots.int(), cache, rotary),
        "kv_cache: expected": (positions, slots, cache[0], rotary),
        "rotary: expected": (positions, slots, cache, rotary.double()),
        "head_norm: expected": (positions, slots, cache, rotary, torch.ones(2, 7)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            ops.norm_qkv(hidden, layer.norm, layer.packed, *arguments)


@pytest.mark.triton
@pytest.mark.parametrize(("heads", "dtype"), [(HEADS[1], torch.float32), (HEADS[0], torch.float16)])
def test_padded_rows_are_left_alone(heads: Heads, dtype: torch.dtype) -> None:
    """Of 16 bits and without rotary positions weights are held (`hold_weights`)."""
    layer, rotary = layer_of(heads, dtype, TRITON), rotary_of(heads)
    hidden, positions = random_rows(20, WIDTH), torch.arange(20, dtype=torch.int32)
    caches = [empty_cache(heads, torch.float32) for _ in range(2)]
    queries = [
        TRITON.norm_qkv(
            hidden[:count],
            layer.norm,
            layer.packed,
            positions[:count],
            torch.arange(count),
            cache,
            rotary,
            **pad,
        )
        for count, cache, pad in (
            (5, caches[0], {}),
            (20, caches[1], {"num_rows": torch.tensor([5], dtype=torch.int32)}),
        )
    ]
    assert torch.equal(queries[1][:5], queries[0])
    assert torch.equal(caches[1], caches[0])


@pytest.mark.triton
@pytest.mark.parametrize(
    ("heads", "rows"), [(HEADS[0], 64), (HEADS[2], 64), (HEADS[3], 32), (HEADS[4], None)]
)
def test_a_prompt_goes_through_larger_tiles_of_rows_with_the_same_bits(
    heads: Heads, rows: int | None
) -> None:
    """rows: of a tile once all are normed; None: heads are normed, too, in the order of sixteen rows"""
    layer, rotary, head_norm = layer_of(heads, torch.float16, TRITON), rotary_of(heads), head_norm_of(heads)
    hidden = random_rows(90, WIDTH)

    def run(count: int) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(2, 90, heads.num_kv_heads, 1, heads.head_dim)
        places = torch.arange(90)[:count]
        given = (hidden[:count], layer.norm, layer.packed, places.int() % 50, places, cache, rotary)
        return TRITON.norm_qkv(*given, head_norm), cache

    with record() as launches:
        run(90)
    assert [launch.name for launch in launches] == ["spec_norm_rows"] * (rows is not None) + ["spec_norm_qkv"]
    assert launches[-1].arguments["BLOCK_M"] == (rows or 16)
    (query, cache), (first, cache_of_first) = run(90), run(37)
    assert torch.equal(query[:37], first)
    assert torch.equal(cache[:, :37], cache_of_first[:, :37])
    assert (cache[:, 37:] != 0).any()


@pytest.mark.parametrize("fault", ["bias", "slot", "rotary", "head_norm"])
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, positions, kv_slots, kv_cache, rotary, head_norm):
        if fault == "bias":
            weight = PackedLinear(weight.weight, None, weight.in_features, weight.out_features)
        if fault == "slot":
            kv_slots = torch.where(kv_slots > 0, kv_slots - 1, kv_slots)
        if fault == "rotary":
            positions = (positions - 1).clamp_min(0)
        if fault == "head_norm":
            head_norm = head_norm.flip(0)
        return ops.norm_qkv(hidden, norm, weight, positions, kv_slots, kv_cache, rotary, head_norm)

    with pytest.raises(AssertionError):
        check_norm_qkv(ops, HEADS[4], torch.float32, torch.float32, op=faulty)
