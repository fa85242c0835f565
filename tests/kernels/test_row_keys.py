"""row_keys: every row has the keys of the sequence that its token belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import TRITON, random_seeds
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend

NAMES = ("temperature", "top_k", "top_p", "min_p", "seeds", "q_start", "positions", "logit_rows")


def build_case(q_len: list[int], rows: list[int] | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    """Sequences of the given lengths, and the rows of these tokens; all of them by default."""
    generator = torch.Generator().manual_seed(seed)
    count, total = len(q_len), sum(q_len)
    numbers = [torch.rand(count, generator=generator) for _ in range(3)]
    top_k = torch.randint(0, 50, (count,), generator=generator, dtype=torch.int32)
    q_start = torch.tensor([0, *q_len]).cumsum(0).int()
    positions = torch.randint(0, 1000, (total,), generator=generator, dtype=torch.int32)
    logit_rows = torch.arange(total) if rows is None else torch.tensor(rows, dtype=torch.int64)
    return numbers[0], top_k, *numbers[1:], random_seeds(count, seed), q_start, positions, logit_rows


def check_row_keys(op, case: tuple[Tensor, ...]) -> None:
    for name, actual, expected in zip(NAMES, op(*case), reference.row_keys(*case), strict=False):
        assert actual.dtype == expected.dtype, name
        assert torch.equal(actual, expected), name


LENGTHS = {
    "one token": [1],
    "one sequence": [9],
    "ragged": [1, 2, 3, 1, 5, 9, 2, 6, 5],
    "some are empty": [0, 2, 0, 0, 3, 1, 0],
    "many": [1, 9, 4] * 11,
    "a prompt": [200, 1],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_equals_the_reference(ops: Backend, name: str) -> None:
    check_row_keys(ops.row_keys, build_case(LENGTHS[name]))


@pytest.mark.parametrize("name", LENGTHS)
def test_the_last_rows_of_each(ops: Backend, name: str) -> None:
    """As a first draft wants them: one row a sequence."""
    case = build_case(LENGTHS[name])
    q_start = case[5]
    rows = (q_start[1:] - 1)[q_start.diff() > 0].tolist()
    check_row_keys(ops.row_keys, build_case(LENGTHS[name], rows))


def test_no_rows(ops: Backend) -> None:
    for case in (build_case([2, 1], []), build_case([0, 0], []), build_case([], [])):
        assert [each.shape[0] for each in ops.row_keys(*case)] == [0] * 6


def test_what_it_says(ops: Backend) -> None:
    """Row r decides the position after its token."""
    temperature, top_k, top_p, min_p, seeds, q_start, positions, logit_rows = build_case([2, 0, 3], [1, 3, 4])
    rows = ops.row_keys(temperature, top_k, top_p, min_p, seeds, q_start, positions, logit_rows)
    owner = [0, 2, 2]
    for actual, values in zip(rows, (temperature, top_k, top_p, min_p, seeds), strict=False):
        assert torch.equal(actual, values[owner])
    assert rows[5].tolist() == [int(positions[row]) + 1 for row in (1, 3, 4)]


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("num_rows", [0, 1, 5, 40, 41, 100])
def test_padding_is_left_alone(num_rows: int) -> None:
    """Whatever its logit rows say."""
    case = build_case([1, 9, 4, 7, 20])
    used = min(num_rows, 41)
    rows = torch.full((64,), 2**40)
    rows[1::2] = -(2**40)
    rows[:used] = torch.arange(used)
    padded = TRITON.row_keys(*case[:-1], rows, num_rows=torch.tensor([num_rows], dtype=torch.int32))
    for actual, expected in zip(padded, reference.row_keys(*case), strict=True):
        assert torch.equal(actual[:used], expected[:used])
        padding = actual[num_rows:]
        is_untouched = (
            padding.isnan() if padding.is_floating_point() else padding == torch.iinfo(padding.dtype).max
        )
        assert is_untouched.all()


@pytest.mark.triton
def test_rows_of_a_batch_without_tokens_read_nothing_that_is_not_there() -> None:
    """Nobody runs: all rows are `expand_batch`'s zeros, of tokens that nobody wrote."""
    case = build_case([0, 0, 0])
    positions = torch.tensor([41, 0, 0], dtype=torch.int32)
    rows = TRITON.row_keys(*case[:-2], positions, torch.zeros(3, dtype=torch.int64))
    for actual, values in zip(rows, case[:5], strict=False):
        assert torch.equal(actual, values[-1].expand(3))
    assert rows[5].tolist() == [42] * 3


@pytest.mark.triton
def test_wrong_arguments_are_named() -> None:
    """By Triton: natively this is PyTorch."""
    case = dict(zip(NAMES, build_case([2, 3]), strict=True))
    wrong = {
        "temperature": case["temperature"].double(),
        "top_k": case["top_k"].long(),
        "top_p": case["top_p"][:1],
        "min_p": case["min_p"][:1],
        "seeds": case["seeds"].int(),
        "q_start": case["q_start"][:-1],
        "positions": case["positions"].long(),
        "logit_rows": case["logit_rows"].int(),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TRITON.row_keys(*{**case, name: value}.values())
    with pytest.raises(ValueError, match="positions: no tokens for 5 logit_rows"):
        TRITON.row_keys(*{**case, "positions": case["positions"][:0]}.values())
    with pytest.raises(ValueError, match="temperature: no sequences for 1 logit_rows"):
        TRITON.row_keys(*build_case([], [0]))


FAULTS = {
    "the sequence's before": ("q_start", lambda q_start: (q_start + 1) * (q_start > 0)),
    "the next token's": ("logit_rows", lambda rows: rows.roll(1)),
    "seeds of 32 bits": ("seeds", lambda seeds: seeds & 0xFFFFFFFF),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    name, change = FAULTS[fault]

    def faulty(*arguments):
        given = dict(zip(NAMES, arguments, strict=True))
        return ops.row_keys(*{**given, name: change(given[name])}.values())

    with pytest.raises(AssertionError):
        check_row_keys(faulty, build_case(LENGTHS["ragged"]))
