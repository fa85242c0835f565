"""threshold_verify and typical_verify, the lossy rules: float64's decisions, each row with numbers of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from judged_drafts import OFF, UNTOUCHED, Case, Decision, Exact, build_case, check_decisions, filtered
from kernel_cases import NATIVE, NEGATIVE_INFINITY, TRITON, VOCABULARIES, native_threads
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

# float64 decides against fp32 logits near -60 where its margin is larger than this.
MARGIN = 2e-4
FILTERS = [(OFF, OFF), ((12, 0.95, 0.0), (0, 0.9, 0.0))]


def least_likely(case: Case, exact: Exact) -> Tensor:
    """`[B, k]`, the logarithm that a draft's probability has to exceed."""
    return case.acceptance_threshold.double().log()[:, None].expand_as(exact.log_p_drafted)


def least_typical(case: Case, exact: Exact) -> Tensor:
    """The same, lower where the target is uncertain."""
    log_p = exact.log_p[:, :-1]
    entropy = -torch.where(log_p == NEGATIVE_INFINITY, 0.0, log_p.exp() * log_p).sum(dim=2)
    return (case.acceptance_delta.double().log()[:, None] - entropy).minimum(least_likely(case, exact))


def ask_for_certainty(rows: SamplingRows, column: str) -> SamplingRows:
    return rows._replace(**{column: torch.ones_like(getattr(rows, column))})


def ask_all_for_the_firsts(rows: SamplingRows) -> SamplingRows:
    first = rows.acceptance_threshold[:1].expand(len(rows.seeds)).contiguous()
    return rows._replace(acceptance_threshold=first)


@dataclass(frozen=True)
class LossyRule:
    """A rule under test.

    bound:      what a draft's log-probability has to exceed
    thresholds: smallest and largest `acceptance_threshold` of a case
    faults:     what may go wrong with the numbers that it reads
    """

    rule: Rule
    bound: Callable[[Case, Exact], Tensor]
    thresholds: tuple[float, float]
    faults: dict[str, Callable[[SamplingRows], SamplingRows]]

    def op(self, ops: object) -> Callable[..., None]:
        return getattr(ops, self.rule.op)

    def build_case(self, *given, seed: int = 0, **named) -> Case:
        case = build_case(*given, seed=seed, rule=self.rule, **named)
        generator = torch.Generator().manual_seed(seed + 1)
        low, high = self.thresholds
        threshold = low + (high - low) * torch.rand(len(case.seeds), generator=generator)
        delta = torch.rand(len(case.seeds), generator=generator)
        return replace(case, acceptance_threshold=threshold, acceptance_delta=delta)

    def judge(self, case: Case, exact: Exact) -> Decision:
        """The first draft that does not exceed the bound; what follows is drawn from p."""
        slack = exact.log_p_drafted - self.bound(case, exact)
        is_accepted = (slack > 0) & exact.is_drafted
        n = is_accepted.int().cumprod(dim=1).sum(dim=1)
        is_looked_at = exact.is_drafted & (torch.arange(slack.shape[1])[None] <= n[:, None])
        is_clear = ~((slack.abs() < MARGIN) & is_looked_at).any(dim=1)
        return Decision(n, is_clear, exact.log_p[torch.arange(len(n)), n])

    def check_against_float64(self, op: Callable[..., None], case: Case) -> None:
        check_decisions(op, case, lambda exact: self.judge(case, exact))


THRESHOLD = LossyRule(
    Rule.THRESHOLD, least_likely, (0.0, 0.3), {"everybody's threshold": ask_all_for_the_firsts}
)
TYPICAL = LossyRule(
    Rule.TYPICAL,
    least_typical,
    (0.02, 0.22),
    {
        "no entropy": lambda rows: ask_for_certainty(rows, "acceptance_delta"),
        "no epsilon": lambda rows: ask_for_certainty(rows, "acceptance_threshold"),
    },
)
RULES = [THRESHOLD, TYPICAL]


@pytest.fixture(params=RULES, ids=lambda lossy: lossy.rule.name.lower())
def lossy(request: pytest.FixtureRequest) -> LossyRule:
    return request.param


@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("has_law", [True, False])
def test_random_cases(lossy: LossyRule, ops: Backend, settings: tuple, has_law: bool) -> None:
    sizes = ((1200, 5, 40, 1), (600, 3, 131, 2)) if ops is NATIVE else ((24, 5, 40, 3),)
    for count, k, vocab_size, seed in sizes:
        case = lossy.build_case(count, k, vocab_size, settings=settings, has_law=has_law, seed=seed)
        lossy.check_against_float64(lossy.op(ops), case)


