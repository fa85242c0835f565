"""threshold_verify: float64's decisions, row by row with a threshold of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from judged_drafts import OFF, UNTOUCHED, Case, Decision, Exact, build_case, check_decisions, filtered
from kernel_cases import NATIVE, NEGATIVE_INFINITY, TRITON, VOCABULARIES, native_threads
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

# float64 decides against fp32 logits near -60 where its margin is larger than this.
MARGIN = 2e-4
FILTERS = [(OFF, OFF), ((12, 0.95, 0.0), (0, 0.9, 0.0))]


def build_lossy_case(*given, seed: int = 0, **named) -> Case:
    """Every row has a threshold of its own."""
    case = build_case(*given, seed=seed, rule=Rule.THRESHOLD, **named)
    generator = torch.Generator().manual_seed(seed + 1)
    threshold = torch.rand(len(case.seeds), generator=generator) * 0.3
    return replace(case, acceptance_threshold=threshold)


def judge(case: Case, exact: Exact) -> Decision:
    """The first draft that is not likely enough; what follows is drawn from p."""
    slack = exact.log_p_drafted - case.acceptance_threshold.double().log()[:, None]
    is_accepted = (slack > 0) & exact.is_drafted
    n = is_accepted.int().cumprod(dim=1).sum(dim=1)
    is_looked_at = exact.is_drafted & (torch.arange(slack.shape[1])[None] <= n[:, None])
    is_clear = ~((slack.abs() < MARGIN) & is_looked_at).any(dim=1)
    return Decision(n, is_clear, exact.log_p[torch.arange(len(n)), n])


def check_against_float64(op: Callable[..., None], case: Case) -> None:
    check_decisions(op, case, lambda exact: judge(case, exact))


@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("has_law", [True, False])
def test_random_cases(ops: Backend, settings: tuple, has_law: bool) -> None:
    sizes = ((1200, 5, 40, 1), (600, 3, 131, 2)) if ops is NATIVE else ((24, 5, 40, 3),)
    for count, k, vocab_size, seed in sizes:
        case = build_lossy_case(count, k, vocab_size, settings=settings, has_law=has_law, seed=seed)
        check_against_float64(ops.threshold_verify, case)


def test_equals_the_reference(every_ops: Backend) -> None:
    case = build_lossy_case(60 if every_ops is NATIVE else 16, 4, 200, seed=5)
    for actual, expected in zip(
        case.run(every_ops.threshold_verify), case.run(reference.threshold_verify), strict=True
    ):
        assert torch.equal(actual, expected)


def test_a_threshold_of_0_keeps_everything_and_of_1_nothing(every_ops: Backend) -> None:
    case = build_lossy_case(40 if every_ops is NATIVE else 6, 3, 40, seed=4)
    for threshold, expected in ((0.0, case.num_draft), (1.0, torch.zeros_like(case.num_draft))):
        given = replace(case, acceptance_threshold=torch.full_like(case.acceptance_threshold, threshold))
        _, num_accepted, _ = given.run(every_ops.threshold_verify)
        assert torch.equal(num_accepted[case.is_selected], expected[case.is_selected])


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_all_vocabularies_stay_inside(ops: Backend, vocab_size: int) -> None:
    case = build_lossy_case(8 if ops is NATIVE else 2, 2, vocab_size, seed=6)
    tokens, num_accepted, _ = case.run(ops.threshold_verify)
    written = torch.arange(3)[None] <= num_accepted[:, None]
    assert ((tokens[written] >= 0) & (tokens[written] < vocab_size)).all()


@pytest.mark.parametrize("token", [47, 127, 128, -1, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_support_are_never_accepted(ops: Backend, token: int) -> None:
    """Beyond the row, in its padding, or filtered out; also where everything likelier than nothing is."""
    case = build_lossy_case(50 if ops is NATIVE else 3, 3, 47, seed=8)
    nothing = torch.zeros(len(case.seeds))
    padded = torch.nn.functional.pad(case.logits, (0, 81), value=NEGATIVE_INFINITY)
    tokens = torch.full_like(case.draft_tokens, token)
    case = replace(
        case, logits=padded, draft_tokens=tokens, acceptance_threshold=nothing, acceptance_delta=nothing
    )
    tokens, num_accepted, _ = case.run(ops.threshold_verify)
    assert (num_accepted[case.is_selected] == 0).all()
    assert ((tokens[:, 0] >= 0) & (tokens[:, 0] < 47))[case.is_selected].all()


def test_a_sequence_keeps_its_result_in_every_batch(ops: Backend) -> None:
    count = 64 if ops is NATIVE else 5
    case = build_lossy_case(count, 5, 200, seed=9)
    together = case.run(ops.threshold_verify)
    generator = torch.Generator().manual_seed(0)
    for size in {1, min(7, count), count}:
        chosen = torch.randperm(count, generator=generator)[:size]
        for part, whole in zip(case.take(chosen).run(ops.threshold_verify), together, strict=True):
            assert torch.equal(part, whole[chosen])
    with native_threads(1):
        for part, whole in zip(case.run(ops.threshold_verify), together, strict=True):
            assert torch.equal(part, whole)


def test_bad_rows_set_the_error_only_where_they_were_used(ops: Backend) -> None:
    half = 20 if ops is NATIVE else 4
    case = build_lossy_case(2 * half, 2, 60, seed=10)
    for value in (float("nan"), NEGATIVE_INFINITY):
        logits = case.logits.clone()
        logits[case.row_start.long()[:half]] = value
        logits[case.row_start.long()[half:] + 3] = value
        stats = filtered(logits, case.temperature.repeat_interleave(4), OFF)
        tokens, num_accepted, error = replace(case, logits=logits, stats=stats).run(ops.threshold_verify)
        assert (error[:half][case.is_selected[:half]] == 1).all()
        assert (error[half:][case.is_selected[half:]] == 0).all()
        written = torch.arange(3)[None] <= num_accepted[:, None]
        assert ((tokens[written] >= 0) & (tokens[written] < 60)).all()


FAULTS = [
    "row",
    "position",
    "filter ignored",
    "rows that do not run",
    "rows of another rule",
    "everybody's threshold",
]
SEED = 4


def with_fault(ops: Backend, fault: str) -> Callable[..., None]:
    """The backend's threshold_verify with a fault."""

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
            rows = rows._replace(rule=torch.full_like(rows.rule, int(Rule.THRESHOLD)))
        if fault == "everybody's threshold":
            first = rows.acceptance_threshold[:1].expand(len(rows.seeds)).contiguous()
            rows = rows._replace(acceptance_threshold=first)
        ops.threshold_verify(logits, stats, drafts, rows, is_running, verdict)

    return op


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    case = build_lossy_case(24, 4, 40, settings=FILTERS[1], seed=SEED)
    case = replace(case, is_selected=torch.arange(len(case.seeds)) > 3).drafting()
    check_against_float64(ops.threshold_verify, case)
    with pytest.raises(AssertionError):
        check_against_float64(with_fault(ops, fault), case)


