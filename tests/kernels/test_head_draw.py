"""head_draw: the bits of head, filter_rows and sample_rows, with no logits stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    NATIVE,
    TRITON,
    Layer,
    native_threads,
    random_layer,
    random_rows,
    random_tokens,
)
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.statistics import STAT_ERROR
from specengine.ops.backend import Backend

NUM_ROWS = 17
WIDTH = 48
HeadDraw = Callable[..., tuple[Tensor, Tensor]]


def keys(num_rows: int, *, seed: int = 0) -> tuple[SamplingRows, Tensor]:
    """Temperatures (every third row greedy), filters (none on every second row), seeds of all 64 bits, positions."""
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand(num_rows, generator=generator) + 0.3
    temperature[::3] = 0.0
    top_k = torch.randint(0, 40, (num_rows,), generator=generator).int() * 3
    top_p = 1.0 - 0.6 * torch.rand(num_rows, generator=generator)
    min_p = 0.05 * torch.rand(num_rows, generator=generator)
    top_k[::2], top_p[::2], min_p[::2] = 0, 1.0, 0.0
    top_k[1::6], top_p[1::6], min_p[3::8] = 0, 1.0, 0.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**20, (num_rows,), generator=generator).int()
    rows = SamplingRows.empty(num_rows)._replace(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds
    )
    return rows, positions


def draw_from_logits(
    ops: Backend,
    hidden: Tensor,
    layer: Layer,
    vocab_size: int,
    rows: SamplingRows,
    positions: Tensor,
    *,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The three ops that head_draw replaces."""
    logits = ops.head(hidden, layer.norm, layer.packed, vocab_size, token_ids=token_ids)
    stats = ops.filter_rows(logits, rows)
    base = torch.zeros_like(positions)
    tokens, _ = ops.sample_rows(logits, stats, rows, positions, rng.STREAM_TARGET, base)
    return tokens, stats[:, STAT_ERROR].int()


def check_bits(
    ops: Backend,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    extra: int = 0,
    has_filters: bool = True,
    num_tokens: int | None = None,
    op: HeadDraw | None = None,
) -> None:
    """num_tokens: the head has only so many of the tokens"""
    token_ids = None if num_tokens is None else random_tokens(num_tokens, vocab_size + extra)
    layer = random_layer(WIDTH, vocab_size + extra, dtype, has_bias=False, ops=ops, chosen=token_ids)
    hidden, (rows, positions) = random_rows(NUM_ROWS, WIDTH), keys(NUM_ROWS)
    if not has_filters:
        rows = rows.without_filters()
    head = (hidden, layer.norm, layer.packed, vocab_size)
    tokens, error = (op or ops.head_draw)(
        *head, rows, positions, has_filters=has_filters, token_ids=token_ids
    )
    expected, expected_error = draw_from_logits(
        ops, hidden, layer, vocab_size, rows, positions, token_ids=token_ids
    )
    assert torch.equal(error, expected_error)
    assert torch.equal(tokens[error == 0], expected[error == 0])
    assert num_tokens is not None or not error.any()


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 500, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_the_bits_of_the_ops_it_replaces(vocab_size: int, dtype: torch.dtype) -> None:
    for extra in (0, 7):
        check_bits(NATIVE, vocab_size, dtype, extra=extra)
        check_bits(NATIVE, vocab_size, dtype, extra=extra, has_filters=False)


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 400])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_a_head_of_some_tokens(num_tokens: int, dtype: torch.dtype) -> None:
    """Each with the noise of its own id."""
    for vocab_size, extra in ((400, 0), (1000, 7), (1, 700)):
        for has_filters in (True, False):
            check_bits(NATIVE, vocab_size, dtype, extra=extra, has_filters=has_filters, num_tokens=num_tokens)


@pytest.mark.triton
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 300), (129, 300), (200, 290), (3, 1)])
@pytest.mark.parametrize("has_filters", [True, False])
def test_a_head_of_some_tokens_on_triton(num_tokens: int, vocab_size: int, has_filters: bool) -> None:
    size = {"extra": 300 - vocab_size, "num_tokens": num_tokens}
    check_bits(TRITON, vocab_size, torch.float32, has_filters=has_filters, **size)


