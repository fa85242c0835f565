"""stage_draft: each drawn token where the next forward and the verification read it, and what it was drawn from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import NATIVE, TRITON
from torch import Tensor

from specengine.kernels import reference
from specengine.ops.backend import Backend

WIDTH = 80
FLAGGED = 3  # the statistics' column of the error flag
WRITTEN = ("tokens", "draft_tokens", "num_draft", "draft_log_probs", "draft_logits", "draft_stats")


@dataclass(frozen=True)
class Case:
    """The arguments of `stage_draft`, in order."""

    step: int
    tokens: Tensor
    slots: Tensor
    seq_len: Tensor
    is_drafting: Tensor
    drawn: Tensor
    drawn_error: Tensor | None
    draft_tokens: Tensor
    num_draft: Tensor
    log_probs: Tensor | None = None
    logits: Tensor | None = None
    stats: Tensor | None = None
    draft_log_probs: Tensor | None = None
    draft_logits: Tensor | None = None
    draft_stats: Tensor | None = None

    def run(self, op) -> dict[str, Tensor]:
        """What was written, in copies; everything else is as it was."""
        given = {
            name: value.clone() if name in WRITTEN and isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
        assert op(*given.values()) is None
        for name, value in before.items():
            assert name in WRITTEN or torch.equal(given[name].nan_to_num(), value.nan_to_num()), name
        return {name: given[name] for name in WRITTEN if isinstance(given[name], Tensor)}


def build_case(
    count: int, k: int, step: int, vocab_size: int = 0, *, has_error: bool = True, seed: int = 0
) -> Case:
    """Two sequences in three draft; the last slot is padding's, and rows drawn for nobody follow the others.

    vocab_size: of the law that is kept; 0 for none
    """
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    is_drafting = (random(3, count) > 0).int()
    slots = torch.randperm(count, generator=generator).int()
    slots[is_drafting == 0] = count
    case = Case(
        step,
        random(1000, count + 1, WIDTH),
        slots,
        random(WIDTH - k, count),
        is_drafting,
        1000 + random(1000, count),
        (random(4, count) == 0).int() if has_error else torch.zeros(count, dtype=torch.int32),
        random(1000, count, k),
        random(k + 1, count),
    )
    if not vocab_size:
        return case
    stats = torch.randn(count, 4, generator=generator)
    stats[:, FLAGGED] = case.drawn_error
    return replace(
        case,
        drawn_error=None,
        log_probs=torch.randn(count, generator=generator),
        logits=torch.randn(count, vocab_size, generator=generator),
        stats=stats,
        draft_log_probs=torch.zeros(count, k),
        draft_logits=torch.zeros(count, k, vocab_size),
        draft_stats=torch.zeros(count, k, 4),
    )


def check_stage_draft(op, case: Case) -> None:
    ours, theirs = case.run(op), case.run(reference.stage_draft)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 9, 33])
def test_equals_the_reference(ops: Backend, count: int, k: int) -> None:
    for step in {0, k // 2, k - 1}:
        check_stage_draft(ops.stage_draft, build_case(count, k, step, seed=step))


@pytest.mark.parametrize("vocab_size", [1, 128, 4095, 4096, 4097, 10000])
def test_the_law_is_kept(ops: Backend, vocab_size: int) -> None:
    check_stage_draft(ops.stage_draft, build_case(5, 3, 1, vocab_size))


def test_many_sequences_keep_their_law(ops: Backend) -> None:
    """Natively enough to be shared by threads."""
    check_stage_draft(ops.stage_draft, build_case(33, 4, 2, 8200 if ops.name == "native" else 300))


def test_parts_of_the_law(ops: Backend) -> None:
    """What has no place is not kept, and what has a place may not come; stats tell of errors all the same."""
    case = build_case(9, 4, 1, 200)
    pairs = ("log_probs", "logits", "stats")
    for name in pairs:
        check_stage_draft(ops.stage_draft, replace(case, **{f"draft_{name}": None}))
    check_stage_draft(ops.stage_draft, replace(case, **{f"draft_{name}": None for name in pairs}))
    no_law = dict.fromkeys(pairs)
    check_stage_draft(ops.stage_draft, replace(build_case(9, 4, 1), **no_law, draft_logits=case.draft_logits))
    flags = torch.ones(9, dtype=torch.int32)
    check_stage_draft(ops.stage_draft, replace(case, drawn_error=flags))


def test_nobody_drafts(ops: Backend) -> None:
    case = build_case(9, 4, 2, 300)
    case = replace(case, is_drafting=torch.zeros_like(case.is_drafting))
    for name, value in case.run(ops.stage_draft).items():
        assert torch.equal(value, getattr(case, name)), name


def test_nobody_at_all(ops: Backend) -> None:
    check_stage_draft(ops.stage_draft, build_case(0, 4, 2))


def test_what_it_says(ops: Backend) -> None:
    """Sequences 0 and 2 draft; the second draw is none. The padding between them is left alone."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    case = Case(
        1,
        torch.zeros(4, 8, dtype=torch.int32),
        integers(2, 3, 0),
        integers(5, 0, 6),
        integers(1, 0, 1),
        integers(11, 12, 13),
        integers(0, 1, 1),
        torch.zeros(3, 2, dtype=torch.int32),
        integers(2, 0, 2),
    )
    result = case.run(ops.stage_draft)
    expected = torch.zeros(4, 8, dtype=torch.int32)
    expected[2, 6], expected[0, 7] = 11, 12
    assert torch.equal(result["tokens"], expected)
    assert result["draft_tokens"].tolist() == [[0, 11], [0, 0], [0, 12]]
    assert result["num_draft"].tolist() == [2, 0, 1]


