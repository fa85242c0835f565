"""match_verify: the longest prefix that plain decoding would have drawn, then plain decoding's next token."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import (
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
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.ops.backend import Backend

UNTOUCHED = -77


@dataclass(frozen=True)
class Case:
    logits: Tensor
    stats: Tensor
    row_start: Tensor
    num_draft: Tensor
    draft_tokens: Tensor
    temperature: Tensor
    seeds: Tensor
    seq_len: Tensor
    is_selected: Tensor

    def run(self, op) -> tuple[Tensor, Tensor, Tensor]:
        count, k = self.draft_tokens.shape
        outputs = (
            torch.full((count, k + 1), UNTOUCHED, dtype=torch.int32),
            torch.full((count,), UNTOUCHED, dtype=torch.int32),
            torch.full((count,), UNTOUCHED, dtype=torch.int32),
        )
        fields = [getattr(self, name) for name in self.__dataclass_fields__]
        before = [field.clone() for field in fields]
        op(*self.arguments, Verdict(*outputs))
        assert all(torch.equal(a, b) or a.is_floating_point() for a, b in zip(fields, before, strict=True))
        assert torch.equal(self.logits.nan_to_num(), before[0].nan_to_num())
        return outputs

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Drafts, SamplingRows, Tensor]:
        """A sequence that is not selected does not run, or is another rule's."""
        drafts = Drafts(self.row_start, self.seq_len, self.num_draft, self.draft_tokens)
        is_other = ~self.is_selected & (self.num_draft > 0) & (torch.arange(len(self.seeds)) % 2 == 0)
        drafted_by = torch.where(self.num_draft > 0, int(Rule.MATCH), int(Rule.REJECTION))
        rows = SamplingRows.empty(len(self.seeds))._replace(
            temperature=self.temperature,
            seeds=self.seeds,
            rule=torch.where(is_other, int(Rule.REJECTION), drafted_by).int(),
        )
        return self.logits, self.stats, drafts, rows, (self.is_selected | is_other).int()

    def take(self, chosen: Tensor) -> Case:
        """The same logits seen by a subset of the sequences, in another order."""
        kept = ("logits", "stats")
        return replace(
            self,
            **{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__ if name not in kept},
        )


def plain_tokens(case: Case, ops: Backend = NATIVE) -> Tensor:
    """What sample_rows draws at every row i of every sequence: `[B, k + 1]` (rows beyond num_draft: row 0)."""
    count, k = case.draft_tokens.shape
    offset = torch.arange(k + 1)[None].minimum(case.num_draft[:, None])
    rows = (case.row_start[:, None] + offset).flatten().long()
    positions = (case.seq_len[:, None] + offset).flatten().int()
    tokens, _ = ops.sample_rows(
        case.logits[rows],
        case.stats[rows],
        case.arguments[3].take(torch.arange(count).repeat_interleave(k + 1)),
        positions,
        rng.STREAM_TARGET,
        torch.zeros_like(positions),
    )
    return tokens.view(count, k + 1)


def build_case(count: int, k: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> Case:
    """Sequences with 0 … k draft tokens whose rows lie anywhere, with gaps; drafts agree with the target's
    own draw with probability 0.7; greedy, cold and hot rows mixed; one sequence in eight not selected."""
    generator = torch.Generator().manual_seed(seed)
    num_draft = torch.randint(0, k + 1, (count,), generator=generator, dtype=torch.int32)
    order = torch.randperm(count, generator=generator)
    row_start = torch.empty(count, dtype=torch.int32)
    row_start[order] = ((num_draft + 2)[order].cumsum(0) - (num_draft + 2)[order]).int()
    logits = random_logits(int((num_draft + 2).sum()), vocab_size, seed, spread)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.5])[torch.randint(0, 4, (count,), generator=generator)]
    row_temperature = torch.ones(logits.shape[0])
    for b in range(count):
        row_temperature[row_start[b] : row_start[b] + num_draft[b] + 1] = temperature[b]
    rows = SamplingRows.empty(logits.shape[0])
    stats = NATIVE.filter_rows(
        logits, rows._replace(temperature=row_temperature, top_k=rows.top_k + 6, top_p=rows.top_p * 0.95)
    )
    case = Case(
        logits,
        stats,
        row_start,
        num_draft,
        torch.randint(0, vocab_size, (count, k), generator=generator, dtype=torch.int32),
        temperature,
        random_seeds(count, seed),
        torch.randint(0, 10000, (count,), generator=generator, dtype=torch.int32),
        torch.rand(count, generator=generator) < 0.875,
    )
    is_copied = torch.rand(count, k, generator=generator) < 0.7
    return replace(
        case, draft_tokens=torch.where(is_copied, plain_tokens(case)[:, :k], case.draft_tokens).int()
    )


