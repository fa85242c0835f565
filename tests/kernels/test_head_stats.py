"""head_stats: head's logits, and filter_rows' statistics of rows without filters, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import NATIVE, TRITON, WEIGHT_DTYPES, random_layer, random_rows, unfiltered_stats, width_of

from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend

WIDTH, NUM_ROWS = 48, 19


def temperatures(num_rows: int) -> SamplingRows:
    """A third of the rows greedy, some hot, some cold; their filters are not looked at."""
    temperature = torch.linspace(0.2, 2.0, num_rows)
    temperature[::3] = 0.0
    rows = SamplingRows.empty(num_rows)
    return rows._replace(temperature=temperature, top_k=rows.top_k + 3, top_p=rows.top_p * 0.5)


def check_head_stats(ops: Backend, vocab_size: int, dtype: torch.dtype, op=None) -> None:
    layer = random_layer(WIDTH, vocab_size + 5, dtype, has_bias=False, ops=ops)
    hidden, rows = random_rows(NUM_ROWS, width_of(WIDTH, dtype)), temperatures(NUM_ROWS)
    logits, stats = (op or ops.head_stats)(hidden, layer.norm, layer.packed, vocab_size, rows)
    assert torch.equal(logits, ops.head(hidden, layer.norm, layer.packed, vocab_size))
    assert torch.equal(stats, unfiltered_stats(logits, rows.temperature, ops))
    exact = unfiltered_stats(logits.double(), rows.temperature, reference)  # type: ignore[arg-type]
    scale = exact[:, :3].nan_to_num(neginf=0.0).abs().amax()
    assert float((stats - exact)[:, 2].abs().max()) <= 4 * 2.0**-23 * float(scale)


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 700])
def test_the_bits_of_the_ops_it_replaces(ops: Backend, vocab_size: int) -> None:
    check_head_stats(ops, vocab_size, torch.float32)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_weight_type(ops: Backend, dtype: torch.dtype) -> None:
    check_head_stats(ops, 300, dtype)


@pytest.mark.parametrize("vocab_size", [8193, 50257])
def test_large_vocabularies(vocab_size: int) -> None:
    check_head_stats(NATIVE, vocab_size, torch.bfloat16)


def test_a_row_keeps_its_bits_whatever_is_computed_with_it(ops: Backend) -> None:
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=ops)
    hidden, rows = random_rows(NUM_ROWS, WIDTH), temperatures(NUM_ROWS)
    together = ops.head_stats(hidden, layer.norm, layer.packed, 300, rows)
    for chosen in ([3], [18, 0], list(range(18, -1, -1))):
        some = rows.take(torch.tensor(chosen))
        apart = ops.head_stats(hidden[chosen].contiguous(), layer.norm, layer.packed, 300, some)
        for part, whole in zip(apart, together, strict=True):
            assert torch.equal(part, whole[chosen])


def test_bad_rows_are_flagged(ops: Backend) -> None:
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=ops)
    hidden = random_rows(4, WIDTH)
    hidden[2, 7] = float("nan")
    _, stats = ops.head_stats(hidden, layer.norm, layer.packed, 300, SamplingRows.empty(4))
    assert stats[:, 3].tolist() == [0, 0, 1, 0]


@pytest.mark.triton
def test_padded_rows_are_left_alone_and_counters_return_to_zero() -> None:
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=TRITON)
    hidden, rows = random_rows(NUM_ROWS, WIDTH), temperatures(NUM_ROWS)
    limit = torch.tensor([5], dtype=torch.int32)
    for _ in range(2):
        many = TRITON.head_stats(hidden, layer.norm, layer.packed, 300, rows, num_rows=limit)
        few = TRITON.head_stats(hidden[:5], layer.norm, layer.packed, 300, rows.take(slice(5)))
        for ours, theirs in zip(many, few, strict=True):
            assert torch.equal(ours[:5], theirs)


def test_wrong_arguments_are_named(ops: Backend) -> None:
    layer = random_layer(WIDTH, 128, torch.float32, ops=ops)
    with pytest.raises(ValueError, match="vocab_size: 129"):
        ops.head_stats(random_rows(1, WIDTH), layer.norm, layer.packed, 129, SamplingRows.empty(1))
    with pytest.raises(ValueError, match="temperature: expected"):
        ops.head_stats(random_rows(1, WIDTH), layer.norm, layer.packed, 100, SamplingRows.empty(2))


def test_the_temperature_of_another_row_is_noticed(ops: Backend) -> None:
    def faulty(hidden, norm, weight, vocab_size, rows):
        rolled = rows._replace(temperature=rows.temperature.roll(1))
        return ops.head_stats(hidden, norm, weight, vocab_size, rolled)

    with pytest.raises(AssertionError):
        check_head_stats(ops, 300, torch.float32, op=faulty)
