"""head_draw: the bits of head, filter_rows and sample_rows, with no logits stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DTYPES, NATIVE, TRITON, Layer, native_threads, random_layer, random_rows
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.types.statistics import STAT_ERROR
from specengine.ops.backend import Backend

NUM_ROWS = 17
WIDTH = 48
HeadDraw = Callable[..., tuple[Tensor, Tensor]]


def keys(num_rows: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Temperatures (every third row greedy), filters (none on every second row), seeds of all 64 bits, positions."""
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand(num_rows, generator=generator) + 0.3
    temperature[::3] = 0.0
    top_k = torch.randint(0, 40, (num_rows,), generator=generator).int() * 3
    top_p = 1.0 - 0.6 * torch.rand(num_rows, generator=generator)
    min_p = 0.05 * torch.rand(num_rows, generator=generator)
    top_k[::2], top_p[::2], min_p[::2] = 0, 1.0, 0.0
    top_k[1::6], top_p[1::6], min_p[3::8] = 0, 1.0, 0.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**20, (num_rows,), generator=generator).int()
    return temperature, top_k, top_p, min_p, seeds, positions


def without_filters(drawn: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    temperature, *_, seeds, positions = drawn
    return temperature, None, None, None, seeds, positions


def draw_from_logits(
    ops: Backend, hidden: Tensor, layer: Layer, vocab_size: int, *drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """The three ops that head_draw replaces."""
    temperature, *filters, seeds, positions = drawn
    if filters[0] is None:
        off = torch.zeros_like(temperature)
        filters = [off.int(), off + 1, off]
    logits = ops.head(hidden, layer.norm, layer.packed, vocab_size)
    stats = ops.filter_rows(logits, temperature, *filters)
    base = torch.zeros_like(positions)
    tokens, _ = ops.sample_rows(logits, stats, temperature, seeds, positions, rng.STREAM_TARGET, base)
    return tokens, stats[:, STAT_ERROR].int()


def check_bits(
    ops: Backend,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    extra: int = 0,
    has_filters: bool = True,
    op: HeadDraw | None = None,
) -> None:
    layer = random_layer(WIDTH, vocab_size + extra, dtype, has_bias=False, ops=ops)
    hidden, drawn = random_rows(NUM_ROWS, WIDTH), keys(NUM_ROWS)
    if not has_filters:
        drawn = without_filters(drawn)
    tokens, error = (op or ops.head_draw)(hidden, layer.norm, layer.packed, vocab_size, *drawn)
    expected, _ = draw_from_logits(ops, hidden, layer, vocab_size, *drawn)
    assert torch.equal(tokens, expected)
    assert not error.any()


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 500, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_the_bits_of_the_ops_it_replaces(vocab_size: int, dtype: torch.dtype) -> None:
    for extra in (0, 7):
        check_bits(NATIVE, vocab_size, dtype, extra=extra)
        check_bits(NATIVE, vocab_size, dtype, extra=extra, has_filters=False)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [*((size, torch.float32) for size in (1, 127, 128, 500)), (129, torch.bfloat16), (300, torch.float16)],
)
def test_the_bits_of_the_ops_it_replaces_on_triton(vocab_size: int, dtype: torch.dtype) -> None:
    check_bits(TRITON, vocab_size, dtype, extra=7, has_filters=False)


@pytest.mark.parametrize("vocab_size", [8191, 50257])
@pytest.mark.usefixtures("instruction_set")
def test_large_vocabularies(vocab_size: int) -> None:
    check_bits(NATIVE, vocab_size, torch.bfloat16)


@pytest.mark.parametrize("has_filters", [True, False])
def test_the_draws_of_the_reference(ops: Backend, has_filters: bool) -> None:
    layer = random_layer(WIDTH, 700, torch.float32, has_bias=False, ops=ops)
    count = 64 if ops is NATIVE else 17
    hidden, drawn = random_rows(count, WIDTH), keys(count)
    if not has_filters:
        drawn = without_filters(drawn)
    tokens, error = ops.head_draw(hidden, layer.norm, layer.packed, 699, *drawn)
    exact, exact_error = reference.head_draw(hidden.double(), layer.norm, layer.plain, 699, *drawn)
    assert torch.equal(tokens, exact), "no two tokens of these rows are closer than fp32 can tell"
    assert torch.equal(error, exact_error)


@pytest.mark.usefixtures("instruction_set")
def test_a_row_keeps_its_bits_whatever_is_computed_with_it() -> None:
    layer = random_layer(WIDTH, 3000, torch.bfloat16, has_bias=False)
    hidden, drawn = random_rows(64, WIDTH), keys(64)
    together, _ = NATIVE.head_draw(hidden, layer.norm, layer.packed, 3000, *drawn)
    for rows in ([5], [63, 0], list(range(9)), list(range(63, -1, -1))):
        chosen = [each[rows].contiguous() for each in (hidden, *drawn)]
        tokens, _ = NATIVE.head_draw(chosen[0], layer.norm, layer.packed, 3000, *chosen[1:])
        assert torch.equal(tokens, together[rows])
    for count in (1, 2, 3):
        with native_threads(count):
            assert torch.equal(NATIVE.head_draw(hidden, layer.norm, layer.packed, 3000, *drawn)[0], together)


@pytest.mark.triton
def test_padded_rows_are_left_alone_and_keys_return_to_zero() -> None:
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=TRITON)
    hidden, drawn = random_rows(20, WIDTH), without_filters(keys(20))
    limit = torch.tensor([5], dtype=torch.int32)
    few = [None if each is None else each[:5] for each in drawn]
    poisoned = torch.cat((hidden[:5], torch.full_like(hidden[5:], float("nan"))))
    for _ in range(2):
        tokens, error = TRITON.head_draw(poisoned, layer.norm, layer.packed, 300, *drawn, num_rows=limit)
        expected, _ = TRITON.head_draw(hidden[:5], layer.norm, layer.packed, 300, *few)
        assert torch.equal(tokens[:5], expected)
        assert not error[:5].any()