@pytest.mark.triton
def test_several_tiles_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (8, 1.0, 0.0)
    case = build_lossy_case(8, 3, 12000, seed=1, settings=(few, few))
    check_against_float64(TRITON.threshold_verify, case)
    together = case.run(TRITON.threshold_verify)
    module = importlib.import_module("specengine.kernels.threshold_verify")
    with monkeypatch.context() as patch:
        patch.setattr(module, "TILE", 2048)
        for smaller, larger in zip(case.run(TRITON.threshold_verify), together, strict=True):
            assert torch.equal(smaller, larger)
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_against_float64(TRITON.threshold_verify, case)


@pytest.mark.triton
def test_the_workspace_is_zero_again_whoever_was_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.threshold_verify"), "zeroed", zeroed)
    case = build_lossy_case(4, 3, 8200, seed=5)
    for is_selected in (case.is_selected, ~case.is_selected, torch.zeros(4, dtype=torch.bool)):
        chosen = replace(case, is_selected=is_selected).drafting()
        for actual, expected in zip(
            chosen.run(TRITON.threshold_verify), chosen.run(NATIVE.threshold_verify), strict=True
        ):
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
def test_values_out_of_range(ops: Backend, name: str, value: int, message: str) -> None:
    """Native names them; Triton, which cannot look, reads and writes nothing that is not there."""
    case = replace(build_lossy_case(10, 3, 64, seed=13), is_selected=torch.ones(10, dtype=torch.bool))
    case = replace(case, num_draft=case.num_draft.clamp_min(1))
    case = replace(case, **{name: torch.full_like(case.num_draft, value)})
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(ops.threshold_verify)
        return
    tokens, num_accepted, _ = case.run(ops.threshold_verify)
    assert ((num_accepted >= 0) & (num_accepted <= case.num_draft.clamp(0, 3))).all()
    is_written = torch.arange(4)[None] <= num_accepted[:, None]
    assert ((tokens[is_written] >= 0) & (tokens[is_written] < 64)).all()
    assert (tokens[~is_written] == UNTOUCHED).all()