@pytest.mark.parametrize("has_filters", [True, False])
def test_some_tokens_draw_as_a_head_of_all_whose_others_are_out(ops: Backend, has_filters: bool) -> None:
    token_ids = random_tokens(150, 500)
    some = random_layer(WIDTH, 500, torch.float32, has_bias=False, ops=ops, chosen=token_ids)
    whole = random_layer(WIDTH, 500, torch.float32, has_bias=False, ops=ops)
    without = torch.full((500,), float("-inf"))
    without[token_ids.long()] = 0.0
    masked = replace(whole.packed, bias=ops.pack_linear(torch.zeros(500, WIDTH), without).bias)
    hidden, (rows, positions) = random_rows(NUM_ROWS, WIDTH), keys(NUM_ROWS)
    drawn = (rows if has_filters else rows.without_filters(), positions)
    options = {"has_filters": has_filters}
    tokens, error = ops.head_draw(hidden, some.norm, some.packed, 500, *drawn, **options, token_ids=token_ids)
    expected, _ = ops.head_draw(hidden, whole.norm, masked, 500, *drawn, **options)
    assert torch.equal(tokens, expected)
    assert not error.any()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [*((size, torch.float32) for size in (1, 127, 128, 500)), (129, torch.bfloat16), (300, torch.float16)],
)
def test_the_bits_of_the_ops_it_replaces_on_triton(vocab_size: int, dtype: torch.dtype) -> None:
    check_bits(TRITON, vocab_size, dtype, extra=7, has_filters=False)


@pytest.mark.parametrize("vocab_size", [8191, 50257])
@pytest.mark.usefixtures("instruction_set")
def test_large_vocabularies(vocab_size: int) -> None:
    check_bits(NATIVE, vocab_size, torch.bfloat16)


@pytest.mark.parametrize("has_filters", [True, False])
def test_the_draws_of_the_reference(ops: Backend, has_filters: bool) -> None:
    layer = random_layer(WIDTH, 700, torch.float32, has_bias=False, ops=ops)
    count = 64 if ops is NATIVE else 17
    hidden, (rows, positions) = random_rows(count, WIDTH), keys(count)
    drawn = (rows if has_filters else rows.without_filters(), positions)
    tokens, error = ops.head_draw(hidden, layer.norm, layer.packed, 699, *drawn, has_filters=has_filters)
    exact, exact_error = reference.head_draw(
        hidden.double(), layer.norm, layer.plain, 699, *drawn, has_filters=has_filters
    )
    assert torch.equal(tokens, exact), "no two tokens of these rows are closer than fp32 can tell"
    assert torch.equal(error, exact_error)


@pytest.mark.usefixtures("instruction_set")
def test_a_row_keeps_its_bits_whatever_is_computed_with_it() -> None:
    layer = random_layer(WIDTH, 3000, torch.bfloat16, has_bias=False)
    hidden, drawn = random_rows(64, WIDTH), keys(64)
    together, _ = NATIVE.head_draw(hidden, layer.norm, layer.packed, 3000, *drawn)
    for chosen in ([5], [63, 0], list(range(9)), list(range(63, -1, -1))):
        some = (drawn[0].take(torch.tensor(chosen)), drawn[1][chosen].contiguous())
        tokens, _ = NATIVE.head_draw(hidden[chosen].contiguous(), layer.norm, layer.packed, 3000, *some)
        assert torch.equal(tokens, together[chosen])
    for count in (1, 2, 3):
        with native_threads(count):
            assert torch.equal(NATIVE.head_draw(hidden, layer.norm, layer.packed, 3000, *drawn)[0], together)


