"""match_draws: the longest prefix that the target has drawn too, then the target's next token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import NATIVE, TRITON, random_logits, random_seeds, unfiltered_stats
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend

UNTOUCHED = -77


@dataclass(frozen=True)
class Case:
    """What `match_draws` is given."""

    drawn: Tensor
    drawn_error: Tensor
    row_start: Tensor
    num_draft: Tensor
    draft_tokens: Tensor
    is_running: Tensor
    forced_acceptance: float | None = None
    seeds: Tensor | None = None
    seq_len: Tensor | None = None

    def run(self, op) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, num_accepted and error, UNTOUCHED where they were left alone."""
        count, k = self.draft_tokens.shape
        outputs = tuple(
            torch.full(shape, UNTOUCHED, dtype=torch.int32) for shape in ((count, k + 1), (count,), (count,))
        )
        fields = [each for each in vars(self).values() if isinstance(each, Tensor)]
        before = [each.clone() for each in fields]
        assert op(*self.arguments, Verdict(*outputs), self.forced_acceptance) is None
        assert all(map(torch.equal, fields, before))
        return outputs

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Drafts, SamplingRows, Tensor]:
        count = self.row_start.numel()
        nobody = SamplingRows.empty(count)
        rows = nobody._replace(rule=nobody.rule + 1, seeds=nobody.seeds if self.seeds is None else self.seeds)
        seq_len = (
            torch.zeros_like(self.row_start, dtype=torch.int32) if self.seq_len is None else self.seq_len
        )
        drafts = Drafts(self.row_start, seq_len, self.num_draft, self.draft_tokens)
        return self.drawn, self.drawn_error, drafts, rows, self.is_running


