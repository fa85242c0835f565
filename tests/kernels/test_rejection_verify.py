"""rejection_verify: the acceptance rule and the residual race of float64, and the law of what is emitted."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from judged_drafts import (
    OFF,
    UNTOUCHED,
    Case,
    Decision,
    Exact,
    build_case,
    check_decisions,
    drawn_by,
    exact_log_probs,
    filtered,
    residual_log_weights,
)
from kernel_cases import (
    DEVICE,
    NATIVE,
    NEGATIVE_INFINITY,
    TRITON,
    VOCABULARIES,
    native_threads,
    random_logits,
    random_seeds,
    unfiltered_stats,
)
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

# float64 decides against fp32 logits near -60 where its margin is larger than this.
MARGIN = 2e-4


def judge(exact: Exact) -> Decision:
    slack = exact.log_p_drafted - exact.log_q_drafted - exact.u.log()
    is_accepted = (slack >= 0) & exact.is_drafted
    n = is_accepted.int().cumprod(dim=1).sum(dim=1)
    # A sequence is judged when every test up to its stop is clear.
    is_looked_at = exact.is_drafted & (torch.arange(slack.shape[1])[None] <= n[:, None])
    is_clear = ~((slack.abs() < MARGIN) & is_looked_at).any(dim=1)
    each, stop = torch.arange(len(n)), n.clamp_max(slack.shape[1] - 1)
    is_rejected = n < exact.is_drafted.sum(dim=1)
    return Decision(
        n, is_clear, residual_log_weights(exact.log_p[each, n], exact.log_q[each, stop], is_rejected)
    )


def check_against_float64(op, case: Case) -> None:
    check_decisions(op, case, judge)


FILTERS = [(OFF, OFF), ((5, 0.9, 0.0), (0, 0.8, 0.0)), ((0, 0.9, 0.01), (3, 1.0, 0.0))]


@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("has_law", [True, False])
def test_ten_thousand_random_cases(ops: Backend, settings: tuple, has_law: bool) -> None:
    sizes = ((1200, 4, 40, 1), (600, 3, 131, 2)) if ops is NATIVE else ((16, 4, 40, 1),)
    for count, k, vocab_size, seed in sizes:
        case = build_case(count, k, vocab_size, settings=settings, has_law=has_law, seed=seed)
        check_against_float64(ops.rejection_verify, case)


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("has_law", [True, False])
def test_two_thousand_random_cases_in_triton(settings: tuple, has_law: bool) -> None:
    case = build_case(340, 4, 150, settings=settings, has_law=has_law, seed=4)
    check_against_float64(TRITON.rejection_verify, case)


@pytest.mark.parametrize("draft_vocab_size", [30, 47, 64, 200])
def test_draft_vocabularies_of_another_width(every_ops: Backend, draft_vocab_size: int) -> None:
    count = 400 if every_ops is NATIVE else 12
    check_against_float64(every_ops.rejection_verify, build_case(count, 3, 47, draft_vocab_size, seed=3))


@pytest.mark.parametrize("has_law", [True, False])
def test_equals_the_reference(every_ops: Backend, has_law: bool) -> None:
    case = build_case(60 if every_ops is NATIVE else 16, 4, 200, has_law=has_law, seed=5)
    for actual, expected in zip(
        case.run(every_ops.rejection_verify), case.run(reference.rejection_verify), strict=True
    ):
        assert torch.equal(actual, expected)


def test_some_have_a_law_and_others_are_point_masses(every_ops: Backend) -> None:
    case = build_case(400 if every_ops is NATIVE else 16, 4, 47, 40, seed=21)
    case = replace(
        case, has_law=torch.rand(len(case.seeds), generator=torch.Generator().manual_seed(1)) < 0.5
    )
    check_against_float64(every_ops.rejection_verify, case)
    for actual, expected in zip(
        case.run(every_ops.rejection_verify), case.run(reference.rejection_verify), strict=True
    ):
        assert torch.equal(actual, expected)
    everybodys = replace(case, has_law=None)
    with pytest.raises(AssertionError):
        check_against_float64(
            lambda *given: every_ops.rejection_verify(*everybodys.arguments, given[-1]), case
        )


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_all_vocabularies_stay_inside(ops: Backend, vocab_size: int) -> None:
    for has_law in (True, False):
        case = build_case(8 if ops is NATIVE else 2, 2, vocab_size, seed=6, has_law=has_law)
        tokens, num_accepted, _ = case.run(ops.rejection_verify)
        written = torch.arange(3)[None] <= num_accepted[:, None]
        assert ((tokens[written] >= 0) & (tokens[written] < vocab_size)).all()


def test_equal_laws_always_accept(every_ops: Backend) -> None:
    case = build_case(500 if every_ops is NATIVE else 20, 6, 50, seed=7)
    rows = case.row_start[:, None].long() + torch.arange(6)
    draft_logits, draft_stats = case.logits[rows], case.stats[rows]
    positions = (case.seq_len[:, None] + torch.arange(6)).flatten().int()
    tokens, log_probs = NATIVE.sample_rows(
        draft_logits.flatten(0, 1),
        draft_stats.flatten(0, 1),
        drawn_by(case.temperature.repeat_interleave(6), case.seeds.repeat_interleave(6)),
        positions,
        1,
        case.seq_len.repeat_interleave(6),
    )
    case = replace(
        case,
        draft_logits=draft_logits,
        draft_stats=draft_stats,
        draft_tokens=tokens.view(-1, 6),
        draft_log_probs=log_probs.view(-1, 6),
    )
    _, num_accepted, _ = case.run(every_ops.rejection_verify)
    assert torch.equal(num_accepted[case.is_selected], case.num_draft[case.is_selected])


@pytest.mark.parametrize("token", [47, 127, 128, -1, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_support_are_never_accepted(ops: Backend, token: int) -> None:
    """Beyond the row, in its padding, or filtered out; whatever log q claims of it."""
    for has_law in (True, False):
        case = build_case(50 if ops is NATIVE else 3, 3, 47, seed=8, has_law=has_law)
        padded = torch.nn.functional.pad(case.logits, (0, 81), value=NEGATIVE_INFINITY)
        case = replace(
            case,
            logits=padded,
            draft_tokens=torch.full_like(case.draft_tokens, token),
            draft_log_probs=torch.full_like(case.draft_log_probs, -100.0),
        )
        tokens, num_accepted, _ = case.run(ops.rejection_verify)
        assert (num_accepted[case.is_selected] == 0).all()
        assert ((tokens[:, 0] >= 0) & (tokens[:, 0] < 47))[case.is_selected].all()


def test_zero_residual_falls_back_to_the_target(every_ops: Backend) -> None:
    """A one-token target whose draft claims more than it gave: nothing is left, the target's token comes."""
    # A point mass never claims more.
    logits = torch.full((3, 130), NEGATIVE_INFINITY)
    logits[:, 129] = -2.0
    one = torch.ones(1)
    stats = unfiltered_stats(logits, one.expand(3))
    case = Case(
        logits,
        stats,
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([[129]], dtype=torch.int32),
        torch.tensor([[50.0]]),
        logits[:1].clone()[None],
        stats[:1][None],
        one,
        random_seeds(1),
        torch.tensor([4], dtype=torch.int32),
        torch.tensor([True]),
    )
    tokens, num_accepted, _ = case.run(every_ops.rejection_verify)
    assert num_accepted.tolist() == [0]
    assert tokens[0].tolist() == [129, UNTOUCHED]


