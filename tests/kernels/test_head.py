"""head: final norm and logits; columns beyond the vocabulary are -inf."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    NATIVE,
    WEIGHT_DTYPES,
    assert_earned,
    assert_row_invariant,
    honest,
    random_layer,
    random_rows,
)

from specengine.kernels import reference


def check_head(op, num_rows: int, width: int, vocab_size: int, num_rows_of_weight: int, dtype) -> None:
    layer = random_layer(width, num_rows_of_weight, dtype, has_bias=False)
    hidden = random_rows(num_rows, width)
    logits = op(hidden, layer.norm, layer.packed, vocab_size)
    exact = reference.head(hidden.double(), layer.norm, layer.plain, vocab_size)
    expected = honest("head")(hidden, layer.norm, layer.plain, vocab_size)
    assert logits.shape == exact.shape
    assert (logits[:, vocab_size:] == float("-inf")).all()
    assert_earned(logits[:, :vocab_size], expected[:, :vocab_size], exact[:, :vocab_size])


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 500])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_logits_and_padding(vocab_size: int, dtype: torch.dtype) -> None:
    for extra in (0, 7):
        check_head(NATIVE.head, 33, 48, vocab_size, vocab_size + extra, dtype)


@pytest.mark.parametrize("vocab_size", [8193, 50257])
def test_large_vocabularies(vocab_size: int) -> None:
    check_head(NATIVE.head, 2, 32, vocab_size, vocab_size, torch.bfloat16)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(dtype: torch.dtype) -> None:
    layer = random_layer(130, 700, dtype, has_bias=False)
    assert_row_invariant(lambda rows: NATIVE.head(rows, layer.norm, layer.packed, 699), random_rows(64, 130))


@pytest.mark.parametrize("vocab_size", [0, -1, 129, 2**31])
def test_a_vocabulary_larger_than_the_head_is_refused(vocab_size: int) -> None:
    layer = random_layer(16, 128, torch.float32)
    with pytest.raises(ValueError, match=f"vocab_size: {vocab_size}"):
        NATIVE.head(random_rows(1, 16), layer.norm, layer.packed, vocab_size)


def test_a_pad_column_that_could_win_is_noticed() -> None:
    def unmasked(hidden, norm, weight, vocab_size):
        return NATIVE.head(hidden, norm, weight, vocab_size).clamp_min(-1e30)

    with pytest.raises(AssertionError):
        check_head(unmasked, 3, 48, 127, 127, torch.float32)