def check_match_verify(op, case: Case) -> None:
    """Against the definition, vectorised; draws themselves are checked in test_sample_rows."""
    k = case.draft_tokens.shape[1]
    drawn = plain_tokens(case)
    is_drafted = torch.arange(k)[None] < case.num_draft[:, None]
    is_match = (drawn[:, :k] == case.draft_tokens) & is_drafted
    expected = is_match.int().cumprod(dim=1).sum(dim=1)
    tokens, num_accepted, error = case.run(op)
    is_written = (torch.arange(k + 1)[None] <= expected[:, None]) & case.is_selected[:, None]
    assert torch.equal(num_accepted, torch.where(case.is_selected, expected, UNTOUCHED).int())
    assert torch.equal(tokens, torch.where(is_written, drawn, UNTOUCHED))
    assert torch.equal(error, torch.where(case.is_selected, 0, UNTOUCHED).int())
    chosen = case.is_selected & (case.num_draft > 1)
    assert (expected[chosen] > 0).any(), "nothing was accepted"
    assert (expected[chosen] < case.num_draft[chosen]).any(), "nothing was rejected"


@pytest.mark.parametrize(("count", "k", "vocab_size"), [(4000, 5, 8), (4000, 3, 129), (2000, 8, 40)])
def test_ten_thousand_random_cases(ops: Backend, count: int, k: int, vocab_size: int) -> None:
    check_match_verify(ops.match_verify, build_case(count if ops is NATIVE else count // 200, k, vocab_size))


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize(("count", "k", "vocab_size"), [(800, 5, 8), (800, 3, 129), (400, 8, 40)])
def test_two_thousand_random_cases_in_triton(count: int, k: int, vocab_size: int) -> None:
    check_match_verify(TRITON.match_verify, build_case(count, k, vocab_size, seed=1))


@pytest.mark.parametrize("vocab_size", [2, 129, 300])
def test_equals_the_reference(every_ops: Backend, vocab_size: int) -> None:
    case = build_case(60 if every_ops is NATIVE else 12, 4, vocab_size)
    for actual, expected in zip(
        case.run(every_ops.match_verify), case.run(reference.match_verify), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_all_vocabularies(ops: Backend, vocab_size: int) -> None:
    """And the draws are those of the backend's own sample_rows."""
    case = build_case(12 if ops is NATIVE else 3, 3, vocab_size, seed=3)
    tokens, num_accepted, _ = case.run(ops.match_verify)
    drawn = plain_tokens(case, ops)
    for b in case.is_selected.nonzero()[:, 0].tolist():
        n = int(num_accepted[b])
        assert torch.equal(tokens[b, : n + 1], drawn[b, : n + 1])
        assert n == case.num_draft[b] or drawn[b, n] != case.draft_tokens[b, n]


def test_perfect_drafts_are_accepted_and_wrong_ones_stop_where_they_are_wrong(every_ops: Backend) -> None:
    count = 40 if every_ops is NATIVE else 10
    case = build_case(count, 6, 500)
    case = replace(
        case, num_draft=torch.full_like(case.num_draft, 1), is_selected=torch.ones(count, dtype=torch.bool)
    )
    case = replace(case, draft_tokens=plain_tokens(case)[:, :6].contiguous())
    tokens, num_accepted, _ = case.run(every_ops.match_verify)
    assert (num_accepted == 1).all()
    assert torch.equal(tokens[:, :2], plain_tokens(case)[:, :2])
    wrong = replace(case, draft_tokens=((case.draft_tokens + 1) % 500).int())
    tokens, num_accepted, _ = wrong.run(every_ops.match_verify)
    assert (num_accepted == 0).all()
    assert torch.equal(tokens[:, 0], plain_tokens(case)[:, 0])
    assert (tokens[:, 1:] == UNTOUCHED).all()


def test_a_sequence_keeps_its_result_in_every_batch(ops: Backend) -> None:
    count = 64 if ops is NATIVE else 8
    case = build_case(count, 5, 200)
    together = case.run(ops.match_verify)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, count):
        chosen = torch.randperm(count, generator=generator)[:size]
        for part, whole in zip(case.take(chosen).run(ops.match_verify), together, strict=True):
            assert torch.equal(part, whole[chosen])
    with native_threads(1):
        for part, whole in zip(case.run(ops.match_verify), together, strict=True):
            assert torch.equal(part, whole)


def test_no_draft_is_plain_decoding(ops: Backend) -> None:
    case = build_case(30, 4, 128)
    case = replace(case, num_draft=torch.zeros_like(case.num_draft), draft_tokens=case.draft_tokens[:, :0])
    tokens, num_accepted, _ = case.run(ops.match_verify)
    assert (num_accepted[case.is_selected] == 0).all()
    assert torch.equal(tokens[case.is_selected], plain_tokens(case)[case.is_selected])


def test_bad_rows_set_the_error_only_where_they_were_used(ops: Backend) -> None:
    logits = random_logits(4, 300)
    logits[1] = float("nan")
    logits[3] = NEGATIVE_INFINITY
    temperature = torch.tensor([1.0, 0.0])
    stats = unfiltered_stats(logits, temperature.repeat_interleave(2))
    case = Case(
        logits,
        stats,
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        temperature,
        random_seeds(2),
        torch.tensor([9, 9], dtype=torch.int32),
        torch.ones(2, dtype=torch.bool),
    )
    drawn = plain_tokens(case)
    stopped = replace(case, draft_tokens=(drawn[:, :1] + 1) % 300)
    tokens, num_accepted, error = stopped.run(ops.match_verify)
    assert error.tolist() == [0, 0]
    used = replace(case, draft_tokens=drawn[:, :1].contiguous())
    tokens, num_accepted, error = used.run(ops.match_verify)
    assert num_accepted.tolist() == [1, 1]
    assert error.tolist() == [1, 1]
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("token", [-1, 300, 383, 384, 2**31 - 1, -(2**31)])
def test_a_draft_token_outside_the_vocabulary_is_never_accepted(ops: Backend, token: int) -> None:
    case = build_case(20 if ops is NATIVE else 4, 3, 300)
    padded = torch.nn.functional.pad(case.logits, (0, 84), value=NEGATIVE_INFINITY)
    case = replace(case, logits=padded, draft_tokens=torch.full_like(case.draft_tokens, token))
    _, num_accepted, _ = case.run(ops.match_verify)
    assert (num_accepted[case.is_selected] == 0).all()


def test_strided_rows_and_wrong_arguments(ops: Backend) -> None:
    case = build_case(10, 3, 64)
    wide = torch.full((case.logits.shape[0], 100), 1e9)
    wide[:, :64] = case.logits
    strided = replace(case, logits=wide[:, :64], draft_tokens=case.draft_tokens.T.contiguous().T)
    for actual, expected in zip(strided.run(ops.match_verify), case.run(ops.match_verify), strict=True):
        assert torch.equal(actual, expected)
    wrong = {
        "seeds: expected": {"seeds": case.seeds.int()},
        "draft_tokens: expected": {"draft_tokens": case.draft_tokens.long()},
        "stats: expected": {"stats": case.stats[:-1]},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(ops.match_verify)
    *given, is_running = case.arguments
    with pytest.raises(ValueError, match="is_running: expected"):
        ops.match_verify(*given, is_running.bool(), Verdict(*case.run(ops.match_verify)))


OUT_OF_RANGE = {
    "row_start: rows 999": ("row_start", 999),
    "num_draft: 4": ("num_draft", 4),
    "num_draft: -1": ("num_draft", -1),
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_values_out_of_range(ops: Backend, message: str) -> None:
    """Native names them; Triton, which cannot look, reads and writes nothing that is not there."""
    name, value = OUT_OF_RANGE[message]
    case = replace(build_case(10, 3, 64), is_selected=torch.ones(10, dtype=torch.bool))
    case = replace(case, **{name: torch.full_like(case.num_draft, value)})
    if ops is NATIVE:
        with pytest.raises(ValueError, match=message):
            case.run(ops.match_verify)
        return
    tokens, num_accepted, _ = case.run(ops.match_verify)
    assert ((num_accepted >= 0) & (num_accepted <= case.num_draft.clamp(0, 3))).all()
    is_written = torch.arange(4)[None] <= num_accepted[:, None]
    assert ((tokens[is_written] >= 0) & (tokens[is_written] < 64)).all()
    assert (tokens[~is_written] == UNTOUCHED).all()


def faulty(ops: Backend, fault: str):
    """The backend's match_verify with a fault."""

    def op(logits, stats, drafts, rows, is_running, verdict):
        if fault == "position":
            drafts = drafts._replace(seq_len=drafts.seq_len + 1)
        if fault == "seed":
            rows = rows._replace(seeds=rows.seeds & 0xFFFFFFFF)
        if fault == "row":
            drafts = drafts._replace(row_start=(drafts.row_start - 1).clamp_min(0))
        if fault == "rows that do not run":
            is_running = torch.ones_like(is_running)
        if fault == "rows of another rule":
            rows = rows._replace(rule=torch.zeros_like(rows.rule))
        if fault == "rows without a draft left to their rule":
            is_running = is_running * ((drafts.num_draft > 0) | (rows.rule == Rule.MATCH))
        ops.match_verify(logits, stats, drafts, rows, is_running, verdict)
        if fault == "accepts one too many":
            chosen = verdict.num_accepted != UNTOUCHED
            more = (verdict.num_accepted + 1).minimum(drafts.num_draft)
            verdict.num_accepted[chosen] = more[chosen]

    return op


FAULTS = (
    *("position", "seed", "row", "accepts one too many"),
    *("rows that do not run", "rows of another rule", "rows without a draft left to their rule"),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    case = build_case(200 if ops is NATIVE else 12, 4, 64)
    index = torch.arange(len(case.seeds))
    case = replace(case, is_selected=index > 3, num_draft=case.num_draft * (index != 4))
    with pytest.raises(AssertionError):
        check_match_verify(faulty(ops, fault), case)


@pytest.fixture
def shared_workspace(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """The zeroed memory of Triton's match_verify, the same for every call."""
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.device.judge"), "zeroed", zeroed)
    return kept


@pytest.mark.triton
def test_the_workspace_is_zero_again_whoever_was_selected(
    shared_workspace: dict[torch.dtype, Tensor],
) -> None:
    case = build_case(5, 2, 8200, seed=5)
    for is_selected in (case.is_selected, ~case.is_selected, torch.zeros(5, dtype=torch.bool)):
        chosen = replace(case, is_selected=is_selected)
        for actual, expected in zip(
            chosen.run(TRITON.match_verify), chosen.run(NATIVE.match_verify), strict=True
        ):
            assert torch.equal(actual, expected)
        assert not any(memory.any() for memory in shared_workspace.values())


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("specengine.kernels.device.judge")
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_match_verify(TRITON.match_verify, build_case(8, 2, 12000))
