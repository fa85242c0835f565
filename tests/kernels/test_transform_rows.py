"""transform_rows: each row gets what its sequence asks for at the position that it decides, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import NATIVE, NEGATIVE_INFINITY, TRITON, VOCABULARIES, random_logits
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms
from specengine.ops.backend import Backend

NUM_SLOTS = 5
FOREVER = 2**31 - 1
Entry = tuple[int, float, int, int] | tuple[int, float, int, int, tuple[int, ...]]


class Case(NamedTuple):
    """The arguments of the op."""

    logits: Tensor
    rows: SamplingRows
    slots: Tensor
    q_start: Tensor
    positions: Tensor
    logit_rows: Tensor
    transforms: Transforms


HISTORY = torch.randint(
    0, 100, (NUM_SLOTS, 64), generator=torch.Generator().manual_seed(5), dtype=torch.int32
)


def build_tables(entries: dict[int, list[Entry]], capacity: int | None = None) -> Transforms:
    """Tables of these entries by slot; what is beyond a slot's number of entries would be noticed."""
    capacity = capacity or max(1, *map(len, entries.values()))
    shape = (NUM_SLOTS, capacity)
    token, first, end, start, length = (torch.zeros(shape, dtype=torch.int32) for _ in range(5))
    prefix = torch.zeros(NUM_SLOTS, 64, dtype=torch.int32)
    value, count = torch.full(shape, 1e9), torch.zeros(NUM_SLOTS, dtype=torch.int32)
    end += FOREVER
    for slot, listed in entries.items():
        count[slot] = len(listed)
        for at, entry in enumerate(sorted(listed, key=lambda each: each[0])):
            token[slot, at], value[slot, at], first[slot, at], end[slot, at] = entry[:4]
            words = entry[4] if len(entry) > 4 else ()
            start[slot, at], length[slot, at] = length[slot, :at].sum(), len(words)
            prefix[slot, start[slot, at] :][: len(words)] = torch.tensor(words, dtype=torch.int32)
    return Transforms(HISTORY.clone(), count, token, value, first, end, start, length, prefix)


def build_case(
    vocab_size: int,
    tables: Transforms,
    slots: tuple[int, ...] = (3, 0, 1, 4),
    q_len: tuple[int, ...] = (2, 1, 4, 3),
    logit_rows: tuple[int, ...] | None = None,
) -> Case:
    """Sequence b decides the positions after 10 b, 10 b + 1, …; the rows of all its tokens unless said otherwise."""
    starts = torch.tensor([0, *q_len]).cumsum(0).int()
    positions = torch.cat([torch.arange(count) + 10 * b for b, count in enumerate(q_len)]).int()
    chosen = (
        torch.arange(len(positions)) if logit_rows is None else torch.tensor(logit_rows, dtype=torch.int64)
    )
    slot = torch.tensor(slots, dtype=torch.int32)
    rows = SamplingRows.empty(len(slots))
    logits = random_logits(len(chosen), vocab_size, seed=vocab_size)
    return Case(logits, rows, slot, starts, positions, chosen, tables)


