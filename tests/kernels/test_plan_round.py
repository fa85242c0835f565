"""plan_round: what a round feeds, the same numbers from every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from begin_cases import LARGEST, PlanCase, build_plan

from specengine.kernels import reference
from specengine.kernels.types.round import RoundPlan
from specengine.ops.backend import Backend


def check_plan_round(op, case: PlanCase) -> None:
    ours, theirs = case.run(op), case.run(reference.plan_round)
    assert isinstance(ours, RoundPlan)
    for name, actual, expected in zip(RoundPlan._fields, ours, theirs, strict=True):
        assert actual.dtype == torch.int32, name
        assert actual.is_contiguous(), name
        assert torch.equal(actual, expected.int()), name


@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    check_plan_round(ops.plan_round, build_plan(count, k))


@pytest.mark.parametrize("draft_positions", [0, 1, 8, 30, LARGEST])
def test_a_draft_model_with_fewer_positions_than_the_context(ops: Backend, draft_positions: int) -> None:
    case = build_plan(33, 4, draft_positions)
    check_plan_round(ops.plan_round, case)
    plan = case.run(ops.plan_round)
    last_fed = (plan.draft_start + plan.draft_q_len - 1)[plan.is_drafting != 0]
    assert (last_fed < draft_positions).all()
    assert draft_positions < 8 or plan.num_draft.any()


def test_nobody_runs(ops: Backend) -> None:
    case = build_plan(9, 4)
    case = replace(case, length_limit=case.seq_len.clone())
    check_plan_round(ops.plan_round, case)
    plan = case.run(ops.plan_round)
    assert not any(
        each.any() for each in (plan.is_running, plan.num_draft, plan.draft_q_len, plan.is_drafting)
    )


def test_what_it_says(ops: Backend) -> None:
    """Four sequences of 10 tokens: one that may, one that may have 3 more, one that has ended, one that asks for 1."""
    numbers = [[0, 1, 2, 3], [10] * 4, [LARGEST, 13, 10, 20], [5, 5, 5, 1]]
    slots, seq_len, length_limit, asked = (torch.tensor(each, dtype=torch.int32) for each in numbers)
    plan = ops.plan_round(slots, seq_len, length_limit, asked, 3, 100)
    assert plan.seq_len.tolist() == [10] * 4
    assert plan.last_position.tolist() == [9] * 4
    assert plan.is_running.tolist() == [1, 1, 0, 1]
    assert plan.num_draft.tolist() == [3, 2, 0, 1]
    assert plan.draft_start.tolist() == [[8] * 4, [10] * 4, [11] * 4]
    assert plan.draft_q_len.tolist() == [[2, 2, 0, 2], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert plan.is_drafting.tolist() == [[1, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_the_largest_numbers_do_not_wrap_round(ops: Backend) -> None:
    columns = [[0, 1, 2], [1, LARGEST - 1, LARGEST], [LARGEST] * 3, [LARGEST, LARGEST, -LARGEST]]
    slots, seq_len, length_limit, asked = (torch.tensor(each, dtype=torch.int32) for each in columns)
    case = PlanCase(slots, seq_len, length_limit, asked, 4, LARGEST)
    check_plan_round(ops.plan_round, case)
    plan = case.run(ops.plan_round)
    assert (plan.is_running.tolist(), plan.num_draft.tolist()) == ([1, 1, 0], [4, 0, 0])
    # Where int32 arithmetic, the reference's, would wrap.
    empty = replace(case, slots=slots[:1], seq_len=torch.zeros_like(seq_len))
    assert empty.run(ops.plan_round).num_draft.tolist() == [4]


def test_every_step_of_a_round_feeds_what_the_next_needs(ops: Backend) -> None:
    """Forward i feeds position seq_len + i - 1 last, and draws seq_len + i."""
    plan = build_plan(33, 8).run(ops.plan_round)
    for step in range(8):
        is_drafting = plan.is_drafting[step] != 0
        end = plan.draft_start[step] + plan.draft_q_len[step]
        assert torch.equal(end[is_drafting], (plan.seq_len + step)[is_drafting])


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = build_plan(4, 2)
    wrong = {
        "slots: expected": {"slots": case.slots.long()},
        "seq_len: expected": {"seq_len": case.seq_len.long()},
        "length_limit: expected": {"length_limit": case.length_limit[:-1]},
        "num_speculative: expected": {"num_speculative": case.num_speculative.float()},
        "k: -1": {"k": -1},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(ops.plan_round)
    if ops.name == "native":
        with pytest.raises(ValueError, match="slots: 40 at index 1 is outside 0 … 39"):
            ops.plan_round(torch.tensor([0, 40], dtype=torch.int32), *list(vars(case).values())[1:])


FAULTS = {
    "one position more": lambda case: replace(case, draft_positions=case.draft_positions + 1),
    "one token more": lambda case: replace(case, length_limit=(case.length_limit.long() + 1).int()),
    "another slot": lambda case: replace(case, slots=(case.slots - 1).clamp_min(0)),
    "a draft less": lambda case: replace(case, num_speculative=case.num_speculative - 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*arguments):
        return ops.plan_round(*vars(FAULTS[fault](PlanCase(*arguments))).values())

    with pytest.raises(AssertionError):
        check_plan_round(faulty, build_plan(33, 4, draft_positions=30))