def test_an_earlier_error_stands(ops: Backend) -> None:
    case = build_case(33, 8, 6)
    case = replace(case, drawn_error=torch.ones_like(case.drawn_error))
    result = case.run(ops.stage_draft)
    is_drafting = case.is_drafting != 0
    assert torch.equal(result["num_draft"][is_drafting], case.num_draft[is_drafting].clamp_max(6))
    assert torch.equal(result["num_draft"][~is_drafting], case.num_draft[~is_drafting])


def test_values_that_are_nobodys_are_not_read(ops: Backend) -> None:
    """Padding's slot and length, and rows beyond those of drafting sequences."""
    case = build_case(9, 4, 1)
    count = int(case.is_drafting.sum())
    expected = case.run(reference.stage_draft)
    slots, seq_len, drawn = case.slots.clone(), case.seq_len.clone(), case.drawn.clone()
    slots[case.is_drafting == 0], seq_len[case.is_drafting == 0], drawn[count:] = 2**31 - 1, -(2**31), -5
    error = case.drawn_error.clone()
    error[count:] = 1
    actual = replace(case, slots=slots, seq_len=seq_len, drawn=drawn, drawn_error=error).run(ops.stage_draft)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_rows_may_be_strided(ops: Backend) -> None:
    case = build_case(9, 4, 2, 300)
    expected = case.run(ops.stage_draft)
    wide, wider = torch.full((9, 320), 7.0), torch.full((9, 4, 330), 7.0)
    wide[:, :300], wider[:, :, :300] = case.logits, 0.0
    strided = replace(case, logits=wide[:, :300], draft_logits=wider[:, :, :300])
    given = {
        **vars(strided),
        **{name: getattr(case, name).clone() for name in WRITTEN if name != "draft_logits"},
    }
    ops.stage_draft(*given.values())
    assert torch.equal(wider[:, :, :300], expected["draft_logits"])
    assert (wider[:, :, 300:] == 7.0).all()


