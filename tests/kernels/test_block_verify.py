"""block_verify: float64's decisions, the law of what is emitted, and more accepted drafts than by rejection."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

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
    random_seeds,
)
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

# float64 decides against fp32 logits near -60 where its margin is larger than this.
MARGIN = 2e-4
FILTERS = [(OFF, OFF), ((5, 0.9, 0.0), (0, 0.8, 0.0))]

build_block_case = partial(build_case, rule=Rule.BLOCK)


def judge(exact: Exact) -> Decision:
    """The longest prefix that passes its test."""
    count, k = exact.u.shape
    share = torch.ones(count, k + 1, dtype=torch.float64)
    for i in range(k):
        ratio = (exact.log_p_drafted - exact.log_q_drafted)[:, i].exp()
        share[:, i + 1] = (share[:, i] * ratio).clamp_max(1.0)
    excess = (share[:, :k, None] * exact.log_p[:, :k].exp() - exact.log_q.exp()).clamp_min(0.0).sum(dim=2)
    # With nothing left and nothing lost a prefix passes: 0 / 0 = 1.
    height = (excess / (excess + 1 - share[:, :k])).nan_to_num(nan=1.0)
    num_draft = exact.is_drafted.sum(dim=1, keepdim=True)
    length = torch.arange(1, k + 1)[None]
    height = torch.where(length == num_draft, share[:, 1:], torch.cat((height[:, 1:], height[:, :1]), dim=1))
    passes = (exact.u <= height) & exact.is_drafted
    n = (passes * length).max(dim=1).values
    is_close = ((exact.u - height).abs() < MARGIN) & exact.is_drafted & (height < 1.0)
    is_clear = ~(is_close & (length >= n[:, None])).any(dim=1)
    each, stop = torch.arange(count), n.clamp_max(k - 1)
    log_p, log_q = exact.log_p[each, n], exact.log_q[each, stop]
    is_rejected = n < num_draft[:, 0]
    log_p = torch.where(is_rejected[:, None], log_p + share[each, n].log()[:, None], log_p)
    return Decision(n, is_clear, residual_log_weights(log_p, log_q, is_rejected))


def check_against_float64(op, case: Case) -> None:
    check_decisions(op, case, judge)


@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("has_law", [True, False])
def test_random_cases(ops: Backend, settings: tuple, has_law: bool) -> None:
    sizes = ((1200, 5, 40, 1), (600, 3, 131, 2)) if ops is NATIVE else ((24, 5, 40, 3),)
    for count, k, vocab_size, seed in sizes:
        case = build_block_case(count, k, vocab_size, settings=settings, has_law=has_law, seed=seed)
        check_against_float64(ops.block_verify, case)


def test_some_have_a_law_and_others_are_point_masses(every_ops: Backend) -> None:
    case = build_block_case(400 if every_ops is NATIVE else 12, 4, 47, 40, seed=21)
    has_law = torch.rand(len(case.seeds), generator=torch.Generator().manual_seed(1)) < 0.5
    case = replace(case, has_law=has_law)
    check_against_float64(every_ops.block_verify, case)
    everybodys = replace(case, has_law=None)
    with pytest.raises(AssertionError):
        check_against_float64(lambda *given: every_ops.block_verify(*everybodys.arguments, given[-1]), case)


@pytest.mark.parametrize("draft_vocab_size", [30, 200])
def test_draft_vocabularies_of_another_width(every_ops: Backend, draft_vocab_size: int) -> None:
    count = 400 if every_ops is NATIVE else 12
    check_against_float64(every_ops.block_verify, build_block_case(count, 3, 47, draft_vocab_size, seed=3))


@pytest.mark.parametrize("has_law", [True, False])
def test_equals_the_reference(every_ops: Backend, has_law: bool) -> None:
    case = build_block_case(60 if every_ops is NATIVE else 16, 4, 200, has_law=has_law, seed=5)
    for actual, expected in zip(
        case.run(every_ops.block_verify), case.run(reference.block_verify), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("has_law", [True, False])
def test_a_single_draft_is_judged_as_by_rejection(every_ops: Backend, has_law: bool) -> None:
    case = build_block_case(400 if every_ops is NATIVE else 16, 1, 60, has_law=has_law, seed=6)
    by_rejection = replace(case, rule=Rule.REJECTION)
    for actual, expected in zip(
        case.run(every_ops.block_verify), by_rejection.run(every_ops.rejection_verify), strict=True
    ):
        assert torch.equal(actual, expected)


def test_more_is_accepted_than_by_rejection() -> None:
    """On average, and where a draft is long by more than chance."""
    for has_law in (True, False):
        for k in (2, 4, 8):
            case = build_block_case(4000, k, 30, seed=k, has_law=has_law)
            case = replace(case, num_draft=torch.full_like(case.num_draft, k)).drafting()
            chosen = case.is_selected
            block = case.run(NATIVE.block_verify)[1][chosen].double()
            rejection = replace(case, rule=Rule.REJECTION).run(NATIVE.rejection_verify)[1][chosen].double()
            gain = block - rejection
            error = float(gain.std()) / len(gain) ** 0.5
            assert float(gain.mean()) > -4 * error, (has_law, k)
            # A point mass leaves nothing to be made up for: a rejected token cannot come back.
            if has_law and k > 2:
                assert float(gain.mean()) > 4 * error, (k, float(gain.mean()), error)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_all_vocabularies_stay_inside(ops: Backend, vocab_size: int) -> None:
    for has_law in (True, False):
        case = build_block_case(8 if ops is NATIVE else 1, 2, vocab_size, seed=6, has_law=has_law)
        tokens, num_accepted, _ = case.run(ops.block_verify)
        written = torch.arange(3)[None] <= num_accepted[:, None]
        assert ((tokens[written] >= 0) & (tokens[written] < vocab_size)).all()


def test_equal_laws_always_accept(every_ops: Backend) -> None:
    case = build_block_case(500 if every_ops is NATIVE else 20, 6, 50, seed=7)
    rows = case.row_start[:, None].long() + torch.arange(6)
    stats = case.stats[rows]
    inside = case.draft_tokens.long()[..., None]
    scaled = case.logits[rows].gather(2, inside)[..., 0] / case.temperature[:, None]
    case = replace(
        case, draft_logits=case.logits[rows], draft_stats=stats, draft_log_probs=scaled - stats[..., 2]
    )
    _, num_accepted, _ = case.run(every_ops.block_verify)
    assert torch.equal(num_accepted[case.is_selected], case.num_draft[case.is_selected])


@pytest.mark.parametrize("token", [47, 127, 128, -1, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_support_are_never_accepted(ops: Backend, token: int) -> None:
    for has_law in (True, False):
        case = build_block_case(50 if ops is NATIVE else 3, 3, 47, seed=8, has_law=has_law)
        padded = torch.nn.functional.pad(case.logits, (0, 81), value=NEGATIVE_INFINITY)
        case = replace(
            case,
            logits=padded,
            draft_tokens=torch.full_like(case.draft_tokens, token),
            draft_log_probs=torch.full_like(case.draft_log_probs, -100.0),
        )
        tokens, num_accepted, _ = case.run(ops.block_verify)
        assert (num_accepted[case.is_selected] == 0).all()
        assert ((tokens[:, 0] >= 0) & (tokens[:, 0] < 47))[case.is_selected].all()


def test_a_sequence_keeps_its_result_in_every_batch_and_for_every_k(ops: Backend) -> None:
    """k is the batch's: a sequence that drafts less is judged as if the columns behind were not there."""
    count = 64 if ops is NATIVE else 5
    for has_law in (True, False):
        case = build_block_case(count, 5, 200, seed=9, has_law=has_law)
        together = case.run(ops.block_verify)
        generator = torch.Generator().manual_seed(0)
        for size in {1, min(7, count), count}:
            chosen = torch.randperm(count, generator=generator)[:size]
            for part, whole in zip(case.take(chosen).run(ops.block_verify), together, strict=True):
                assert torch.equal(part, whole[chosen])
        with native_threads(1):
            for part, whole in zip(case.run(ops.block_verify), together, strict=True):
                assert torch.equal(part, whole)
        few = case.num_draft <= 2
        narrow = replace(
            case.take(few),
            draft_tokens=case.draft_tokens[few, :2],
            draft_log_probs=case.draft_log_probs[few, :2],
            draft_logits=case.draft_logits[few, :2] if has_law else None,
            draft_stats=case.draft_stats[few, :2] if has_law else None,
        )
        tokens, num_accepted, _ = narrow.run(ops.block_verify)
        assert torch.equal(num_accepted, together[1][few])
        assert torch.equal(tokens, together[0][few, :3])