@pytest.mark.triton
def test_padded_rows_are_left_alone_and_keys_return_to_zero() -> None:
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=TRITON)
    hidden, (rows, positions) = random_rows(20, WIDTH), keys(20)
    limit = torch.tensor([5], dtype=torch.int32)
    drawn, few = (rows, positions), (rows.take(slice(5)), positions[:5])
    off = {"has_filters": False}
    poisoned = torch.cat((hidden[:5], torch.full_like(hidden[5:], float("nan"))))
    for _ in range(2):
        tokens, error = TRITON.head_draw(
            poisoned, layer.norm, layer.packed, 300, *drawn, **off, num_rows=limit
        )
        expected, _ = TRITON.head_draw(hidden[:5], layer.norm, layer.packed, 300, *few, **off)
        assert torch.equal(tokens[:5], expected)
        assert not error[:5].any()


def build_staging(is_drafting: list[int], k: int = 3) -> Staging:
    """Sequences in any slots; whoever drafts has drafts to lose, and of the others nothing may be written."""
    count = len(is_drafting)
    generator = torch.Generator().manual_seed(count)
    slots = torch.randperm(count + 1, generator=generator)[:count].int()
    seq_len = torch.randint(3, 20, (count,), generator=generator, dtype=torch.int32)
    wanted, left = torch.tensor(is_drafting, dtype=torch.int32), torch.full((count, k), -7, dtype=torch.int32)
    tokens = torch.full((count + 1, 30), -7, dtype=torch.int32)
    return Staging(1, tokens, slots, seq_len, wanted, left, torch.full_like(wanted, k))


def check_staging(
    count: int, is_drafting: list[int], *, has_filters: bool = False, op: HeadDraw = TRITON.head_draw
) -> None:
    """What `stage_draft` makes of the same draws; every fourth row is an error, and rows beyond those who draft are
    padding."""
    layer = random_layer(WIDTH, 300, torch.float32, has_bias=False, ops=TRITON)
    hidden, drawn = random_rows(count, WIDTH), keys(count)
    hidden[2::4] = float("nan")
    staging, apart = build_staging(is_drafting), build_staging(is_drafting)
    options = {"has_filters": has_filters}
    if sum(is_drafting) < count:
        options["num_rows"] = torch.tensor([sum(is_drafting)], dtype=torch.int32)
    tokens, error = op(hidden, layer.norm, layer.packed, 300, *drawn, **options, staging=staging)
    expected, expected_error = TRITON.head_draw(hidden, layer.norm, layer.packed, 300, *drawn, **options)
    step, state, slots, seq_len, wanted, *drafts = apart
    reference.stage_draft(step, state, slots, seq_len, wanted, expected, expected_error, *drafts)
    num_drawn = min(sum(is_drafting), count)
    assert torch.equal(tokens[:num_drawn], expected[:num_drawn])
    assert torch.equal(error[:num_drawn], expected_error[:num_drawn])
    for name, ours, theirs in zip(Staging._fields[1:], staging[1:], apart[1:], strict=True):
        assert torch.equal(ours, theirs), name
    assert (staging.num_draft == staging.step).any() == (num_drawn > 2)
    assert (staging.tokens >= 0).sum() == num_drawn


@pytest.mark.triton
@pytest.mark.parametrize(
    ("count", "is_drafting"),
    [
        (1, [1]),
        (3, [0, 1, 1, 0, 1]),
        (8, [1, 0, 1, 1, 1, 0, 0, 1]),
        (16, [1] * 16),
        (40, [0, 1] * 12 + [1] * 9),  # three tiles of rows, the last of padding
    ],
)
@pytest.mark.parametrize("has_filters", [True, False])
def test_draws_are_staged_as_stage_draft_does_it(
    count: int, is_drafting: list[int], has_filters: bool
) -> None:
    check_staging(count, is_drafting, has_filters=has_filters)


@pytest.mark.triton
@pytest.mark.parametrize("fault", ["a step further", "another slot", "who drafts", "no drafts to lose"])
def test_a_fault_in_staging_is_noticed(fault: str) -> None:
    def faulty(*given, staging, **options):
        changed = {
            "a step further": {"step": 2},
            "another slot": {"slots": staging.slots.flip(0)},
            "who drafts": {"is_drafting": staging.is_drafting.flip(0)},
            "no drafts to lose": {"num_draft": staging.num_draft.clone()},
        }
        return TRITON.head_draw(*given, staging=staging._replace(**changed[fault]), **options)

    with pytest.raises(AssertionError):
        check_staging(5, [1, 0, 1, 1, 1, 1, 0], op=faulty)


