"""head: final norm and logits; columns beyond the vocabulary are -inf."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import (
    NATIVE,
    TRITON,
    WEIGHT_DTYPES,
    assert_earned,
    assert_row_invariant,
    honest,
    random_layer,
    random_rows,
    random_tokens,
    width_of,
)

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend


def check_head(
    ops: Backend,
    num_rows: int,
    width: int,
    vocab_size: int,
    num_rows_of_weight: int,
    dtype,
    op=None,
    *,
    is_rms: bool = False,
) -> None:
    layer = random_layer(width, num_rows_of_weight, dtype, has_bias=False, is_rms=is_rms, ops=ops)
    hidden = random_rows(num_rows, width_of(width, dtype))
    logits = (op or ops.head)(hidden, layer.norm, layer.packed, vocab_size)
    exact = reference.head(hidden.double(), layer.norm, layer.plain, vocab_size)
    expected = honest("head", ops)(hidden, layer.norm, layer.plain, vocab_size)
    assert logits.shape == exact.shape
    assert (logits[:, vocab_size:] == float("-inf")).all()
    assert_earned(logits[:, :vocab_size], expected[:, :vocab_size], exact[:, :vocab_size])


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 500])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_logits_and_padding(every_ops: Backend, vocab_size: int, dtype: torch.dtype) -> None:
    for extra in (0, 7) if every_ops is NATIVE else (7,):
        check_head(every_ops, 33, 48, vocab_size, vocab_size + extra, dtype)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_an_rms_norm_before_the_head(every_ops: Backend, dtype: torch.dtype) -> None:
    check_head(every_ops, 33, 48, 129, 129, dtype, is_rms=True)


@pytest.mark.parametrize("vocab_size", [8193, 50257])
def test_large_vocabularies(vocab_size: int) -> None:
    check_head(NATIVE, 2, 32, vocab_size, vocab_size, torch.bfloat16)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_row_keeps_its_bits_whatever_is_computed_with_it(every_ops: Backend, dtype: torch.dtype) -> None:
    layer = random_layer(130, 700, dtype, has_bias=False, ops=every_ops)
    assert_row_invariant(
        lambda rows: every_ops.head(rows, layer.norm, layer.packed, 699),
        random_rows(64 if every_ops is NATIVE else 18, width_of(130, dtype)),
        is_thorough=every_ops is NATIVE,
    )


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_bias_takes_tokens_out_and_leaves_the_others_bits(every_ops: Backend, dtype: torch.dtype) -> None:
    """What a draft of another vocabulary never proposes; the heads that draw and judge see it too."""
    layer, hidden = (
        random_layer(48, 300, dtype, has_bias=False, ops=every_ops),
        random_rows(5, width_of(48, dtype)),
    )
    without = torch.zeros(300)
    without[torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]] = float("-inf")
    packed = replace(layer.packed, bias=every_ops.pack_linear(torch.zeros(300, 48), without).bias)
    expected = every_ops.head(hidden, layer.norm, layer.packed, 299)
    expected[:, :299] += without[:299]
    assert torch.equal(every_ops.head(hidden, layer.norm, packed, 299), expected)
    rows = SamplingRows.empty(5)._replace(temperature=torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0]))
    logits, stats = every_ops.head_stats(hidden, layer.norm, packed, 299, rows)
    assert torch.equal(logits, expected)
    assert torch.equal(stats, every_ops.filter_rows(expected, rows))
    positions = torch.arange(5, dtype=torch.int32)
    drawn = every_ops.head_draw(hidden, layer.norm, packed, 299, rows, positions)
    zero = torch.zeros_like(positions)
    tokens, _ = every_ops.sample_rows(expected, stats, rows, positions, rng.STREAM_TARGET, zero)
    assert torch.equal(drawn[0], tokens)
    assert not drawn[1].any()


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 130, 300])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_head_of_some_tokens_has_the_bits_of_the_whole_one(
    every_ops: Backend, dtype: torch.dtype, num_tokens: int
) -> None:
    """Also where some of its tokens are no longer in the vocabulary."""
    token_ids = random_tokens(num_tokens, 300)
    whole = random_layer(48, 300, dtype, has_bias=False, ops=every_ops)
    some = random_layer(48, 300, dtype, has_bias=False, ops=every_ops, chosen=token_ids)
    hidden = random_rows(5, width_of(48, dtype))
    for vocab_size in (300, 299, int(token_ids[-1]) or 1):
        logits = every_ops.head(hidden, some.norm, some.packed, vocab_size, token_ids=token_ids)
        kept = token_ids[token_ids < vocab_size].long()
        expected = torch.full_like(logits, float("-inf"))
        expected[:, kept] = every_ops.head(hidden, whole.norm, whole.packed, vocab_size)[:, kept]
        assert torch.equal(logits, expected)
        meant = reference.head(hidden, some.norm, some.plain, vocab_size, token_ids=token_ids)
        assert torch.equal(meant == float("-inf"), expected == float("-inf"))


def test_tokens_that_do_not_ascend_are_refused() -> None:
    layer = random_layer(16, 3, torch.float32)
    for ids in ([0, 2, 2], [2, 1, 3], [-1, 0, 1], [0, 1], [[0, 1, 2]]):
        with pytest.raises(ValueError, match="token_ids"):
            NATIVE.head(
                random_rows(1, 16),
                layer.norm,
                layer.packed,
                9,
                token_ids=torch.tensor(ids, dtype=torch.int32),
            )


@pytest.mark.triton
@pytest.mark.parametrize("num_tokens", [None, 200])
def test_padded_rows_are_left_alone(num_tokens: int | None) -> None:
    token_ids = None if num_tokens is None else random_tokens(num_tokens, 300)
    layer = random_layer(40, 300, torch.float32, has_bias=False, ops=TRITON, chosen=token_ids)
    hidden, limit = random_rows(20, 40), torch.tensor([5], dtype=torch.int32)
    hidden[5:] = float("nan")
    head = partial(TRITON.head, token_ids=token_ids)
    logits = head(hidden, layer.norm, layer.packed, 300, num_rows=limit)
    assert torch.equal(logits[:5], head(hidden[:5], layer.norm, layer.packed, 300))


@pytest.mark.parametrize("vocab_size", [0, -1, 129, 2**31])
def test_a_vocabulary_larger_than_the_head_is_refused(ops: Backend, vocab_size: int) -> None:
    layer = random_layer(16, 128, torch.float32, ops=ops)
    with pytest.raises(ValueError, match=f"vocab_size: {vocab_size}"):
        ops.head(random_rows(1, 16), layer.norm, layer.packed, vocab_size)


def test_a_pad_column_that_could_win_is_noticed(ops: Backend) -> None:
    def unmasked(hidden, norm, weight, vocab_size):
        return ops.head(hidden, norm, weight, vocab_size).clamp_min(-1e30)

    with pytest.raises(AssertionError):
        check_head(ops, 3, 48, 127, 127, torch.float32, op=unmasked)