def test_equals_the_reference(lossy: LossyRule, every_ops: Backend) -> None:
    case = lossy.build_case(60 if every_ops is NATIVE else 16, 4, 200, seed=5)
    for actual, expected in zip(case.run(lossy.op(every_ops)), case.run(lossy.op(reference)), strict=True):
        assert torch.equal(actual, expected)


def test_a_threshold_of_0_keeps_everything_and_of_1_nothing(every_ops: Backend) -> None:
    case = THRESHOLD.build_case(40 if every_ops is NATIVE else 6, 3, 40, seed=4)
    for threshold, expected in ((0.0, case.num_draft), (1.0, torch.zeros_like(case.num_draft))):
        given = replace(case, acceptance_threshold=torch.full_like(case.acceptance_threshold, threshold))
        _, num_accepted, _ = given.run(every_ops.threshold_verify)
        assert torch.equal(num_accepted[case.is_selected], expected[case.is_selected])


def test_with_a_large_delta_it_is_the_threshold_rule(every_ops: Backend) -> None:
    """Nothing is below the smaller of the two where delta exp(-H) is the larger."""
    case = TYPICAL.build_case(200 if every_ops is NATIVE else 12, 3, 40, seed=4)
    case = replace(case, acceptance_delta=torch.full_like(case.acceptance_delta, 1e6))
    by_threshold = replace(case, rule=Rule.THRESHOLD)
    for typical, threshold in zip(
        case.run(every_ops.typical_verify), by_threshold.run(every_ops.threshold_verify), strict=True
    ):
        assert torch.equal(typical, threshold)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_all_vocabularies_stay_inside(lossy: LossyRule, ops: Backend, vocab_size: int) -> None:
    case = lossy.build_case(8 if ops is NATIVE else 2, 2, vocab_size, seed=6)
    tokens, num_accepted, _ = case.run(lossy.op(ops))
    written = torch.arange(3)[None] <= num_accepted[:, None]
    assert ((tokens[written] >= 0) & (tokens[written] < vocab_size)).all()


