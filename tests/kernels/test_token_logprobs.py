"""token_logprobs: the raw fp32 log-softmax, and the most likely ids in order."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    NATIVE,
    NEGATIVE_INFINITY,
    VOCABULARIES,
    assert_earned,
    assert_row_invariant,
    random_logits,
)
from torch import Tensor

from specengine.kernels import reference


def check_logprobs(op, logits: Tensor, num_top: int) -> None:
    generator = torch.Generator().manual_seed(num_top)
    ids = torch.randint(0, logits.shape[1], (logits.shape[0],), generator=generator, dtype=torch.int32)
    before = logits.clone()
    actual = op(logits, ids, num_top)
    honest = reference.token_logprobs(logits, ids, num_top)
    exact = reference.token_logprobs(logits.double(), ids, num_top)
    assert_earned(actual[0], honest[0], exact[0])
    assert torch.equal(actual[1], honest[1])
    assert actual[2].shape == honest[2].shape
    if num_top > 0:
        assert_earned(actual[2], honest[2], exact[2])
        is_same = actual[1] == ids[:, None]
        assert torch.equal(actual[2][is_same], actual[0][is_same.any(dim=1)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.usefixtures("instruction_set")
def test_values_and_order(vocab_size: int) -> None:
    for num_top in (0, 1, 5, 20):
        check_logprobs(NATIVE.token_logprobs, random_logits(7, vocab_size), num_top)


def test_ties_are_in_order_of_id() -> None:
    check_logprobs(NATIVE.token_logprobs, (random_logits(9, 3000) * 2).round(), 20)


@pytest.mark.usefixtures("instruction_set")
def test_edges() -> None:
    logits = random_logits(5, 300)
    logits[0, 7] = float("nan")
    logits[1, :] = NEGATIVE_INFINITY
    logits[1, 299] = 3.0
    logits[2, 9] = float("inf")
    logits[3] = NEGATIVE_INFINITY
    logits[4, 250:] = NEGATIVE_INFINITY
    ids = torch.tensor([7, 299, 9, 4, 299], dtype=torch.int32)
    actual, expected = NATIVE.token_logprobs(logits, ids, 4), reference.token_logprobs(logits, ids, 4)
    assert torch.equal(actual[1], expected[1])
    for index in (0, 2):
        assert torch.allclose(actual[index], expected[index], rtol=2e-7, atol=0, equal_nan=True)
    assert actual[0][0] == NEGATIVE_INFINITY
    assert actual[0][1] == 0


def test_a_row_keeps_its_bits_whatever_is_computed_with_it() -> None:
    def op(rows: Tensor) -> Tensor:
        ids = (rows[:, 0].abs() % 30).int()
        log_probs, top_ids, top_log_probs = NATIVE.token_logprobs(rows, ids, 5)
        return torch.cat((log_probs[:, None].double(), top_ids.double(), top_log_probs.double()), dim=1)

    assert_row_invariant(op, random_logits(64, 777))


@pytest.mark.parametrize("token", [-1, 300, 2**31 - 1])
def test_ids_outside_the_row_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"token_ids: {token}"):
        NATIVE.token_logprobs(random_logits(1, 300), torch.tensor([token], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="num_top: -1"):
        NATIVE.token_logprobs(random_logits(1, 300), torch.tensor([0], dtype=torch.int32), -1)


def test_a_pad_column_left_out_of_the_sum_is_noticed() -> None:
    def truncated(logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        clipped = logits.clone()
        clipped[:, -1] = NEGATIVE_INFINITY
        return NATIVE.token_logprobs(clipped, ids.clamp_max(logits.shape[1] - 2), num_top)

    with pytest.raises(AssertionError):
        check_logprobs(truncated, random_logits(7, 40, spread=0.5), 3)