def random_entries(vocab_size: int, count: int, seed: int) -> list[Entry]:
    """Some for one token, some that hold for a few positions, some bans."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (count,), generator=generator).tolist()
    first = torch.randint(0, 35, (count,), generator=generator).tolist()
    values = (torch.randn(count, generator=generator) * 9).tolist()
    return [
        (token, NEGATIVE_INFINITY if at % 7 == 3 else value, start * (at % 2), start + 5 * (at % 3) + 1)
        for at, (token, value, start) in enumerate(zip(tokens, values, first, strict=True))
    ]


def mixed_case(vocab_size: int, logit_rows: tuple[int, ...] | None = None) -> Case:
    """Slots with hundreds of entries, with a few, with none; entries after prefixes; penalties beside none."""
    counts = {0: 130, 1: 7, 3: 1, 4: 0}
    entries = {slot: random_entries(vocab_size, n, slot) for slot, n in counts.items()}
    for slot, position, length in ((1, 22, 1), (1, 22, 3), (1, 24, 20), (1, 23, 0), (3, 2, 2), (4, 33, 17)):
        before = tuple(HISTORY[slot, position - length : position].tolist())
        wrong = (*before[:-1], 101) if length == 3 else before
        entries[slot].append((len(before) % vocab_size, 7.0, 0, FOREVER, before))
        entries[slot].append((vocab_size - 1, 3.0, 0, FOREVER, wrong))
    return penalised(build_case(vocab_size, build_tables(entries), logit_rows=logit_rows))


def penalised(case: Case) -> Case:
    case.rows.repetition_penalty[:] = torch.tensor([1.3, 1.0, 0.7, 30.0])
    case.rows.presence_penalty[:] = torch.tensor([0.0, -0.3, 0.0, 1.7])
    case.rows.frequency_penalty[:] = torch.tensor([0.0, 0.0, 0.9, -0.13])
    case.rows.prompt_length[:] = torch.tensor([1, 3, 5, 8])
    return case


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def check_transform(op: Callable[..., Tensor], case: Case) -> None:
    before = case.logits.clone()
    actual = op(*case)
    assert actual.dtype == torch.float32
    assert torch.equal(bits(actual), bits(reference.transform_rows(*case)))
    assert torch.equal(bits(case.logits), bits(before)), "the logits were written"


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_equals_the_reference(ops: Backend, vocab_size: int) -> None:
    check_transform(ops.transform_rows, mixed_case(vocab_size))


@pytest.mark.parametrize("rows", [(1, 2, 6, 9), (0,), (3, 4, 8), ()])
def test_some_rows_of_each(ops: Backend, rows: tuple[int, ...]) -> None:
    check_transform(ops.transform_rows, mixed_case(300, rows))


def test_what_it_says(ops: Backend) -> None:
    """Entries hold from their first position to the one before their end, and add up in the order that they have."""
    huge, two = 2.0**24, 2.0
    tables = build_tables(
        {
            3: [(7, 1.5, 0, FOREVER), (9, NEGATIVE_INFINITY, 0, 2)],
            1: [
                (128, huge, 22, FOREVER),
                (128, two, 0, FOREVER),
                (128, -huge, 0, FOREVER),
                (500, 1.0, 0, 99),
            ],
        }
    )
    case = build_case(300, tables, slots=(3, 1), q_len=(2, 3))
    case = case._replace(positions=torch.tensor([0, 1, 20, 21, 22], dtype=torch.int32))
    case.logits[:] = 1.0
    expected = torch.ones(5, 300)
    expected[:2, 7] = 2.5  # decides positions 1 and 2
    expected[0, 9] = NEGATIVE_INFINITY
    expected[2, 128] = 1.0 + two - huge  # decides position 21
    expected[3:, 128] = torch.tensor(1.0) + huge + two - huge
    assert torch.equal(ops.transform_rows(*case), expected)


def test_what_a_prefix_says(ops: Backend) -> None:
    """An entry holds where its prefix stands right before the position: all of it, and nowhere else."""
    tables = build_tables(
        {
            0: [
                (5, NEGATIVE_INFINITY, 0, FOREVER, (7, 8)),
                (6, 1.0, 0, 4, (8,)),
                (6, 1.0, 0, FOREVER, (1, 7, 8)),
                (200, 2.0, 0, FOREVER, (0, 7, 8)),
            ]
        }
    )
    tables.history[0, :6] = torch.tensor([7, 8, 7, 9, 7, 8])
    case = build_case(300, tables, slots=(0,), q_len=(6,))
    case.logits[:] = 0.0
    expected = torch.zeros(6, 300)
    expected[[1, 5], 5] = NEGATIVE_INFINITY  # positions 2 and 6
    expected[1, 6] = 1.0
    assert torch.equal(ops.transform_rows(*case), expected)


def test_what_is_not_asked_for_is_left_as_it_is(ops: Backend) -> None:
    """Minus zero, NaN and the infinities included."""
    case = build_case(300, build_tables({3: [(1, 0.0, 0, 1), (2, 0.0, 0, FOREVER)]}))
    case.logits[:, :8] = torch.tensor([-0.0, -0.0, -0.0, float("nan"), float("inf"), NEGATIVE_INFINITY, 0, 1])
    actual = ops.transform_rows(*case)
    assert torch.equal(bits(actual[:, [0, 1, 3, 4, 5]]), bits(case.logits[:, [0, 1, 3, 4, 5]]))
    assert torch.equal(bits(actual[:2, 2]), torch.zeros(2, dtype=torch.int32))  # -0 + 0 = +0
    assert torch.equal(bits(actual[2:]), bits(case.logits[2:]))


def test_what_a_penalty_says(ops: Backend) -> None:
    """A token that stands anywhere before the position is penalised once, what stands from there on is not; then come
    the entries."""
    tables = build_tables({0: [(3, 10.0, 0, FOREVER)]})
    tables.history[0, :6] = torch.tensor([3, 200, 3, 8, 250, 299])
    case = build_case(300, tables, slots=(0, 0), q_len=(2, 3))
    case = case._replace(positions=torch.tensor([3, 4, 1, 2, 3], dtype=torch.int32))
    case.rows.repetition_penalty[:] = torch.tensor([2.0, 1.0])
    case.logits[:] = torch.where(torch.arange(300) % 2 == 0, -3.0, 3.0)
    case.logits[:, 250] = 0.0
    expected = case.logits.clone()
    expected[:2, [3, 200, 8]] = torch.tensor([1.5, -6.0, -6.0])  # positions 4 and 5
    expected[:, 3] += 10.0
    assert torch.equal(ops.transform_rows(*case), expected)


def test_what_counting_penalties_say(ops: Backend) -> None:
    """What was generated before the position is counted, the prompt is not; a repetition penalty comes before, and
    sees both."""
    tables = build_tables({0: [(3, 10.0, 0, FOREVER)]})
    tables.history[0, :7] = torch.tensor([250, 3, 8, 3, 8, 3, 299])
    case = build_case(300, tables, slots=(0, 0), q_len=(3, 2))
    case = case._replace(positions=torch.tensor([1, 4, 5, 0, 5], dtype=torch.int32))
    case.rows.repetition_penalty[:] = torch.tensor([1.0, 2.0])
    case.rows.presence_penalty[:] = torch.tensor([0.25, 0.0])
    case.rows.frequency_penalty[:] = torch.tensor([2.0, -1.0])
    case.rows.prompt_length[:] = torch.tensor([2, 4])
    case.logits[:] = -3.0
    expected = case.logits.clone()
    expected[1, [3, 8]] = torch.tensor([-5.25, -7.25])  # position 5: generated 8, 3, 8
    expected[2, [3, 8]] = torch.tensor([-7.25, -7.25])
    expected[3:, 250] = -6.0
    expected[4, [3, 8]] = torch.tensor([-5.0, -5.0])
    expected[:, 3] += 10.0
    assert torch.equal(ops.transform_rows(*case), expected)


@pytest.mark.parametrize("vocab_size", [1, 129, 5000])
def test_penalties_over_long_histories(ops: Backend, vocab_size: int) -> None:
    """Tokens that repeat, of every tile, and some that the vocabulary does not have."""
    tables = build_tables({0: random_entries(vocab_size, 9, 0)})
    generator = torch.Generator().manual_seed(8)
    history = torch.randint(0, vocab_size + 1, (NUM_SLOTS, 1200), generator=generator, dtype=torch.int32)
    case = penalised(build_case(vocab_size, tables._replace(history=history)))
    check_transform(ops.transform_rows, case._replace(positions=case.positions * 34))


def test_rows_are_invariant(ops: Backend) -> None:
    """Alone, and in any other batch: the bits are those of the whole."""
    case = mixed_case(1500)
    together = ops.transform_rows(*case)
    for row in range(len(case.logit_rows)):
        alone = case._replace(logits=case.logits[row : row + 1], logit_rows=case.logit_rows[row : row + 1])
        assert torch.equal(bits(ops.transform_rows(*alone)[0]), bits(together[row]))


def test_rows_with_a_stride(ops: Backend) -> None:
    case = mixed_case(300)
    wide = torch.zeros(len(case.logits), 512)
    wide[:, :300] = case.logits
    check_transform(ops.transform_rows, case._replace(logits=wide[:, :300]))


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("num_rows", [0, 1, 9, 10, 14])
def test_padding_is_left_alone(num_rows: int) -> None:
    """Whatever its logit rows say."""
    case = mixed_case(300)
    used = min(num_rows, 10)
    rows = torch.full((14,), 2**40)
    rows[1::2] = -(2**40)
    rows[:10] = case.logit_rows
    logits = torch.cat([case.logits, torch.zeros(4, 300)])
    count = torch.tensor([num_rows], dtype=torch.int32)
    padded = TRITON.transform_rows(*case._replace(logits=logits, logit_rows=rows), num_rows=count)
    assert torch.equal(bits(padded[:used]), bits(reference.transform_rows(*case)[:used]))
    assert padded[num_rows:].isnan().all()


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = mixed_case(300)
    tables = case.transforms
    wrong: dict[str, dict[str, Any]] = {
        "logits": {"logits": case.logits.double()},
        "slots": {"slots": case.slots.long()},
        "repetition_penalty": {
            "rows": case.rows._replace(repetition_penalty=case.rows.repetition_penalty.double())
        },
        "presence_penalty": {"rows": case.rows._replace(presence_penalty=case.rows.presence_penalty[1:])},
        "frequency_penalty": {
            "rows": case.rows._replace(frequency_penalty=case.rows.frequency_penalty.int())
        },
        "prompt_length": {"rows": case.rows._replace(prompt_length=case.rows.prompt_length.long())},
        "history": {"transforms": tables._replace(history=tables.history.long())},
        "q_start": {"q_start": case.q_start[:-1]},
        "positions": {"positions": case.positions.long()},
        "logit_rows": {"logit_rows": case.logit_rows[:-1]},
        "num_entries": {"transforms": tables._replace(num_entries=tables.num_entries[1:])},
        "token": {"transforms": tables._replace(token=tables.token.long())},
        "value": {"transforms": tables._replace(value=tables.value.double())},
        "first": {"transforms": tables._replace(first=tables.first[:, 1:])},
        "end": {"transforms": tables._replace(end=tables.end[1:])},
        "prefix_start": {"transforms": tables._replace(prefix_start=tables.prefix_start[1:])},
        "prefix_length": {"transforms": tables._replace(prefix_length=tables.prefix_length.long())},
        "prefix": {"transforms": tables._replace(prefix=tables.prefix[1:])},
    }
    for name, change in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ops.transform_rows(*case._replace(**change))


def test_numbers_that_index_memory_are_checked() -> None:
    """Natively; on a GPU nobody looks."""
    case = mixed_case(300)
    tables = case.transforms
    capacity = tables.token.shape[1]
    wrong: dict[str, dict[str, Any]] = {
        "slots: 5 at index 0": {"slots": case.slots.masked_fill(case.slots == 3, NUM_SLOTS)},
        "logit_rows: 10 at index 9": {"logit_rows": case.logit_rows + (case.logit_rows == 9)},
        "positions: 65 at index 9": {"positions": case.positions + 32 * (case.positions == 32).int()},
        f"num_entries: {capacity + 1} at index 2": {
            "transforms": tables._replace(num_entries=torch.tensor([capacity + 1, 0, 0, 0, 0]).int())
        },
        "prefix_length: 65 at index 0": {
            "transforms": tables._replace(prefix_length=torch.full_like(tables.prefix_length, 65))
        },
        "prefix_start: -65 at index 0": {
            "transforms": tables._replace(prefix_start=tables.prefix_start - 65)
        },
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            NATIVE.transform_rows(*case._replace(**change))


FAULTS: dict[str, Callable[[Case], Case]] = {
    "the sequence's before": lambda case: case._replace(q_start=(case.q_start + 1) * (case.q_start > 0)),
    "a position too late": lambda case: case._replace(positions=case.positions + 1),
    "the sequence's own penalty is another's": lambda case: case._replace(
        rows=case.rows._replace(repetition_penalty=case.rows.repetition_penalty.roll(1))
    ),
    "the prompt counts as well": lambda case: case._replace(
        rows=case.rows._replace(prompt_length=torch.zeros_like(case.rows.prompt_length))
    ),
    "the slot's index in the batch": lambda case: case._replace(slots=torch.arange(4, dtype=torch.int32)),
    "a prefix too short": lambda case: case._replace(
        transforms=case.transforms._replace(prefix_length=(case.transforms.prefix_length - 1).clamp_min(0))
    ),
    "an entry too few": lambda case: case._replace(
        transforms=case.transforms._replace(num_entries=(case.transforms.num_entries - 1).clamp_min(0))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    with pytest.raises(AssertionError):
        check_transform(lambda *case: ops.transform_rows(*FAULTS[fault](Case(*case))), mixed_case(300))