@pytest.mark.parametrize("token", [47, 127, 128, -1, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_support_are_never_accepted(lossy: LossyRule, ops: Backend, token: int) -> None:
    """Beyond the row, in its padding, or filtered out; also where everything likelier than nothing is."""
    case = lossy.build_case(50 if ops is NATIVE else 3, 3, 47, seed=8)
    nothing = torch.zeros(len(case.seeds))
    padded = torch.nn.functional.pad(case.logits, (0, 81), value=NEGATIVE_INFINITY)
    tokens = torch.full_like(case.draft_tokens, token)
    case = replace(
        case, logits=padded, draft_tokens=tokens, acceptance_threshold=nothing, acceptance_delta=nothing
    )
    tokens, num_accepted, _ = case.run(lossy.op(ops))
    assert (num_accepted[case.is_selected] == 0).all()
    assert ((tokens[:, 0] >= 0) & (tokens[:, 0] < 47))[case.is_selected].all()


def test_a_sequence_keeps_its_result_in_every_batch(lossy: LossyRule, ops: Backend) -> None:
    count = 64 if ops is NATIVE else 5
    case = lossy.build_case(count, 5, 200, seed=9)
    together = case.run(lossy.op(ops))
    generator = torch.Generator().manual_seed(0)
    for size in {1, min(7, count), count}:
        chosen = torch.randperm(count, generator=generator)[:size]
        for part, whole in zip(case.take(chosen).run(lossy.op(ops)), together, strict=True):
            assert torch.equal(part, whole[chosen])
    with native_threads(1):
        for part, whole in zip(case.run(lossy.op(ops)), together, strict=True):
            assert torch.equal(part, whole)


def test_bad_rows_set_the_error_only_where_they_were_used(lossy: LossyRule, ops: Backend) -> None:
    half = 20 if ops is NATIVE else 4
    case = lossy.build_case(2 * half, 2, 60, seed=10)
    for value in (float("nan"), NEGATIVE_INFINITY):
        logits = case.logits.clone()
        logits[case.row_start.long()[:half]] = value
        logits[case.row_start.long()[half:] + 3] = value
        stats = filtered(logits, case.temperature.repeat_interleave(4), OFF)
        tokens, num_accepted, error = replace(case, logits=logits, stats=stats).run(lossy.op(ops))
        assert (error[:half][case.is_selected[:half]] == 1).all()
        assert (error[half:][case.is_selected[half:]] == 0).all()
        written = torch.arange(3)[None] <= num_accepted[:, None]
        assert ((tokens[written] >= 0) & (tokens[written] < 60)).all()


FAULTS = ["row", "position", "filter ignored", "rows that do not run", "rows of another rule"]
SEED = 4


def with_fault(ops: Backend, lossy: LossyRule, fault: str) -> Callable[..., None]:
    """The backend's op with a fault."""

    def op(logits, stats, drafts, rows, is_running, verdict):
        if fault == "row":
            drafts = drafts._replace(row_start=drafts.row_start + 1)
        if fault == "position":
            drafts = drafts._replace(seq_len=drafts.seq_len + 1)
        if fault == "filter ignored":
            stats = stats * torch.tensor([1.0, 1e30, 1.0, 1.0])
        if fault == "rows that do not run":
            is_running = torch.ones_like(is_running)
        if fault == "rows of another rule":
            rows = rows._replace(rule=torch.full_like(rows.rule, int(lossy.rule)))
        if fault in lossy.faults:
            rows = lossy.faults[fault](rows)
        lossy.op(ops)(logits, stats, drafts, rows, is_running, verdict)

    return op


@pytest.mark.parametrize(
    ("lossy", "fault"), [(lossy, fault) for lossy in RULES for fault in [*FAULTS, *lossy.faults]]
)
def test_a_planted_fault_is_noticed(lossy: LossyRule, ops: Backend, fault: str) -> None:
    case = lossy.build_case(24, 4, 40, settings=FILTERS[1], seed=SEED)
    case = replace(case, is_selected=torch.arange(len(case.seeds)) > 3).drafting()
    lossy.check_against_float64(lossy.op(ops), case)
    with pytest.raises(AssertionError):
        lossy.check_against_float64(with_fault(ops, lossy, fault), case)


@pytest.mark.triton
def test_several_tiles_are_one(lossy: LossyRule, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (8, 1.0, 0.0)
    case = lossy.build_case(8, 3, 12000, seed=1, settings=(few, few))
    lossy.check_against_float64(lossy.op(TRITON), case)
    together = case.run(lossy.op(TRITON))
    module = importlib.import_module("specengine.kernels.device.judge")
    with monkeypatch.context() as patch:
        patch.setattr(module, "TILE", 2048)
        for smaller, larger in zip(case.run(lossy.op(TRITON)), together, strict=True):
            assert torch.equal(smaller, larger)
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        lossy.check_against_float64(lossy.op(TRITON), case)


@pytest.mark.triton
def test_the_workspace_is_zero_again_whoever_was_selected(
    lossy: LossyRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.device.judge"), "zeroed", zeroed)
    case = lossy.build_case(4, 3, 8200, seed=5)
    for is_selected in (case.is_selected, ~case.is_selected, torch.zeros(4, dtype=torch.bool)):
        chosen = replace(case, is_selected=is_selected).drafting()
        for actual, expected in zip(chosen.run(lossy.op(TRITON)), chosen.run(lossy.op(NATIVE)), strict=True):
            assert torch.equal(actual, expected)
        assert not any(memory.any() for memory in kept.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("row_start", -1, "row_start: rows -1"),
        ("row_start", 999, "row_start: rows 999"),
        ("num_draft", 4, "num_draft: 4"),
    ],
)
def test_values_out_of_range(lossy: LossyRule, ops: Backend, name: str, value: int, message: str) -> None:
    """Native names them; Triton, which cannot look, reads and writes nothing that is not there."""
    case = replace(lossy.build_case(10, 3, 64, seed=13), is_selected=torch.ones(10, dtype=torch.bool))
    case = replace(case, num_draft=case.num_draft.clamp_min(1))
    case = replace(case, **{name: torch.full_like(case.num_draft, value)})
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(lossy.op(ops))
        return
    tokens, num_accepted, _ = case.run(lossy.op(ops))
    assert ((num_accepted >= 0) & (num_accepted <= case.num_draft.clamp(0, 3))).all()
    is_written = torch.arange(4)[None] <= num_accepted[:, None]
    assert ((tokens[is_written] >= 0) & (tokens[is_written] < 64)).all()
    assert (tokens[~is_written] == UNTOUCHED).all()
