"""token_logprobs: the raw fp32 log-softmax, and the most likely ids in order."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    DEVICE,
    NATIVE,
    NEGATIVE_INFINITY,
    TRITON,
    VOCABULARIES,
    assert_earned,
    assert_row_invariant,
    random_logits,
)
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend


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
def test_values_and_order(every_ops: Backend, vocab_size: int) -> None:
    is_quick = every_ops is NATIVE or vocab_size == 129
    for num_top in (0, 1, 5, 20) if is_quick else (0, 6):
        check_logprobs(every_ops.token_logprobs, random_logits(7 if is_quick else 2, vocab_size), num_top)


def test_ties_are_in_order_of_id(ops: Backend) -> None:
    check_logprobs(ops.token_logprobs, (random_logits(9 if ops is NATIVE else 2, 3000) * 2).round(), 20)


def test_edges(every_ops: Backend) -> None:
    logits = random_logits(5, 300)
    logits[0, 7] = float("nan")
    logits[1, :] = NEGATIVE_INFINITY
    logits[1, 299] = 3.0
    logits[2, 9] = float("inf")
    logits[3] = NEGATIVE_INFINITY
    logits[4, 250:] = NEGATIVE_INFINITY
    ids = torch.tensor([7, 299, 9, 4, 299], dtype=torch.int32)
    actual, expected = every_ops.token_logprobs(logits, ids, 4), reference.token_logprobs(logits, ids, 4)
    assert torch.equal(actual[1], expected[1])
    for index in (0, 2):
        assert torch.allclose(actual[index], expected[index], rtol=2e-7, atol=0, equal_nan=True)
    assert actual[0][0] == NEGATIVE_INFINITY
    assert actual[0][1] == 0


def test_edges_of_several_tiles(every_ops: Backend) -> None:
    """The best tokens lie in the last tile, which holds eight, or are equal from one end of the row to the other."""
    logits = random_logits(6, 8200)
    logits[0, 8192:] += 40.0
    logits[1, :8192] = NEGATIVE_INFINITY
    logits[2] = 1e-42
    logits[3] = torch.where(torch.arange(8200) % 2 == 0, -0.0, 0.0)
    logits[4, [8199, 2048, 2047, 6000]] = 5.0
    logits[5, 8199] = float("nan")
    ids = torch.full((6,), 8199, dtype=torch.int32)
    actual, expected = every_ops.token_logprobs(logits, ids, 12), reference.token_logprobs(logits, ids, 12)
    assert torch.equal(actual[1], expected[1])
    for index in (0, 2):
        assert torch.allclose(actual[index], expected[index], rtol=2e-7, atol=2e-6)


def test_a_row_keeps_its_bits_whatever_is_computed_with_it(ops: Backend) -> None:
    def op(rows: Tensor) -> Tensor:
        ids = (rows[:, 0].abs() % 30).int()
        log_probs, top_ids, top_log_probs = ops.token_logprobs(rows, ids, 5)
        return torch.cat((log_probs[:, None].double(), top_ids.double(), top_log_probs.double()), dim=1)

    is_native = ops is NATIVE
    assert_row_invariant(op, random_logits(64 if is_native else 4, 777), is_thorough=is_native)


def test_rows_need_not_be_adjacent(ops: Backend) -> None:
    logits = random_logits(6, 310)
    rows = logits[::2, :300]
    ids = torch.tensor([0, 299, 5], dtype=torch.int32)
    for actual, expected in zip(
        ops.token_logprobs(rows, ids, 3), ops.token_logprobs(rows.contiguous(), ids, 3), strict=True
    ):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="logits: expected"):
        ops.token_logprobs(logits.T, torch.zeros(310, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="token_ids: expected"):
        ops.token_logprobs(rows, ids.long(), 0)
    with pytest.raises(ValueError, match="num_top: -1"):
        ops.token_logprobs(rows, ids, -1)


@pytest.mark.parametrize("token", [-1, 300, 2**31 - 1])
def test_ids_outside_the_row_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"token_ids: {token}"):
        NATIVE.token_logprobs(random_logits(1, 300), torch.tensor([token], dtype=torch.int32), 0)


@pytest.mark.triton
def test_ids_outside_the_row_have_no_probability() -> None:
    """A device cannot raise: NaN, whatever lies beside the row."""
    logits, ids = random_logits(4, 310)[:, 5:305], torch.tensor([-1, 300, 2**31 - 1, 299], dtype=torch.int32)
    log_probs, top_ids, _ = TRITON.token_logprobs(logits, ids, 2)
    assert log_probs.isnan().tolist() == [True, True, True, False]
    assert torch.equal(top_ids, reference.token_logprobs(logits, ids.clamp(0, 299), 2)[1])
    with pytest.raises(ValueError, match="num_top: 33"):
        TRITON.token_logprobs(logits, ids, 33)


def test_a_pad_column_left_out_of_the_sum_is_noticed(ops: Backend) -> None:
    def truncated(logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        clipped = logits.clone()
        clipped[:, -1] = NEGATIVE_INFINITY
        return ops.token_logprobs(clipped, ids.clamp_max(logits.shape[1] - 2), num_top)

    with pytest.raises(AssertionError):
        check_logprobs(truncated, random_logits(7, 40, spread=0.5), 3)


def test_ties_in_the_wrong_order_are_noticed(ops: Backend) -> None:
    def reversed_rows(logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        last = logits.shape[1] - 1
        log_probs, top_ids, top_log_probs = ops.token_logprobs(
            logits.flip(1).contiguous(), last - ids, num_top
        )
        return log_probs, last - top_ids, top_log_probs

    with pytest.raises(AssertionError):
        check_logprobs(reversed_rows, (random_logits(2, 300) * 2).round(), 5)


# Triton


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """`torch.empty` gives the largest integers and NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
def test_padded_rows_are_left_alone() -> None:
    logits, ids = random_logits(4, 300), torch.arange(4, dtype=torch.int32)
    whole = TRITON.token_logprobs(logits, ids, 3)
    logits[2:], ids[2:] = float("inf"), -1
    num_rows = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        log_probs, top_ids, top_log_probs = TRITON.token_logprobs(logits, ids, 3, num_rows=num_rows)
        for actual, expected in zip((log_probs, top_ids, top_log_probs), whole, strict=True):
            assert torch.equal(actual[:2], expected[:2])
        assert log_probs[2:].isnan().all()
        assert top_log_probs[2:].isnan().all()
        assert (top_ids[2:] == 2**31 - 1).all()


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("specengine.kernels.token_logprobs")
    launch = kernel.launch

    def launch_less(*arguments, **constants):
        tile = constants["DEPTH"] * constants["LANES"]
        constants["VOCAB"] = constants["VOCAB"] // tile * tile
        launch(*arguments, **constants)

    monkeypatch.setattr(kernel, "launch", launch_less)
    logits = random_logits(1, 8200, spread=0.01)
    logits[:, -1] += 3.0
    for num_top in (0, 1):
        with pytest.raises(AssertionError):
            check_logprobs(TRITON.token_logprobs, logits, num_top)