def test_ties_go_to_the_lowest_id_and_bad_rows_are_flagged(every_ops: Backend) -> None:
    layer = random_layer(WIDTH, 400, torch.float32, has_bias=False, ops=every_ops)
    weight = layer.plain.weight.clone()
    weight[130] = weight[300] = weight[7] = weight.sum(dim=0) * 3  # the same logit in three tiles
    packed = every_ops.pack_linear(weight, None)
    hidden = random_rows(4, WIDTH)
    hidden[1] = -hidden[0]  # one of the two has the tie on top
    hidden[2, 3] = float("nan")
    zero = torch.zeros(4)
    greedy = (zero, zero.int(), zero + 1, zero, zero.long(), zero.int())
    tokens, error = every_ops.head_draw(hidden, layer.norm, packed, 400, *greedy)
    logits = every_ops.head(hidden, layer.norm, packed, 400)
    assert torch.equal(tokens[:2].long(), logits[:2].argmax(dim=1))
    assert 7 in tokens[:2].tolist()
    assert error.tolist() == [0, 0, 1, 0]
    assert ((tokens >= 0) & (tokens < 400)).all()
    unfiltered = every_ops.head_draw(hidden, layer.norm, packed, 400, *without_filters(greedy))
    for ours, theirs in zip(unfiltered, (tokens, error), strict=True):
        assert torch.equal(ours, theirs)
    filtered = (zero + 1, zero.int() + 1, zero + 1, zero, zero.long(), zero.int())
    tokens, error = every_ops.head_draw(hidden, layer.norm, packed, 400, *filtered)
    assert error.tolist() == [0, 0, 1, 0]
    assert ((tokens >= 0) & (tokens < 400)).all()


@pytest.mark.parametrize("vocab_size", [0, 129])
def test_a_vocabulary_larger_than_the_head_is_refused(ops: Backend, vocab_size: int) -> None:
    layer = random_layer(WIDTH, 128, torch.float32, ops=ops)
    with pytest.raises(ValueError, match=f"vocab_size: {vocab_size}"):
        ops.head_draw(random_rows(1, WIDTH), layer.norm, layer.packed, vocab_size, *keys(1))


@pytest.mark.parametrize(
    "fault", ["the noise of the next position", "no top-p", "the noise of one row for all"]
)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, vocab_size, *drawn):
        temperature, top_k, top_p, min_p, seeds, positions = drawn
        if fault == "no top-p":
            top_p = torch.ones_like(top_p)
        elif fault == "the noise of the next position":
            positions = positions + 1
        else:
            seeds = seeds[:1].expand_as(seeds).contiguous()
        given = (temperature, top_k, top_p, min_p, seeds, positions)
        return ops.head_draw(hidden, norm, weight, vocab_size, *given)

    with pytest.raises(AssertionError):
        check_bits(ops, 500, torch.float32, op=faulty)
