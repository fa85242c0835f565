"""row_keys: every row has the keys of the sequence that its token belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import TRITON, random_seeds
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import COLUMNS, SamplingRows
from specengine.ops.backend import Backend

NAMES = ("rows", "q_start", "positions", "logit_rows")
Case = tuple[SamplingRows, Tensor, Tensor, Tensor]


def build_case(q_len: list[int], rows: list[int] | None = None, seed: int = 0) -> Case:
    """Sequences of the given lengths, and the rows of these tokens; all of them by default."""
    generator = torch.Generator().manual_seed(seed)
    count, total = len(q_len), sum(q_len)
    by_sequence = SamplingRows(
        *(
            torch.rand(count, generator=generator)
            if values.is_floating_point()
            else torch.randint(-50, 50, (count,), generator=generator, dtype=values.dtype)
            for values in SamplingRows.empty(count)
        )
    )._replace(seeds=random_seeds(count, seed))
    q_start = torch.tensor([0, *q_len]).cumsum(0).int()
    positions = torch.randint(0, 1000, (total,), generator=generator, dtype=torch.int32)
    logit_rows = torch.arange(total) if rows is None else torch.tensor(rows, dtype=torch.int64)
    return by_sequence, q_start, positions, logit_rows


def check_row_keys(op, case: Case) -> None:
    (actual, decided), (expected, expected_decided) = op(*case), reference.row_keys(*case)
    assert torch.equal(decided, expected_decided)
    assert decided.dtype == torch.int32
    for name, mine, other in zip(COLUMNS, actual, expected, strict=True):
        assert mine.dtype == COLUMNS[name].dtype, name
        assert torch.equal(mine, other), name


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
    q_start = case[1]
    rows = (q_start[1:] - 1)[q_start.diff() > 0].tolist()
    check_row_keys(ops.row_keys, build_case(LENGTHS[name], rows))


def test_no_rows(ops: Backend) -> None:
    for case in (build_case([2, 1], []), build_case([0, 0], []), build_case([], [])):
        rows, positions = ops.row_keys(*case)
        assert {each.shape[0] for each in (*rows, positions)} == {0}


def test_what_it_says(ops: Backend) -> None:
    """Row r decides the position after its token."""
    given, q_start, positions, logit_rows = build_case([2, 0, 3], [1, 3, 4])
    rows, decided = ops.row_keys(given, q_start, positions, logit_rows)
    owner = [0, 2, 2]
    for actual, values in zip(rows, given, strict=True):
        assert torch.equal(actual, values[owner])
    assert decided.tolist() == [int(positions[row]) + 1 for row in (1, 3, 4)]


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
    padded, decided = TRITON.row_keys(*case[:-1], rows, num_rows=torch.tensor([num_rows], dtype=torch.int32))
    expected_rows, expected_decided = reference.row_keys(*case)
    pairs = zip((*padded, decided), (*expected_rows, expected_decided), strict=True)
    for actual, expected in pairs:
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
    rows, decided = TRITON.row_keys(*case[:-2], positions, torch.zeros(3, dtype=torch.int64))
    for actual, values in zip(rows, case[0], strict=True):
        assert torch.equal(actual, values[-1].expand(3))
    assert decided.tolist() == [42] * 3


@pytest.mark.triton
def test_wrong_arguments_are_named() -> None:
    """By Triton: natively this is PyTorch."""
    rows, q_start, positions, logit_rows = build_case([2, 3])
    case = dict(zip(NAMES, (rows, q_start, positions, logit_rows), strict=True))
    wrong = {
        "q_start": {"q_start": q_start.long()},
        "positions": {"positions": positions.long()},
        "logit_rows": {"logit_rows": logit_rows.int()},
    }
    for name, values in zip(COLUMNS, rows, strict=True):
        wrong[name] = {"rows": rows._replace(**{name: values[:1]})}
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TRITON.row_keys(rows._replace(**{name: values.short()}), q_start, positions, logit_rows)
    for name, change in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TRITON.row_keys(*{**case, **change}.values())
    with pytest.raises(ValueError, match="positions: no tokens for 5 logit_rows"):
        TRITON.row_keys(rows, q_start, positions[:0], logit_rows)
    with pytest.raises(ValueError, match="rows: no sequences for 1 logit_rows"):
        TRITON.row_keys(*build_case([], [0]))


FAULTS = {
    "the sequence's before": ("q_start", lambda q_start: (q_start + 1) * (q_start > 0)),
    "the next token's": ("logit_rows", lambda rows: rows.roll(1)),
    "seeds of 32 bits": ("rows", lambda rows: rows._replace(seeds=rows.seeds & 0xFFFFFFFF)),
    "another's rule": ("rows", lambda rows: rows._replace(rule=rows.rule.roll(1))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    name, change = FAULTS[fault]

    def faulty(*arguments):
        given = dict(zip(NAMES, arguments, strict=True))
        return ops.row_keys(*{**given, name: change(given[name])}.values())

    with pytest.raises(AssertionError):
        check_row_keys(faulty, build_case(LENGTHS["ragged"]))