@pytest.mark.triton
def test_a_step_outside_the_drafts_is_named() -> None:
    layer, staging = random_layer(WIDTH, 300, torch.float32, ops=TRITON), build_staging([1])
    given = (random_rows(1, WIDTH), layer.norm, layer.packed, 300, *keys(1))
    with pytest.raises(ValueError, match="step: 3 is outside 0 … 2"):
        TRITON.head_draw(*given, has_filters=False, staging=staging._replace(step=3))


def test_ties_go_to_the_lowest_id_and_bad_rows_are_flagged(every_ops: Backend) -> None:
    layer = random_layer(WIDTH, 400, torch.float32, has_bias=False, ops=every_ops)
    weight = layer.plain.weight.clone()
    weight[130] = weight[300] = weight[7] = weight.sum(dim=0) * 3  # the same logit in three tiles
    packed = every_ops.pack_linear(weight, None)
    hidden = random_rows(4, WIDTH)
    hidden[1] = -hidden[0]  # one of the two has the tie on top
    hidden[2, 3] = float("nan")
    greedy, positions = SamplingRows.empty(4), torch.zeros(4, dtype=torch.int32)
    tokens, error = every_ops.head_draw(hidden, layer.norm, packed, 400, greedy, positions)
    logits = every_ops.head(hidden, layer.norm, packed, 400)
    assert torch.equal(tokens[:2].long(), logits[:2].argmax(dim=1))
    assert 7 in tokens[:2].tolist()
    assert error.tolist() == [0, 0, 1, 0]
    assert ((tokens >= 0) & (tokens < 400)).all()
    unfiltered = every_ops.head_draw(hidden, layer.norm, packed, 400, greedy, positions, has_filters=False)
    for ours, theirs in zip(unfiltered, (tokens, error), strict=True):
        assert torch.equal(ours, theirs)
    filtered = greedy._replace(temperature=greedy.temperature + 1, top_k=greedy.top_k + 1)
    tokens, error = every_ops.head_draw(hidden, layer.norm, packed, 400, filtered, positions)
    assert error.tolist() == [0, 0, 1, 0]
    assert ((tokens >= 0) & (tokens < 400)).all()


@pytest.mark.parametrize("vocab_size", [0, 129])
def test_a_vocabulary_larger_than_the_head_is_refused(ops: Backend, vocab_size: int) -> None:
    layer = random_layer(WIDTH, 128, torch.float32, ops=ops)
    with pytest.raises(ValueError, match=f"vocab_size: {vocab_size}"):
        ops.head_draw(random_rows(1, WIDTH), layer.norm, layer.packed, vocab_size, *keys(1))


@pytest.mark.parametrize("fault", ["the noise of the columns", "the columns themselves"])
def test_a_fault_in_which_tokens_these_are_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(*given, has_filters, token_ids):
        columns = torch.arange(token_ids.numel(), dtype=torch.int32)
        tokens, error = ops.head_draw(*given, has_filters=has_filters, token_ids=columns)
        return (token_ids[tokens.long()] if fault == "the noise of the columns" else tokens), error

    with pytest.raises(AssertionError):
        check_bits(ops, 500, torch.float32, num_tokens=200, op=faulty)


@pytest.mark.parametrize(
    "fault", ["the noise of the next position", "no top-p", "the noise of one row for all"]
)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(hidden, norm, weight, vocab_size, rows, positions, *, has_filters, token_ids):
        if fault == "no top-p":
            rows = rows._replace(top_p=torch.ones_like(rows.top_p))
        elif fault == "the noise of the next position":
            positions = positions + 1
        else:
            rows = rows._replace(seeds=rows.seeds[:1].expand_as(rows.seeds).contiguous())
        return ops.head_draw(hidden, norm, weight, vocab_size, rows, positions, has_filters=has_filters)

    with pytest.raises(AssertionError):
        check_bits(ops, 500, torch.float32, op=faulty)
