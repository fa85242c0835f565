"""begin_forward: what expand_batch, embed and row_keys give, from one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from begin_cases import BLOCK_SIZE, NUM_TOKENS, flat, random_rows_of, random_tables
from kernel_cases import DTYPES, TRITON

from specengine.kernels import reference
from specengine.kernels.types.program import ForwardStart
from specengine.ops.backend import Backend

# slots, start, q_len, num_logits
BATCHES = {
    "one token": ([1], [5], [1], [1]),
    "a draft": ([2], [7], [2], [1]),
    "ragged": ([2, 0], [14, 0], [3, 17], [2, 17]),
    "no logits": ([0, 2, 1], [0, 3, 60], [4, 1, 2], [0, 1, 0]),
    "an empty sequence": ([0, 1, 2], [7, 7, 7], [2, 0, 5], [2, 0, 1]),
    "a prompt": ([1], [0], [200], [1]),
    "padding": ([1, 0, 2, 2, 1], [9, 3, -1, -2, 10**9], [3, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
    "nobody drafts": ([2, 2], [-1, -2], [0, 0], [0, 0]),
    "nobody": ([], [], [], []),
}
BeginForward = Callable[..., ForwardStart]


def given(
    batch: str, dtype: torch.dtype = torch.float32, width: int = 40, *, has_positions: bool = True
) -> Any:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randint(NUM_TOKENS, (3, 256), generator=generator, dtype=torch.int32)
    block_table = torch.randperm(48, generator=generator).view(3, 16).int()
    lengths = [torch.tensor(each, dtype=torch.int32) for each in BATCHES[batch]]
    tables = random_tables(dtype, width, has_positions=has_positions)
    return (tokens, block_table, *lengths, BLOCK_SIZE, random_rows_of(lengths[0].numel()), *tables)


def check_begin_forward(op: BeginForward, arguments: Any) -> None:
    results, expected = flat(op(*arguments)), flat(reference.begin_forward(*arguments))
    for place, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert ours.dtype == theirs.dtype, place
        assert torch.equal(ours, theirs), place


@pytest.mark.parametrize("batch", BATCHES)
def test_equals_the_reference(ops: Backend, batch: str) -> None:
    check_begin_forward(ops.begin_forward, given(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_positions", [True, False])
def test_every_type_and_width(ops: Backend, dtype: torch.dtype, has_positions: bool) -> None:
    for width in (1, 33, 768):
        check_begin_forward(ops.begin_forward, given("ragged", dtype, width, has_positions=has_positions))


@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_the_three_ops(ops: Backend, batch: str) -> None:
    """Of any backend's own."""
    arguments = given(batch)
    *where, rows, token_table, position_table = arguments
    expanded = ops.expand_batch(*where)
    token_ids, positions, _, q_start, _, logit_rows = expanded
    hidden = ops.embed(token_ids, positions, token_table, position_table)
    start = ops.begin_forward(*arguments)
    expected = [*expanded, hidden]
    if logit_rows.numel():
        keys, decided = ops.row_keys(rows, q_start, positions, logit_rows)
        expected += [*keys, decided]
    assert all(map(torch.equal, flat(start)[: len(expected)], expected))


@pytest.mark.parametrize("batch", BATCHES)
def test_counts_may_be_given_in_two_parts(ops: Backend, batch: str) -> None:
    *where, q_len, num_logits, block_size, rows, token_table, position_table = given(batch)
    num_more = (num_logits > 0).int()
    less = (*where, q_len - num_more, num_logits - num_more, block_size, rows, token_table, position_table)
    expected = flat(reference.begin_forward(*given(batch)))
    results = flat(ops.begin_forward(*less, num_more=num_more))
    assert all(map(torch.equal, results, expected))
    if num_more.any():
        assert not all(map(torch.equal, flat(ops.begin_forward(*less)), expected))


@pytest.mark.triton
@pytest.mark.parametrize("batch", ["ragged", "no logits", "an empty sequence", "padding", "nobody drafts"])
@pytest.mark.parametrize(("num_tokens", "num_logit_rows"), [(30, 30), (40, 20), (23, 60)])
def test_room_for_more_rows_than_there_are(batch: str, num_tokens: int, num_logit_rows: int) -> None:
    """Logit rows of padding are 0 and have the keys of some sequence: nothing that is read there is wild."""
    arguments = given(batch)
    exact = reference.begin_forward(*arguments)
    roomy = TRITON.begin_forward(*arguments, num_tokens=num_tokens, num_logit_rows=num_logit_rows)
    for ours, theirs in zip(flat(roomy), flat(exact), strict=True):
        assert torch.equal(ours[: theirs.shape[0]], theirs)
    count = exact.logit_rows.numel()
    assert roomy.logit_rows.numel() == num_logit_rows
    assert not roomy.logit_rows[count:].any()
    assert roomy.row_keys is not None
    keys, sequences = roomy.row_keys[0], arguments[7]
    for values, known in zip(keys, sequences, strict=True):
        assert torch.isin(values[count:], known).all()


@pytest.mark.triton
@pytest.mark.parametrize("bad", [-1, NUM_TOKENS, 2**31 - 1])
def test_ids_outside_a_table_read_a_row_of_it_on_a_gpu(bad: int) -> None:
    arguments = list(given("one token"))
    arguments[0] = torch.full_like(arguments[0], bad)
    start, table = TRITON.begin_forward(*arguments), arguments[8]
    assert start.hidden is not None
    assert torch.equal(start.hidden[0], table[max(0, min(bad, NUM_TOKENS - 1))] + arguments[9][5])


def test_wrong_arguments_are_named(ops: Backend) -> None:
    tokens, table, slots, start, *rest = given("ragged")
    with pytest.raises(ValueError, match="tokens: expected"):
        ops.begin_forward(tokens.long(), table, slots, start, *rest)
    if ops.name == "triton":
        with pytest.raises(ValueError, match="num_more: expected"):
            ops.begin_forward(tokens, table, slots, start, *rest, num_more=start.long())
    with pytest.raises(ValueError, match="start: expected"):
        ops.begin_forward(tokens, table, slots, start[:1], *rest)
    rows, token_table, position_table = rest[3:]
    where = (tokens, table, slots, start, *rest[:3])
    with pytest.raises(ValueError, match="temperature: expected"):
        ops.begin_forward(*where, rows._replace(temperature=rows.temperature.int()), token_table, None)
    with pytest.raises(ValueError, match="position_table: expected"):
        ops.begin_forward(*where, rows, token_table, position_table[:, :7])


FAULTS = {
    "another slot": lambda given: {2: given[2].flip(0)},
    "a place further": lambda given: {3: given[3] + 1},
    "logits less": lambda given: {5: given[5] - 1},
    "another sequence's seed": lambda given: {7: given[7]._replace(seeds=given[7].seeds.flip(0))},
    "no positions": lambda given: {9: None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*arguments: Any) -> ForwardStart:
        changed = FAULTS[fault](arguments)
        return ops.begin_forward(*[changed.get(place, each) for place, each in enumerate(arguments)])

    with pytest.raises((AssertionError, RuntimeError)):
        check_begin_forward(faulty, given("ragged"))
