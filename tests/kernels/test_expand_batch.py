"""expand_batch: the tokens, places and rows of a ragged batch, the same numbers from every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import NATIVE, TRITON
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend

# slots, start, q_len, num_logits
BATCHES = {
    "one token": ([1], [5], [1], [1]),
    "ragged": ([2, 0], [14, 0], [3, 17], [2, 17]),
    "no logits": ([0, 2, 1], [0, 3, 60], [4, 1, 2], [0, 1, 0]),
    "an empty sequence": ([0, 1, 2], [7, 7, 7], [2, 0, 5], [2, 0, 1]),
    "a prompt": ([1], [0], [200], [1]),
    "padding": ([1, 0, 2, 2, 1], [9, 3, -1, -2, 10**9], [3, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
    "only padding": ([2, 2], [-1, -2], [0, 0], [0, 0]),
    "nobody": ([], [], [], []),
}


def given(batch: tuple[list[int], ...]) -> tuple[Tensor, ...]:
    tokens = torch.arange(3 * 256, dtype=torch.int32).view(3, 256) + 1000
    table = torch.randperm(48, generator=torch.Generator().manual_seed(0)).view(3, 16).int()
    return tokens, table, *(torch.tensor(each, dtype=torch.int32) for each in batch)


def check_expand_batch(op, batch: tuple[list[int], ...]) -> None:
    arguments = given(batch)
    for ours, theirs in zip(op(*arguments, 16), reference.expand_batch(*arguments, 16), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_reference(ops: Backend, batch: str) -> None:
    check_expand_batch(ops.expand_batch, BATCHES[batch])


def test_the_reference_is_what_it_says() -> None:
    tokens, table, *rest = given(([2, 0], [15, 0], [2, 1], [1, 1]))
    ids, positions, kv_slots, q_start, context_len, logit_rows = reference.expand_batch(
        tokens, table, *rest, 16
    )
    assert ids.tolist() == [tokens[2, 15], tokens[2, 16], tokens[0, 0]]
    assert positions.tolist() == [15, 16, 0]
    assert kv_slots.tolist() == [table[2, 0] * 16 + 15, table[2, 1] * 16, table[0, 0] * 16]
    assert (q_start.tolist(), context_len.tolist(), logit_rows.tolist()) == ([0, 2, 3], [17, 1], [1, 2])


@pytest.mark.parametrize("batch", ["ragged", "no logits", "an empty sequence", "padding", "only padding"])
@pytest.mark.parametrize(("num_tokens", "num_logit_rows"), [(30, 30), (40, 20), (300, 400)])
def test_room_for_more_rows_than_there_are(
    ops: Backend, batch: str, num_tokens: int, num_logit_rows: int
) -> None:
    """Tokens beyond the sums are left alone, and logit rows there are 0; native has no more than there are."""
    arguments = given(BATCHES[batch])
    exact = reference.expand_batch(*arguments, 16)
    roomy = ops.expand_batch(*arguments, 16, num_tokens=num_tokens, num_logit_rows=num_logit_rows)
    for ours, theirs in zip(roomy, exact, strict=True):
        assert torch.equal(ours[: theirs.numel()], theirs)
    sizes = [each.numel() for each in roomy]
    if ops.name == "native":
        assert sizes == [each.numel() for each in exact]
        return
    count = len(BATCHES[batch][0])
    assert sizes == [num_tokens, num_tokens, num_tokens, count + 1, count, num_logit_rows]
    assert not roomy[5][exact[5].numel() :].any()


@pytest.mark.triton
def test_room_without_sequences() -> None:
    *_, logit_rows = TRITON.expand_batch(*given(BATCHES["nobody"]), 16, num_tokens=4, num_logit_rows=4)
    assert logit_rows.tolist() == [0] * 4


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New tensors hold the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
def test_tokens_beyond_the_sum_are_left_alone() -> None:
    arguments = given(BATCHES["padding"])
    for each in TRITON.expand_batch(*arguments, 16, num_tokens=40, num_logit_rows=40)[:3]:
        assert (each[4:] == torch.iinfo(each.dtype).max).all()


def test_the_reference_ignores_bounds() -> None:
    arguments = given(BATCHES["ragged"])
    roomy = reference.expand_batch(*arguments, 16, num_tokens=40, num_logit_rows=30)
    assert all(map(torch.equal, roomy, reference.expand_batch(*arguments, 16)))


def test_wrong_arguments_are_named(ops: Backend) -> None:
    tokens, table, *rest = given(BATCHES["ragged"])
    with pytest.raises(ValueError, match="tokens: expected"):
        ops.expand_batch(tokens.long(), table, *rest, 16)
    with pytest.raises(ValueError, match="start: expected"):
        ops.expand_batch(tokens, table, rest[0], rest[1][:1], *rest[2:], 16)


def test_what_does_not_fit() -> None:
    """Native names it."""
    for start, q_len in ((-1, 1), (255, 2), (0, -1)):
        batch = given(([0], [start], [q_len], [0]))
        with pytest.raises(ValueError, match=f"q_len: {q_len} tokens from {start} on do not fit 256"):
            NATIVE.expand_batch(*batch, 16)


def test_a_place_off_by_one_is_noticed(ops: Backend) -> None:
    def shifted(tokens, table, slots, start, *rest):
        return ops.expand_batch(tokens, table, slots, start + 1, *rest)

    with pytest.raises(AssertionError):
        check_expand_batch(shifted, BATCHES["ragged"])