def test_a_sequence_keeps_its_result_in_every_batch(ops: Backend) -> None:
    count = 64 if ops is NATIVE else 5
    for has_law in (True, False):
        case = build_case(count, 5, 200, seed=9, has_law=has_law)
        together = case.run(ops.rejection_verify)
        generator = torch.Generator().manual_seed(0)
        for size in {1, 2, min(7, count), count}:
            chosen = torch.randperm(count, generator=generator)[:size]
            for part, whole in zip(case.take(chosen).run(ops.rejection_verify), together, strict=True):
                assert torch.equal(part, whole[chosen])
        with native_threads(1):
            for part, whole in zip(case.run(ops.rejection_verify), together, strict=True):
                assert torch.equal(part, whole)


def test_bad_rows_set_the_error_only_where_they_were_used(ops: Backend) -> None:
    half = 20 if ops is NATIVE else 4
    case = build_case(2 * half, 2, 60, seed=10)
    logits = case.logits.clone()
    logits[case.row_start.long()[:half]] = float("nan")
    logits[case.row_start.long()[half:] + 3] = float("nan")
    stats = filtered(logits, case.temperature.repeat_interleave(4), OFF)
    tokens, num_accepted, error = replace(case, logits=logits, stats=stats).run(ops.rejection_verify)
    assert (error[:half][case.is_selected[:half]] == 1).all()
    assert (error[half:][case.is_selected[half:]] == 0).all()
    written = torch.arange(3)[None] <= num_accepted[:, None]
    assert ((tokens[written] >= 0) & (tokens[written] < 60)).all()


