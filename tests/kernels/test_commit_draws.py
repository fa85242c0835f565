"""commit_draws: what match_draws and commit_round do with the target's draws, from one op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import TRITON, random_seeds
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.round import NUM_RESULT_COLUMNS
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend

UNTOUCHED, WIDTH = -77, 60
STATE = ("tokens", "seq_len", "length_limit")
CommitDraws = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """What `commit_draws` is given, verdict apart. state: tokens, seq_len, length_limit"""

    drawn: Tensor
    drawn_error: Tensor
    drafts: Drafts
    seeds: Tensor
    is_running: Tensor
    state: tuple[Tensor, Tensor, Tensor]
    slots: Tensor
    forced_acceptance: float | None = None

    def run(self, op: CommitDraws) -> dict[str, Tensor]:
        """The record as far as it says something, the verdict, UNTOUCHED where that was left alone, and the state."""
        count, k = self.drafts.tokens.shape
        shapes = ((count, k + 1), (count,), (count,))
        verdict = Verdict(*(torch.full(shape, UNTOUCHED, dtype=torch.int32) for shape in shapes))
        state = [each.clone() for each in self.state]
        rows = SamplingRows.empty(count)._replace(seeds=self.seeds)
        judged = (self.drawn, self.drawn_error, self.drafts, rows, self.is_running, verdict)
        fields = [self.drawn, self.drawn_error, *self.drafts[:4], self.is_running, self.slots]
        before = [each.clone() for each in fields]
        record = op(*judged, *state, self.slots, self.forced_acceptance)
        assert all(map(torch.equal, fields, before))
        is_said = torch.arange(k + 1) < record[:, :1]
        said = torch.where(is_said, record[:, NUM_RESULT_COLUMNS:], UNTOUCHED)
        found = {"columns": record[:, :NUM_RESULT_COLUMNS], "emitted": said}
        left = {f"state {name}": each for name, each in zip(STATE, state, strict=True)}
        return {**found, **verdict._asdict(), **left}


def build_case(count: int, k: int, seed: int = 0, acceptance: float | None = None) -> Case:
    """Sequences in any slots with 0 … k drafts, which agree with the draws with probability 0.7; one row in twenty is
    an error, one sequence in five does not run, and half of these are padding, in the last slot."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    num_slots, num_draft, is_running = count + 3, random(k + 1, count), (random(5, count) > 0).int()
    slots = torch.randperm(num_slots - 1, generator=generator)[:count].int()
    slots[(is_running == 0) & (random(2, count) == 0)] = num_slots - 1
    row_start = ((num_draft + 1).cumsum(0) - num_draft - 1).int()
    num_rows = int((num_draft + 1).sum())
    drawn = random(50000, num_rows)
    rows = (row_start[:, None] + torch.arange(k).minimum(num_draft[:, None])).clamp_max(max(0, num_rows - 1))
    is_copied = torch.rand(count, k, generator=generator) < 0.7
    tokens = torch.where(is_copied, drawn[rows.long()], random(50000, count, k))
    seq_len = 2 + random(WIDTH - k - 3, num_slots)
    state = (random(1000, num_slots, WIDTH), seq_len, torch.full_like(seq_len, 2**31 - 1))
    drafts = Drafts(row_start, seq_len[slots.long()], num_draft, tokens)
    error = (random(20, num_rows) == 0).int()
    return Case(drawn, error, drafts, random_seeds(count, seed), is_running, state, slots, acceptance)


def check_commit_draws(op: CommitDraws, case: Case) -> None:
    results, expected = case.run(op), case.run(reference.commit_draws)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    for seed, acceptance in enumerate((None, None, 0.7)):
        check_commit_draws(ops.commit_draws, build_case(count, k, seed, acceptance))


def test_the_cases_have_every_outcome() -> None:
    """Accepted, rejected, an error and one that does not run."""
    case = build_case(33, 4)
    found = case.run(reference.commit_draws)
    ran = case.is_running != 0
    num_accepted = found["num_accepted"][ran]
    assert 0 < num_accepted.float().mean() < case.drafts.num_draft[ran].float().mean()
    assert found["error"][ran].any()
    assert not ran.all()
    assert (found["columns"][ran, 0] == 0).any()


def test_it_is_the_two_ops(ops: Backend) -> None:
    def apart(
        drawn: Tensor,
        error: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
        *rest,
    ) -> Tensor:
        tokens, seq_len, length_limit, slots, forced_acceptance = rest
        ops.match_draws(drawn, error, drafts, rows, is_running, verdict, forced_acceptance)
        state = (tokens, seq_len, length_limit, slots, drafts.seq_len, is_running)
        judged = [
            torch.where(is_running.bool(), each, 0)
            for each in (verdict.num_accepted, drafts.num_draft, verdict.error)
        ]
        return ops.commit_round(*state, verdict.tokens, *judged)

    case = build_case(33, 4)
    joined, expected = case.run(ops.commit_draws), case.run(apart)
    assert all(torch.equal(joined[name], value) for name, value in expected.items())


@pytest.mark.triton
def test_nobody_runs() -> None:
    """Padding's numbers, whatever they are, are not looked at; the state is as it was."""
    case = build_case(9, 4)
    wild = torch.full_like(case.slots, 2**31 - 1)
    drafts = case.drafts._replace(row_start=wild, seq_len=-wild, num_draft=wild)
    case = replace(case, is_running=torch.zeros_like(wild), drafts=drafts, slots=wild)
    found = case.run(TRITON.commit_draws)
    for name, before in zip(STATE, case.state, strict=True):
        assert torch.equal(found[f"state {name}"], before), name
    assert not found["columns"].any()
    assert all((found[name] == UNTOUCHED).all() for name in ("tokens", "num_accepted", "error"))


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = build_case(4, 3)
    tokens, seq_len, length_limit = case.state
    wrong = {
        "drawn: expected": {"drawn": case.drawn.long()},
        "num_draft: expected": {"drafts": case.drafts._replace(num_draft=case.drafts.num_draft[:-1])},
        "is_running: expected": {"is_running": case.is_running.bool()},
        "seeds: expected": {"seeds": case.seeds.int()},
        "tokens: expected": {"state": (tokens.long(), seq_len, length_limit)},
        "seq_len: expected": {"state": (tokens, seq_len[:-1], length_limit)},
        "slots: expected": {"slots": case.slots.long()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            replace(case, **change).run(ops.commit_draws)


FAULTS = {
    "the row before": lambda case: {
        "drafts": case.drafts._replace(row_start=(case.drafts.row_start - 1).clamp_min(0))
    },
    "the next place": lambda case: {"drafts": case.drafts._replace(seq_len=case.drafts.seq_len + 1)},
    "everybody runs": lambda case: {"is_running": torch.ones_like(case.is_running)},
    "no errors": lambda case: {"drawn_error": torch.zeros_like(case.drawn_error)},
    "another slot": lambda case: {"slots": (case.slots - 1).clamp_min(0)},
    "forced": lambda case: {"forced_acceptance": 0.5},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    case = build_case(33, 4)
    wrong, expected = (
        replace(case, **FAULTS[fault](case)).run(ops.commit_draws),
        case.run(reference.commit_draws),
    )
    assert not all(torch.equal(wrong[name], value) for name, value in expected.items())
