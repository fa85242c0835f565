"""begin_round: what plan_round and then begin_forward give, from one op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from begin_cases import (
    BLOCK_SIZE,
    LARGEST,
    NUM_SLOTS,
    NUM_TOKENS,
    build_plan,
    flat,
    random_rows_of,
    random_tables,
)
from kernel_cases import DTYPES, TRITON
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.round import RoundPlan
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend

MAX_SEQ_LEN = 64
BeginRound = Callable[..., tuple[RoundPlan, ForwardStart]]


@dataclass(frozen=True)
class Case:
    """The arguments of `begin_round`, in order."""

    tokens: Tensor
    block_table: Tensor
    slots: Tensor
    seq_len: Tensor
    length_limit: Tensor
    num_speculative: Tensor
    k: int
    draft_positions: int
    num_fed: int
    block_size: int
    rows: SamplingRows
    token_table: Tensor
    position_table: Tensor | None

    @property
    def plan(self) -> tuple[Any, ...]:
        """The arguments of `plan_round`."""
        state = (self.slots, self.seq_len, self.length_limit, self.num_speculative)
        return *state, self.k, self.draft_positions

    def run(self, op: BeginRound) -> tuple[RoundPlan, ForwardStart]:
        arguments = [getattr(self, name) for name in self.__dataclass_fields__]
        before = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        result = op(*arguments)
        for now, then in zip(arguments, before, strict=True):
            assert now is then or torch.equal(now, then)
        return result


def given(
    count: int,
    k: int,
    num_fed: int,
    *,
    draft_positions: int = 1024,
    dtype: torch.dtype = torch.float32,
    width: int = 40,
    has_positions: bool = True,
) -> Case:
    """The sequences of `plan_round`'s cases, with the tables of `begin_forward`'s."""
    state = build_plan(count, k, draft_positions)
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(NUM_TOKENS, (NUM_SLOTS, MAX_SEQ_LEN), generator=generator, dtype=torch.int32)
    max_blocks = MAX_SEQ_LEN // BLOCK_SIZE
    block_table = torch.randperm(NUM_SLOTS * max_blocks, generator=generator).view(NUM_SLOTS, -1).int()
    tables = random_tables(dtype, width, has_positions=has_positions)
    where = (tokens, block_table, *vars(state).values(), num_fed, BLOCK_SIZE)
    return Case(*where, random_rows_of(count), *tables)


def check_begin_round(op: BeginRound, case: Case) -> None:
    """The plan, and of a start that has room for more rows, those that there are."""
    (plan, start), (true_plan, true_start) = case.run(op), case.run(reference.begin_round)
    for name, actual, expected in zip(RoundPlan._fields, plan, true_plan, strict=True):
        assert actual.dtype == torch.int32, name
        assert actual.is_contiguous(), name
        assert torch.equal(actual, expected.int()), name
    for place, (actual, expected) in enumerate(zip(flat(start), flat(true_start), strict=True)):
        assert actual.dtype == expected.dtype, place
        assert torch.equal(actual[: expected.shape[0]], expected), place


@pytest.mark.parametrize("num_fed", [1, 2])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int, num_fed: int) -> None:
    check_begin_round(ops.begin_round, given(count, k, num_fed))


@pytest.mark.parametrize("num_fed", [1, 2])
@pytest.mark.parametrize("k", [0, 4])
def test_it_is_the_two_ops(ops: Backend, k: int, num_fed: int) -> None:
    """Of any backend's own, from the plan alone."""
    case = given(9, k, num_fed)
    plan, start = case.run(ops.begin_round)
    true_plan = ops.plan_round(*case.plan)
    assert all(map(torch.equal, plan, true_plan))
    wanted = true_plan.is_drafting[0] if k else true_plan.is_running
    where = (case.tokens, case.block_table, case.slots, true_plan.seq_len - num_fed, num_fed * wanted, wanted)
    expected = ops.begin_forward(*where, BLOCK_SIZE, case.rows, case.token_table, case.position_table)
    assert expected.token_ids.numel()
    for ours, theirs in zip(flat(start), flat(expected), strict=True):
        assert torch.equal(ours[: theirs.shape[0]], theirs)
    if k:
        first = true_plan.last_position if num_fed == 1 else true_plan.draft_start[0]
        assert torch.equal(first, where[3])
        assert num_fed == 1 or torch.equal(true_plan.draft_q_len[0], where[4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_positions", [True, False])
def test_every_type_and_width(ops: Backend, dtype: torch.dtype, has_positions: bool) -> None:
    for width in (1, 33, 768):
        case = given(2, 3, 2, dtype=dtype, width=width, has_positions=has_positions)
        check_begin_round(ops.begin_round, case)


@pytest.mark.parametrize("draft_positions", [0, 1, 8, 30, LARGEST])
def test_a_draft_model_with_fewer_positions_than_the_context(ops: Backend, draft_positions: int) -> None:
    case = given(33, 4, 2, draft_positions=draft_positions)
    check_begin_round(ops.begin_round, case)
    plan, start = case.run(ops.begin_round)
    num_fed = int(start.q_start[-1])
    assert num_fed == 2 * int(plan.is_drafting[0].sum())
    assert (start.positions[:num_fed] < draft_positions).all()
    assert draft_positions < 8 or num_fed


@pytest.mark.parametrize("k", [0, 4])
def test_nobody_runs(ops: Backend, k: int) -> None:
    case = given(9, k, 1)
    case = replace(case, length_limit=case.seq_len.clone())
    check_begin_round(ops.begin_round, case)
    plan, start = case.run(ops.begin_round)
    assert not any(each.any() for each in (plan.is_running, plan.num_draft, start.q_start, start.context_len))


@pytest.mark.triton
@pytest.mark.parametrize("num_fed", [1, 2])
@pytest.mark.parametrize("k", [0, 4])
def test_there_is_room_for_every_sequence(k: int, num_fed: int) -> None:
    """Logit rows of padding are 0 and have the keys of some sequence: nothing that is read there is wild."""
    case = given(9, k, num_fed)
    (_, roomy), (_, exact) = case.run(TRITON.begin_round), case.run(reference.begin_round)
    assert (roomy.token_ids.numel(), roomy.logit_rows.numel()) == (9 * num_fed, 9)
    count = exact.logit_rows.numel()
    assert count < 9
    assert not roomy.logit_rows[count:].any()
    assert roomy.row_keys is not None
    for values, known in zip(roomy.row_keys[0], case.rows, strict=True):
        assert torch.isin(values[count:], known).all()


def test_the_largest_limits_do_not_wrap_round(ops: Backend) -> None:
    """Nobody may draft more than there is room for below 2**31, and nobody runs there."""
    case = given(3, 4, 1)
    columns = [[0, 1, 2], [1, 5, LARGEST], [LARGEST] * 3, [LARGEST, 2, -LARGEST]]
    slots, seq_len, length_limit, asked = (torch.tensor(each, dtype=torch.int32) for each in columns)
    case = replace(case, slots=slots, seq_len=seq_len, length_limit=length_limit, num_speculative=asked)
    case = replace(case, draft_positions=LARGEST)
    for k in (0, 4):
        case = replace(case, k=k)
        check_begin_round(ops.begin_round, case)
        plan, start = case.run(ops.begin_round)
        assert (plan.is_running.tolist(), plan.num_draft.tolist()) == ([1, 1, 0], [min(4, k), min(2, k), 0])
        assert start.positions[:2].tolist() == [0, 4]


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = given(4, 2, 2)
    wrong: dict[str, dict[str, Any]] = {
        "slots: expected": {"slots": case.slots.long()},
        "seq_len: expected": {"seq_len": case.seq_len.long()},
        "length_limit: expected": {"length_limit": case.length_limit[:-1]},
        "num_speculative: expected": {"num_speculative": case.num_speculative.float()},
        "k: -1": {"k": -1},
        "num_fed: 0": {"num_fed": 0},
        "tokens: expected": {"tokens": case.tokens.long()},
        "temperature: expected": {"rows": case.rows._replace(temperature=case.rows.temperature.int())},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(ops.begin_round)


FAULTS: dict[str, Callable[[Case], Case]] = {
    "one position more": lambda case: replace(case, draft_positions=case.draft_positions + 1),
    "one token more": lambda case: replace(case, length_limit=(case.length_limit.long() + 1).int()),
    "another slot": lambda case: replace(case, slots=(case.slots - 1).clamp_min(0)),
    "a draft less": lambda case: replace(case, num_speculative=case.num_speculative - 1),
    "a token less": lambda case: replace(case, num_fed=1),
    "another sequence's seed": lambda case: replace(
        case, rows=case.rows._replace(seeds=case.rows.seeds.flip(0))
    ),
    "no positions": lambda case: replace(case, position_table=None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*arguments: Any) -> tuple[RoundPlan, ForwardStart]:
        return ops.begin_round(*vars(FAULTS[fault](Case(*arguments))).values())

    with pytest.raises((AssertionError, RuntimeError)):
        check_begin_round(faulty, given(33, 4, 2, draft_positions=30))