def test_bad_rows_set_the_error_only_where_they_were_used(ops: Backend) -> None:
    half = 20 if ops is NATIVE else 4
    case = build_block_case(2 * half, 2, 60, seed=10)
    for value in (float("nan"), NEGATIVE_INFINITY):
        logits = case.logits.clone()
        logits[case.row_start.long()[:half]] = value
        logits[case.row_start.long()[half:] + 3] = value
        stats = filtered(logits, case.temperature.repeat_interleave(4), OFF)
        bad = replace(case, logits=logits, stats=stats)
        tokens, num_accepted, error = bad.run(ops.block_verify)
        assert (error[:half][case.is_selected[:half]] == 1).all()
        assert (error[half:][case.is_selected[half:]] == 0).all()
        written = torch.arange(3)[None] <= num_accepted[:, None]
        assert ((tokens[written] >= 0) & (tokens[written] < 60)).all()


def check_emitted_law(op) -> None:
    """Whole texts of k + 1 tokens from one long block and plain sampling behind it: chi-square, six sigmas."""
    count, k, vocab_size = 150_000, 4, 3
    generator = torch.Generator().manual_seed(3)
    # The target's and the draft's laws after every text, depth by depth: [3^i, 3].
    target, draft = ([torch.randn(3**i, 3, generator=generator) for i in range(k + 1)] for _ in range(2))
    text, texts, drawn = torch.zeros(count, dtype=torch.long), [torch.zeros(count, dtype=torch.long)], []
    for i in range(k):
        drawn.append(draft[i][text].softmax(1).multinomial(1, generator=generator)[:, 0])
        text = text * vocab_size + drawn[i]
        texts.append(text)
    one, tokens = torch.ones(count), torch.stack(drawn, dim=1).int()
    logits = torch.stack([target[i][texts[i]] for i in range(k + 1)], dim=1).flatten(0, 1)
    draft_logits = torch.stack([draft[i][texts[i]] for i in range(k)], dim=1)
    log_probs = draft_logits.log_softmax(2).gather(2, tokens.long()[..., None])[..., 0]
    case = Case(
        logits=logits,
        stats=filtered(logits, one.repeat_interleave(k + 1), OFF),
        row_start=torch.arange(count, dtype=torch.int32) * (k + 1),
        num_draft=torch.full((count,), k, dtype=torch.int32),
        draft_tokens=tokens,
        draft_log_probs=log_probs,
        draft_logits=draft_logits,
        draft_stats=filtered(draft_logits.flatten(0, 1), one.repeat_interleave(k), OFF).view(count, k, 4),
        temperature=one,
        seeds=random_seeds(count),
        seq_len=torch.full((count,), 5, dtype=torch.int32),
        is_selected=torch.ones(count, dtype=torch.bool),
        rule=Rule.BLOCK,
    )
    emitted, num_accepted, _ = case.run(op)
    law, text = torch.ones(1), torch.zeros(count, dtype=torch.long)
    for i in range(k + 1):
        law = (law[:, None] * target[i].softmax(1)).flatten()
        later = target[i][text].softmax(1).multinomial(1, generator=generator)[:, 0]
        text = text * vocab_size + torch.where(i <= num_accepted, emitted[:, i].long(), later)
    counts = torch.bincount(text, minlength=len(law)).double()
    statistic = float(((counts - law * count) ** 2 / (law * count)).sum())
    freedom = len(law) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5, statistic
    assert 0.5 < float(num_accepted.double().mean()) < k - 0.5