@pytest.mark.triton
def test_a_draft_without_a_row_is_left_alone() -> None:
    """Triton cannot count the drafting sequences before it begins."""
    case = build_case(9, 4, 1, has_error=False)
    case = replace(
        case, is_drafting=torch.ones_like(case.is_drafting), slots=torch.arange(9, dtype=torch.int32)
    )
    few = replace(case, drawn=case.drawn[:4], drawn_error=case.drawn_error[:4])
    only = replace(case, is_drafting=(torch.arange(9) < 4).int())
    expected = only.run(reference.stage_draft)
    for name, value in few.run(TRITON.stage_draft).items():
        assert torch.equal(value, expected[name]), name


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = build_case(4, 3, 1, 200)
    wrong = {
        "tokens: expected": {"tokens": case.tokens.long()},
        "slots: expected": {"slots": case.slots.long()},
        "seq_len: expected": {"seq_len": case.seq_len[:-1]},
        "is_drafting: expected": {"is_drafting": case.is_drafting.bool()},
        "drawn: expected": {"drawn": case.drawn.long()},
        "draft_tokens: expected": {"draft_tokens": case.draft_tokens.long()},
        "num_draft: expected": {"num_draft": case.num_draft[:-1]},
        "log_probs: expected": {"log_probs": case.log_probs[:-1]},
        "logits: expected": {"logits": case.logits.double()},
        "stats: expected": {"stats": case.stats[:, :3]},
        "draft_log_probs: expected": {"draft_log_probs": case.draft_log_probs[:, :2]},
        "draft_logits: ": {"draft_logits": case.draft_logits[:, :, :100]},
        "draft_stats: expected": {"draft_stats": case.draft_stats[:3]},
        "drawn_error: give": {"drawn_error": None, "stats": None},
        "drawn_error: expected": {"drawn_error": case.drawn.long(), "stats": None},
        "step: 3": {"step": 3},
        "step: -1": {"step": -1},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            ops.stage_draft(*vars(replace(case, **change)).values())


def test_a_place_that_is_not_there() -> None:
    """Native names it, before anything is written."""
    case = build_case(9, 4, 2, 100)
    last = int(case.is_drafting.nonzero()[-1])
    wrong = {
        "slots: 10 at": {"slots": 10},
        "slots: -1 at": {"slots": -1},
        f"seq_len \\+ step: {WIDTH} at": {"seq_len": WIDTH - 2},
        "seq_len \\+ step: -1 at": {"seq_len": -3},
    }
    for message, change in wrong.items():
        for name, value in change.items():
            values = getattr(case, name).clone()
            values[last] = value
            given = {
                name: each.clone() if isinstance(each, Tensor) else each for name, each in vars(case).items()
            }
            given[name] = values
            with pytest.raises(ValueError, match=message):
                NATIVE.stage_draft(*given.values())
            for written in WRITTEN:
                assert torch.equal(given[written], getattr(case, written))
    few = replace(case, is_drafting=torch.ones_like(case.is_drafting), slots=case.slots.clamp_max(8))
    rows = {name: getattr(few, name)[:3] for name in ("drawn", "log_probs", "logits", "stats")}
    with pytest.raises(ValueError, match="drawn: 3 rows for 9 drafting sequences"):
        NATIVE.stage_draft(*vars(replace(few, **rows)).values())


FAULTS = {
    "the next place": lambda case: {"seq_len": case.seq_len + 1},
    "the next draft": lambda case: {"step": case.step + 1},
    "everybody drafts": lambda case: {"is_drafting": torch.ones_like(case.is_drafting)},
    "another sequence's row": lambda case: {"drawn": case.drawn.roll(1)},
    "no errors": lambda case: {"stats": case.stats * torch.tensor([1.0, 1.0, 1.0, 0.0])},
    "a token of the law": lambda case: {
        "logits": case.logits + torch.nn.functional.pad(torch.ones(1), (199, 0))
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*arguments):
        case = Case(*arguments)
        return ops.stage_draft(*{**vars(case), **FAULTS[fault](case)}.values())

    case = replace(build_case(33, 4, 1, 200), num_draft=torch.full((33,), 4, dtype=torch.int32))
    with pytest.raises(AssertionError):
        check_stage_draft(faulty, case)


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("specengine.kernels.stage_draft")
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_stage_draft(TRITON.stage_draft, build_case(3, 2, 1, 5000))