def build_case(count: int, k: int, seed: int = 0) -> Case:
    """Sequences with 0 … k draft tokens whose rows lie anywhere, with gaps; drafts agree with the draws with
    probability 0.7, one row in ten is an error, and one sequence in five does not run."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    num_draft = random(k + 1, count)
    order = torch.randperm(count, generator=generator)
    row_start = torch.empty(count, dtype=torch.int32)
    row_start[order] = ((num_draft + 2)[order].cumsum(0) - (num_draft + 2)[order]).int()
    num_rows = int((num_draft + 2).sum())
    drawn = random(50000, num_rows)
    rows = row_start[:, None] + torch.arange(k).minimum(num_draft[:, None])
    is_copied = torch.rand(count, k, generator=generator) < 0.7
    draft_tokens = torch.where(is_copied, drawn[rows.long()], random(50000, count, k))
    drawn_error = (random(10, num_rows) == 0).int()
    return Case(drawn, drawn_error, row_start, num_draft, draft_tokens, (random(5, count) > 0).int())


def forced(case: Case, acceptance: float, seed: int = 1) -> Case:
    count = case.row_start.numel()
    seq_len = torch.randint(10000, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return replace(case, forced_acceptance=acceptance, seeds=random_seeds(count, seed), seq_len=seq_len)


def check_match_draws(op, case: Case) -> None:
    names = ("tokens", "num_accepted", "error")
    for name, actual, expected in zip(names, case.run(op), case.run(reference.match_draws), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    for seed in range(3):
        check_match_draws(ops.match_draws, build_case(count, k, seed))


@pytest.mark.parametrize(("count", "k"), [(1, 0), (1, 1), (2, 8), (9, 4), (33, 8)])
def test_a_forced_acceptance_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    for seed, acceptance in enumerate((0.0, 0.7, 1)):
        check_match_draws(ops.match_draws, forced(build_case(count, k, seed), acceptance, seed))


def test_a_forced_acceptance_is_compared_with_fp32_that_is_rounded_once(ops: Backend) -> None:
    """With the very numbers that are drawn, those that rounding twice would make smaller."""
    count = 4000
    case = forced(build_case(count, 1), 0.5)
    bits = rng.accept_bits(case.seeds, case.seq_len, case.seq_len)
    uniform = rng.uniform(bits)
    chosen = ((bits.float() + 0.5) * 2.0**-32 != uniform).nonzero()[:4, 0]
    ones = torch.ones(4, dtype=torch.int32)
    case = Case(
        case.drawn[:8],
        case.drawn_error[:8],
        torch.arange(0, 8, 2, dtype=torch.int32),
        ones,
        case.draft_tokens[:4],
        ones,
        seeds=case.seeds[chosen],
        seq_len=case.seq_len[chosen],
    )
    for value in uniform[chosen]:
        for acceptance in (value, torch.nextafter(value, torch.tensor(2.0))):
            _, num_accepted, _ = replace(case, forced_acceptance=float(acceptance)).run(ops.match_draws)
            assert torch.equal(num_accepted, (uniform[chosen] < acceptance).int())


def test_what_a_forced_acceptance_is(ops: Backend) -> None:
    """All at one end, nothing at the other, and in between the share of first drafts that are kept."""
    case = forced(build_case(2000 if ops is NATIVE else 9, 2), 0.7)
    case = replace(case, is_running=torch.ones_like(case.num_draft))
    assert torch.equal(replace(case, forced_acceptance=1.5).run(ops.match_draws)[1], case.num_draft)
    assert not replace(case, forced_acceptance=0.0).run(ops.match_draws)[1].any()
    if ops is NATIVE:
        is_first_kept = case.run(ops.match_draws)[1][case.num_draft > 0] > 0
        assert abs(float(is_first_kept.float().mean()) - 0.7) < 0.04


def test_equals_match_verify(ops: Backend) -> None:
    """Where the draws are those of `head_draw` on the same logits: here, `sample_rows`."""
    count, k = 12, 4
    logits, seeds = random_logits(count * (k + 1), 64), random_seeds(count)
    temperature = torch.tensor([0.0, 1.0, 0.7]).repeat(4)
    stats = unfiltered_stats(logits, temperature.repeat_interleave(k + 1))
    seq_len = torch.arange(100, 100 + count, dtype=torch.int32)
    positions = (seq_len[:, None] + torch.arange(k + 1)).flatten().int()
    rows = SamplingRows.empty(count)._replace(temperature=temperature, seeds=seeds)
    of_rows = rows.take(torch.arange(count).repeat_interleave(k + 1))
    noise = (positions, rng.STREAM_TARGET, torch.zeros_like(positions))
    drawn, _ = NATIVE.sample_rows(logits, stats, of_rows, *noise)
    case = build_case(count, k)
    row_start = torch.arange(count, dtype=torch.int32) * (k + 1)
    is_copied = torch.rand(count, k, generator=torch.Generator().manual_seed(0)) < 0.7
    draft_tokens = torch.where(is_copied, drawn.view(count, k + 1)[:, :k], 0).int()
    case = replace(
        case, drawn=drawn, drawn_error=stats[:, 3].int(), row_start=row_start, draft_tokens=draft_tokens
    )
    results = case.run(ops.match_draws)
    expected = tuple(torch.full_like(result, UNTOUCHED) for result in results)
    drafts = Drafts(row_start, seq_len, case.num_draft, draft_tokens)
    NATIVE.match_verify(logits, stats, drafts, rows, case.is_running, Verdict(*expected))
    assert all(map(torch.equal, results, expected))
    assert 0 < results[1][case.is_running != 0].float().mean() < k


def test_nobody_runs(ops: Backend) -> None:
    """Padding's numbers, whatever they are, are not looked at."""
    case = build_case(9, 4)
    wild = torch.full_like(case.row_start, 2**31 - 1)
    case = replace(case, is_running=torch.zeros_like(wild), row_start=wild, num_draft=-wild)
    for output in case.run(ops.match_draws):
        assert (output == UNTOUCHED).all()


def test_perfect_drafts_are_accepted_and_wrong_ones_stop_where_they_are_wrong(ops: Backend) -> None:
    case = build_case(9, 8)
    rows = (case.row_start[:, None] + torch.arange(9).minimum(case.num_draft[:, None])).long()
    perfect = replace(case, draft_tokens=case.drawn[rows][:, :8].contiguous(), is_running=case.num_draft + 1)
    tokens, num_accepted, _ = perfect.run(ops.match_draws)
    assert torch.equal(num_accepted, case.num_draft)
    is_emitted = torch.arange(9) <= case.num_draft[:, None]
    assert torch.equal(tokens, torch.where(is_emitted, case.drawn[rows], UNTOUCHED))
    for at in range(8):
        wrong = perfect.draft_tokens.clone()
        wrong[:, at] += 1
        _, num_accepted, _ = replace(perfect, draft_tokens=wrong).run(ops.match_draws)
        assert torch.equal(num_accepted, case.num_draft.clamp_max(at))


