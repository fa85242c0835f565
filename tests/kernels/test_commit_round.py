"""commit_round: what a round emitted is the sequences' now, and the host can read what it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import NATIVE, TRITON
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.round import NUM_RESULT_COLUMNS
from specengine.ops.backend import Backend

WIDTH = 60
WRITTEN = ("tokens", "seq_len", "length_limit")


@dataclass(frozen=True)
class Case:
    """The arguments of `commit_round`, in order."""

    tokens: Tensor
    seq_len: Tensor
    length_limit: Tensor
    slots: Tensor
    start: Tensor
    is_running: Tensor
    emitted: Tensor
    num_accepted: Tensor
    num_draft: Tensor
    error: Tensor

    def run(self, op) -> dict[str, Tensor]:
        """The record, and what was written, in copies; everything else is as it was."""
        given = {name: value.clone() if name in WRITTEN else value for name, value in vars(self).items()}
        before = {name: value.clone() for name, value in given.items()}
        record = op(*given.values())
        assert all(name in WRITTEN or torch.equal(given[name], value) for name, value in before.items())
        return {"record": record, **{name: given[name] for name in WRITTEN}}


def build_case(count: int, k: int, seed: int = 0) -> Case:
    """Sequences in any slots; one in three does not run, half of these are padding, which shares the last slot. One
    in four has an error."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    num_slots = count + 4
    is_running = (random(3, count) > 0).int()
    slots = torch.randperm(num_slots - 1, generator=generator)[:count].int()
    slots[(is_running == 0) & (random(2, count) == 0)] = num_slots - 1
    seq_len = 2 + random(WIDTH - k - 2, num_slots)
    num_draft = random(k + 1, count)
    return Case(
        random(1000, num_slots, WIDTH),
        seq_len,
        torch.full((num_slots,), 2**31 - 1, dtype=torch.int32),
        slots,
        seq_len[slots.long()],
        is_running,
        1000 + random(1000, count, k + 1),
        (torch.rand(count, generator=generator) * (num_draft + 1)).int(),
        num_draft,
        (random(4, count) == 0).int(),
    )


def check_commit_round(op, case: Case) -> None:
    ours, theirs = case.run(op), case.run(reference.commit_round)
    for name, expected in theirs.items():
        assert ours[name].dtype == torch.int32, name
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    for seed in range(2):
        check_commit_round(ops.commit_round, build_case(count, k, seed))


def test_what_it_says(ops: Backend) -> None:
    """Four rows: one that emits two tokens, one with an error, one that has ended, and padding."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    emitted = torch.arange(8, dtype=torch.int32).view(4, 2) + 10
    case = Case(
        torch.zeros(5, 6, dtype=torch.int32),
        integers(3, 4, 2, 0, 0),
        integers(6, 6, 2, 0, 0),
        integers(1, 0, 2, 4),
        integers(4, 3, 2, 0),
        integers(1, 1, 0, 0),
        emitted,
        integers(1, 1, 1, 1),
        integers(1, 1, 1, 1),
        integers(0, 7, 0, 1),
    )
    result = case.run(ops.commit_round)
    expected = torch.zeros(5, 6, dtype=torch.int32)
    expected[1, 4:] = integers(10, 11)
    assert torch.equal(result["tokens"], expected)
    assert result["seq_len"].tolist() == [3, 6, 2, 0, 0]
    assert result["length_limit"].tolist() == [0, 6, 2, 0, 0]
    assert NUM_RESULT_COLUMNS == 3
    assert result["record"].tolist() == [
        [2, 1, 0, 10, 11],
        [0, 1, 1, 12, 13],
        [0, 0, 0, 14, 15],
        [0, 0, 0, 16, 17],
    ]


def test_nobody_runs(ops: Backend) -> None:
    """Padding's numbers, whatever they are, are not looked at; the state is as it was."""
    case = build_case(9, 4)
    wild = torch.full_like(case.slots, 2**31 - 1)
    wilds = {"slots": wild, "start": -wild, "num_accepted": wild, "num_draft": wild}
    case = replace(case, is_running=torch.zeros_like(wild), **wilds)
    result = case.run(ops.commit_round)
    for name in WRITTEN:
        assert torch.equal(result[name], getattr(case, name)), name
    assert not result["record"][:, :NUM_RESULT_COLUMNS].any()


def test_a_shared_slot_of_padding_is_left_alone(ops: Backend) -> None:
    case = build_case(33, 8, seed=3)
    is_padding = case.slots == case.tokens.shape[0] - 1
    assert is_padding.sum() > 2
    result = case.run(ops.commit_round)
    for name in WRITTEN:
        assert torch.equal(result[name][-1], getattr(case, name)[-1]), name