def test_a_long_block_follows_the_target() -> None:
    check_emitted_law(NATIVE.block_verify)


def test_a_long_block_with_a_planted_fault_is_noticed() -> None:
    """Each draft a tenth likelier to have been drawn than it was."""

    def faulty(logits, stats, drafts, rows, is_running, verdict):
        law = drafts.law._replace(log_probs=drafts.law.log_probs + 0.1)
        NATIVE.block_verify(logits, stats, drafts._replace(law=law), rows, is_running, verdict)

    with pytest.raises(AssertionError):
        check_emitted_law(faulty)


def with_fault(ops: Backend, fault: str):
    """The backend's block_verify with a fault."""

    def op(logits, stats, drafts, rows, is_running, verdict):
        law = drafts.law
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
        if fault == "rows that do not run":
            is_running = torch.ones_like(is_running)
        if fault == "rows of another rule":
            rows = rows._replace(rule=torch.full_like(rows.rule, int(Rule.BLOCK)))
        if fault == "first failure":
            rows = rows._replace(rule=rows.rule.clamp_max(int(Rule.REJECTION)))
            ops.rejection_verify(logits, stats, drafts, rows, is_running, verdict)
            return
        ops.block_verify(logits, stats, drafts, rows, is_running, verdict)

    return op


FAULTS = [
    "first failure",
    "point mass for a law",
    "q of the next row",
    "filter of the draft ignored",
    "row",
    "position",
    "rows that do not run",
    "rows of another rule",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    case = build_block_case(16, 4, 40, settings=FILTERS[1], seed=5)
    case = replace(case, is_selected=torch.arange(len(case.seeds)) > 3).drafting()
    check_against_float64(ops.block_verify, case)
    with pytest.raises(AssertionError):
        check_against_float64(with_fault(ops, fault), case)


@pytest.mark.triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces device functions in the interpreter")
@pytest.mark.parametrize("fault", ["no share", "a sum missing", "noise of row 0", "the next u"])
def test_a_planted_fault_in_the_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    module = importlib.import_module("specengine.kernels.block_verify")
    shares, uniforms, noise, take = (
        getattr(module, name) for name in ("log_shares", "accept_uniforms", "tile_noise", "take_keys")
    )

    def log_shares(log_ratio, column, num_draft):
        return column * 0.0 if fault == "no share" else shares(log_ratio, column, num_draft)

    def accept_uniforms(index, seq_len, seed):
        return uniforms(index + 1 if fault == "the next u" else index, seq_len, seed)

    def tile_noise(lane, position, stream, base, seed):
        return noise(lane, position * 0 if fault == "noise of row 0" else position, stream, base, seed)

    taken: list[object] = []

    def take_keys(key_ptr, mask):
        taken.append(key_ptr)
        keys = take(key_ptr, mask)
        return keys * 0 if fault == "a sum missing" and len(taken) % 3 == 0 else keys

    case = build_block_case(32, 4, 40, settings=FILTERS[1], seed=1)
    check_against_float64(TRITON.block_verify, case)
    for replaced in (log_shares, accept_uniforms, tile_noise, take_keys):
        monkeypatch.setattr(module, replaced.__name__, replaced)
    with pytest.raises(AssertionError):
        check_against_float64(TRITON.block_verify, case)


@pytest.mark.triton
def test_several_tiles_are_one_sum_and_one_race(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build_block_case(6, 3, 12000, 9000, seed=7)
    check_against_float64(TRITON.block_verify, case)
    together = case.run(TRITON.block_verify)
    module = importlib.import_module("specengine.kernels.device.judge")
    with monkeypatch.context() as patch:
        patch.setattr(module, "TILE", 2048)
        for smaller, larger in zip(case.run(TRITON.block_verify), together, strict=True):
            assert torch.equal(smaller, larger)
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_against_float64(TRITON.block_verify, case)


@pytest.fixture
def shared_workspace(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """The zeroed memory of Triton's block_verify, the same for every call."""
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.device.judge"), "zeroed", zeroed)
    return kept


@pytest.mark.triton
def test_the_workspace_is_zero_again_whoever_was_selected(
    shared_workspace: dict[torch.dtype, Tensor],
) -> None:
    case = build_block_case(4, 3, 8200, seed=5)
    for is_selected in (case.is_selected, ~case.is_selected, torch.zeros(4, dtype=torch.bool)):
        chosen = replace(case, is_selected=is_selected).drafting()
        for actual, expected in zip(
            chosen.run(TRITON.block_verify), chosen.run(NATIVE.block_verify), strict=True
        ):
            assert torch.equal(actual, expected)
        assert not any(memory.any() for memory in shared_workspace.values())


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
    case = replace(build_block_case(10, 3, 64, seed=13), is_selected=torch.ones(10, dtype=torch.bool))
    case = replace(case, num_draft=case.num_draft.clamp_min(1))
    case = replace(case, **{name: torch.full_like(case.num_draft, value)})
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(ops.block_verify)
        return
    tokens, num_accepted, _ = case.run(ops.block_verify)
    assert ((num_accepted >= 0) & (num_accepted <= case.num_draft.clamp(0, 3))).all()
    is_written = torch.arange(4)[None] <= num_accepted[:, None]
    assert ((tokens[is_written] >= 0) & (tokens[is_written] < 64)).all()
    assert (tokens[~is_written] == UNTOUCHED).all()