def test_bad_rows_set_the_error_only_where_they_were_used(ops: Backend) -> None:
    """Rows 0 … 2 are one sequence's, whose second draft is wrong."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    case = Case(
        integers(5, 6, 7), integers(0, 0, 1), integers(0), integers(2), integers(5, 9)[None], integers(1)
    )
    tokens, num_accepted, error = case.run(ops.match_draws)
    assert (tokens.tolist(), num_accepted.tolist(), error.tolist()) == ([[5, 6, UNTOUCHED]], [1], [0])
    _, _, error = replace(case, drawn_error=integers(0, 8, 0)).run(ops.match_draws)
    assert error.tolist() == [1]
    used = replace(case, draft_tokens=integers(5, 6)[None])
    tokens, num_accepted, error = used.run(ops.match_draws)
    assert (tokens.tolist(), num_accepted.tolist(), error.tolist()) == ([[5, 6, 7]], [2], [1])


OUT_OF_RANGE = {
    "row_start: 999": ("row_start", 999),
    "row_start: -1": ("row_start", -1),
    "num_draft: 5": ("num_draft", 5),
    "num_draft: -1": ("num_draft", -1),
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_values_out_of_range(ops: Backend, message: str) -> None:
    """Native names them; Triton, which cannot look, reads and writes nothing that is not there."""
    name, value = OUT_OF_RANGE[message]
    case = build_case(9, 4)
    case = replace(case, **{name: torch.full_like(case.num_draft, value)})
    is_running = case.is_running != 0
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(ops.match_draws)
        return
    tokens, num_accepted, _ = case.run(ops.match_draws)
    assert (num_accepted[is_running] >= 0).all()
    assert (num_accepted[is_running] <= case.num_draft.clamp(0, 4)[is_running]).all()
    is_written = (torch.arange(5) <= num_accepted[:, None]) & is_running[:, None]
    assert (tokens[is_written] >= 0).all()
    assert (tokens[~is_written] == UNTOUCHED).all()


def test_the_last_row_may_be_one_that_is_not_there() -> None:
    case = build_case(1, 4)
    one = torch.ones_like(case.num_draft)
    case = replace(case, row_start=one, num_draft=4 * one, is_running=one, drawn=case.drawn[:2])
    case = replace(case, drawn_error=case.drawn_error[:2])
    with pytest.raises(ValueError, match="row_start \\+ num_draft: 5 at index 0 is outside 0 … 1"):
        case.run(NATIVE.match_draws)


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = forced(build_case(4, 3), 0.5)
    wrong = {
        "drawn: expected": {"drawn": case.drawn.long()},
        "drawn_error: expected": {"drawn_error": case.drawn_error[:-1]},
        "row_start: expected": {"row_start": case.row_start.long()},
        "num_draft: expected": {"num_draft": case.num_draft[:-1]},
        "draft_tokens: expected": {"draft_tokens": case.draft_tokens.long()},
        "is_running: expected": {"is_running": case.is_running.bool()},
        "seeds: expected": {"seeds": case.seeds.int()},
        "seq_len: expected": {"seq_len": case.seq_len.long()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            replace(case, **change).run(ops.match_draws)
    outputs = {"tokens": (4, 3), "num_accepted": (3,), "error": (5,)}
    right = {"tokens": (4, 4), "num_accepted": (4,), "error": (4,)}
    for name, shape in outputs.items():
        given = [torch.zeros(each, dtype=torch.int32) for each in {**right, name: shape}.values()]
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ops.match_draws(*case.arguments, Verdict(*given))


@pytest.mark.triton
def test_a_batch_without_rows() -> None:
    case = build_case(2, 1)
    with pytest.raises(ValueError, match="drawn: no rows for 2 sequences"):
        replace(case, drawn=case.drawn[:0], drawn_error=case.drawn[:0]).run(TRITON.match_draws)


FAULTS = {
    "the row before": lambda case: {"row_start": (case.row_start - 1).clamp_min(0)},
    "everybody runs": lambda case: {"is_running": torch.ones_like(case.is_running)},
    "a draft less": lambda case: {"num_draft": (case.num_draft - 1).clamp_min(0)},
    "no errors": lambda case: {"drawn_error": torch.zeros_like(case.drawn_error)},
}
FORCED_FAULTS = {
    "position": lambda case: {"seq_len": case.seq_len + 1},
    "seed": lambda case: {"seeds": case.seeds & 0xFFFFFFFF},
    "not forced": lambda case: {"forced_acceptance": None},
}


@pytest.mark.parametrize("fault", [*FAULTS, *FORCED_FAULTS])
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    case = build_case(33, 4)
    if fault in FORCED_FAULTS:
        case = forced(case, 0.5)

    def faulty(*given):
        wrong = replace(case, **{**FAULTS, **FORCED_FAULTS}[fault](case))
        ops.match_draws(*wrong.arguments, given[5], wrong.forced_acceptance)

    with pytest.raises(AssertionError):
        check_match_draws(faulty, case)