def test_a_row_can_be_filled_to_its_end(ops: Backend) -> None:
    case = build_case(2, 4)
    full = torch.full_like(case.start, WIDTH - 5)
    ones = torch.ones_like(full)
    case = replace(
        case, start=full, num_accepted=4 * ones, is_running=ones, error=0 * ones, slots=full - WIDTH + 5
    )
    case = replace(case, slots=torch.tensor([0, 3], dtype=torch.int32))
    check_commit_round(ops.commit_round, case)
    result = case.run(ops.commit_round)
    assert torch.equal(result["tokens"][[0, 3], -5:], case.emitted)
    assert torch.equal(result["tokens"][[1, 2]], case.tokens[[1, 2]])


def test_two_rounds_follow_each_other(ops: Backend) -> None:
    """The second begins where the first has ended."""
    case = build_case(9, 4)
    case = replace(case, error=torch.zeros_like(case.error), start=case.start.clamp_max(WIDTH - 10))
    first = case.run(ops.commit_round)
    state = {name: first[name] for name in WRITTEN}
    again = replace(case, **state, start=first["seq_len"][case.slots.long()], num_accepted=case.num_draft)
    check_commit_round(ops.commit_round, again)


def test_rows_of_tokens_may_be_strided(ops: Backend) -> None:
    case = build_case(9, 4)
    wide = torch.full((case.tokens.shape[0], WIDTH + 13), -1, dtype=torch.int32)
    wide[:, :WIDTH] = case.tokens
    expected = case.run(ops.commit_round)
    state = (case.seq_len.clone(), case.length_limit.clone())
    ops.commit_round(wide[:, :WIDTH], *state, *list(vars(case).values())[3:])
    assert torch.equal(wide[:, :WIDTH], expected["tokens"])
    assert (wide[:, WIDTH:] == -1).all()


OUT_OF_RANGE = {
    "slots: 13 at": {"slots": 13},
    "slots: -1 at": {"slots": -1},
    "num_accepted: 5 at": {"num_accepted": 5},
    "num_accepted: -1 at": {"num_accepted": -1},
    "start: -1 at": {"start": -1},
    f"start \\+ num_accepted: {WIDTH} at": {"start": WIDTH - 1, "num_accepted": 1},
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_values_out_of_range(message: str) -> None:
    """Native names them, before anything is written."""
    case = build_case(9, 4)
    last = int(((case.is_running != 0) & (case.error == 0)).nonzero()[-1])
    changed = {name: getattr(case, name).clone() for name in OUT_OF_RANGE[message]}
    for name, value in OUT_OF_RANGE[message].items():
        changed[name][last] = value
    given = {**vars(case), **changed, **{name: getattr(case, name).clone() for name in WRITTEN}}
    with pytest.raises(ValueError, match=message):
        NATIVE.commit_round(*given.values())
    for name in WRITTEN:
        assert torch.equal(given[name], getattr(case, name)), name


@pytest.mark.triton
def test_too_many_accepted_are_as_many_as_there_are() -> None:
    """Triton cannot look at values: it reads and writes nothing that is not there."""
    case = build_case(9, 4)
    wild = replace(case, num_accepted=torch.full_like(case.num_accepted, 99))
    most = replace(case, num_accepted=torch.full_like(case.num_accepted, 4))
    expected = most.run(reference.commit_round)
    for name, value in wild.run(TRITON.commit_round).items():
        assert torch.equal(value, expected[name]), name


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = build_case(4, 3)
    for name in Case.__dataclass_fields__:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            replace(case, **{name: getattr(case, name).long()}).run(ops.commit_round)
        if name not in ("tokens", "slots"):  # which say how many there are
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                replace(case, **{name: getattr(case, name)[:-1]}).run(ops.commit_round)
    with pytest.raises(ValueError, match=r"^seq_len: expected a contiguous tensor"):
        case.run(lambda tokens, seq_len, *rest: ops.commit_round(tokens, seq_len.repeat(2)[::2], *rest))


FAULTS = {
    "the next place": lambda case: {"start": case.start + 1},
    "everybody runs": lambda case: {"is_running": torch.ones_like(case.is_running)},
    "no errors": lambda case: {"error": torch.zeros_like(case.error)},
    "a token more": lambda case: {"num_accepted": (case.num_accepted + 1).minimum(case.num_draft)},
    "another slot": lambda case: {"slots": (case.slots - 1).clamp_min(0)},
    "another token": lambda case: {
        "emitted": case.emitted ^ (torch.arange(case.emitted.shape[1]) == 0).int()
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*arguments):
        case = Case(*arguments)
        return ops.commit_round(*{**vars(case), **FAULTS[fault](case)}.values())

    case = build_case(33, 4)
    with pytest.raises(AssertionError):
        check_commit_round(faulty, replace(case, start=case.start.clamp_max(WIDTH - 6)))