def check_emitted_law(op) -> None:
    """First token emitted over 60,000 rounds against the target's filtered law: chi-square, six sigmas."""
    count, vocab_size = 60000, 16
    target, draft = random_logits(1, vocab_size, 11, 1.5), random_logits(1, vocab_size, 12, 1.5)
    temperature = torch.full((count,), 0.9)
    target_stats = filtered(target, temperature[:1], (12, 0.95, 0.0))
    draft_stats = filtered(draft, temperature[:1], (10, 1.0, 0.0))
    seq_len = torch.arange(count).int()
    seeds = random_seeds(1).expand(count)
    tokens, log_probs = NATIVE.sample_rows(
        draft.expand(count, -1),
        draft_stats.expand(count, -1),
        drawn_by(temperature, seeds),
        seq_len,
        1,
        seq_len,
    )
    case = Case(
        target.expand(2, -1),
        target_stats.expand(2, -1),
        torch.zeros(count, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        tokens[:, None],
        log_probs[:, None],
        draft.expand(count, 1, -1),
        draft_stats.expand(count, 1, -1),
        temperature,
        seeds,
        seq_len,
        torch.ones(count, dtype=torch.bool),
    )
    emitted, num_accepted, _ = case.run(op)
    law = exact_log_probs(target, target_stats, temperature[:1])[0].exp()
    counts = torch.bincount(emitted[:, 0].long(), minlength=vocab_size).double()
    assert float(counts[law == 0].sum()) == 0
    expected = law[law > 0] * count
    statistic = float(((counts[law > 0] - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom), statistic
    assert 0.1 < float(num_accepted.double().mean()) < 0.95


def test_what_is_emitted_follows_the_target() -> None:
    check_emitted_law(NATIVE.rejection_verify)


@pytest.mark.parametrize("fault", ["residual from p", "raw q", "one stream for draft and acceptance"])
def test_a_planted_fault_in_the_law_is_noticed(fault: str) -> None:
    def faulty(logits, stats, drafts, rows, is_running, verdict):
        law = drafts.law
        if fault == "residual from p":
            # A draft law that is zero everywhere leaves p as the residual.
            law = law._replace(logits=torch.full_like(law.logits, NEGATIVE_INFINITY))
        if fault == "raw q":
            raw = unfiltered_stats(law.logits[0], rows.temperature[:1])
            law = law._replace(log_probs=law.log_probs + law.stats[:, 0, 2:3] - raw[:, 2:3])
        if fault == "one stream for draft and acceptance":
            tokens, _ = NATIVE.sample_rows(
                law.logits[:, 0],
                law.stats[:, 0].contiguous(),
                rows,
                drafts.seq_len,
                rng.STREAM_TARGET,
                torch.zeros_like(drafts.seq_len),
            )
            scaled = law.logits[:, 0].gather(1, tokens.long()[:, None]) / rows.temperature[:, None]
            drafts = drafts._replace(tokens=tokens[:, None])
            law = law._replace(log_probs=scaled - law.stats[:, 0, 2:3])
        NATIVE.rejection_verify(logits, stats, drafts._replace(law=law), rows, is_running, verdict)

    with pytest.raises(AssertionError):
        check_emitted_law(faulty)


def with_fault(ops: Backend, fault: str):
    """The backend's rejection_verify with a fault."""

    def op(logits, stats, drafts, rows, is_running, verdict):
        law = drafts.law
        if fault == "residual from p":
            law = law._replace(logits=torch.full_like(law.logits, NEGATIVE_INFINITY))
        if fault == "point mass for a law":
            law = None
        if fault == "q of the next row":
            law = law._replace(logits=law.logits.roll(-1, dims=1))
        if fault == "filter of the draft ignored":
            law = law._replace(stats=law.stats * torch.tensor([1.0, 1e30, 1.0, 1.0]))
        drafts = drafts._replace(law=law)
        if fault == "row":
            drafts = drafts._replace(row_start=drafts.row_start + 1)
        if fault == "position":
            drafts = drafts._replace(seq_len=drafts.seq_len + 1)
        if fault == "seed":
            rows = rows._replace(seeds=rows.seeds & 0xFFFFFFFF)
        if fault == "rows that do not run":
            is_running = torch.ones_like(is_running)
        if fault == "rows of another rule":
            rows = rows._replace(rule=torch.full_like(rows.rule, int(Rule.REJECTION)))
        ops.rejection_verify(logits, stats, drafts, rows, is_running, verdict)
        if fault == "accepts one too many":
            chosen = verdict.num_accepted != UNTOUCHED
            more = (verdict.num_accepted + 1).minimum(drafts.num_draft)
            verdict.num_accepted[chosen] = more[chosen]

    return op


def small_case(ops: Backend) -> Case:
    case = build_case(200 if ops is NATIVE else 9, 4, 40, settings=FILTERS[2], seed=1)
    return replace(case, is_selected=torch.arange(len(case.seeds)) > 3).drafting()


@pytest.mark.parametrize(
    "fault",
    [
        "residual from p",
        "point mass for a law",
        "q of the next row",
        "filter of the draft ignored",
        "row",
        "position",
        "seed",
        "rows that do not run",
        "rows of another rule",
        "accepts one too many",
    ],
)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    with pytest.raises(AssertionError):
        check_against_float64(with_fault(ops, fault), small_case(ops))


@pytest.mark.triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces device functions in the interpreter")
@pytest.mark.parametrize("fault", ["one stream for all", "no round base", "noise of row 0", "log u of row 0"])
def test_a_planted_fault_in_the_noise_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    module = importlib.import_module("specengine.kernels.rejection_verify")
    philox, noise = module.philox_lanes, module.tile_noise

    def accept_bits(counter, position, stream, base, seed):
        if fault == "one stream for all":
            stream = 0
        if fault == "no round base":
            base = base * 0
        if fault == "log u of row 0":
            position = position * 0 + base
        return philox(counter, position, stream, base, seed)

    def target_noise(lane, position, stream, base, seed):
        return noise(lane, position * 0 if fault == "noise of row 0" else position, stream, base, seed)

    monkeypatch.setattr(module, "philox_lanes", accept_bits)
    monkeypatch.setattr(module, "tile_noise", target_noise)
    with pytest.raises(AssertionError):
        check_against_float64(TRITON.rejection_verify, build_case(24, 4, 40, settings=FILTERS[2], seed=1))


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("specengine.kernels.device.judge")
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_against_float64(TRITON.rejection_verify, build_case(8, 2, 12000, seed=7))


@pytest.mark.triton
def test_several_tiles_are_one_race() -> None:
    top_3 = (3, 1.0, 0.0)
    for settings, has_law in (((OFF, OFF), True), ((top_3, top_3), True), ((top_3, top_3), False)):
        case = build_case(8, 2, 12000, 9000 if has_law else None, seed=7, settings=settings, has_law=has_law)
        check_against_float64(TRITON.rejection_verify, case)


@pytest.fixture
def shared_workspace(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """The zeroed memory of Triton's rejection_verify, the same for every call."""
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.device.judge"), "zeroed", zeroed)
    return kept


@pytest.mark.triton
def test_the_workspace_is_zero_again_whoever_was_selected(
    shared_workspace: dict[torch.dtype, Tensor],
) -> None:
    case = build_case(4, 2, 8200, seed=5)
    for is_selected in (case.is_selected, ~case.is_selected, torch.zeros(4, dtype=torch.bool)):
        chosen = replace(case, is_selected=is_selected).drafting()
        for actual, expected in zip(
            chosen.run(TRITON.rejection_verify), chosen.run(NATIVE.rejection_verify), strict=True
        ):
            assert torch.equal(actual, expected)
        assert not any(memory.any() for memory in shared_workspace.values())


def test_strided_arguments_and_wrong_ones(ops: Backend) -> None:
    case = build_case(12, 3, 64, seed=13)
    wide = torch.zeros(12, 5, 80)
    wide[:, :3, :64] = case.draft_logits
    strided = replace(case, draft_logits=wide[:, :3, :64], draft_tokens=case.draft_tokens.T.contiguous().T)
    for actual, expected in zip(
        strided.run(ops.rejection_verify), case.run(ops.rejection_verify), strict=True
    ):
        assert torch.equal(actual, expected)
    wrong = {
        "draft_stats: expected": {"draft_stats": case.draft_stats[:, :2]},
        "has_law: expected": {"has_law": torch.ones(12, dtype=torch.int32)},
        "draft_log_probs: expected": {"draft_log_probs": case.draft_log_probs.double()},
        "draft_logits: expected": {"draft_logits": case.draft_logits[:, :2]},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(ops.rejection_verify)


OUT_OF_RANGE = {
    "row_start: rows -1": ("row_start", -1),
    "row_start: rows 999": ("row_start", 999),
    "num_draft: 4": ("num_draft", 4),
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_values_out_of_range(ops: Backend, message: str) -> None:
    """Native names them; Triton, which cannot look, reads and writes nothing that is not there."""
    name, value = OUT_OF_RANGE[message]
    case = replace(build_case(10, 3, 64, seed=13), is_selected=torch.ones(10, dtype=torch.bool))
    case = replace(
        case, **{"num_draft": case.num_draft.clamp_min(1), name: torch.full_like(case.num_draft, value)}
    )
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(ops.rejection_verify)
        return
    tokens, num_accepted, _ = case.run(ops.rejection_verify)
    assert ((num_accepted >= 0) & (num_accepted <= case.num_draft.clamp(0, 3))).all()
    is_written = torch.arange(4)[None] <= num_accepted[:, None]
    assert ((tokens[is_written] >= 0) & (tokens[is_written] < 64)).all()
    assert (tokens[~is_written] == UNTOUCHED).all()
