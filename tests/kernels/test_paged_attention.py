"""paged_attention: ragged causal chunks straight from blocks; a row's bits depend on its own context only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    INSTRUCTION_SETS,
    NATIVE,
    TILE_SETS,
    TRITON,
    assert_earned,
    native_threads,
    tile_product,
)
from torch import Tensor

from specengine import _C
from specengine.kernels import paged_attention as kernel
from specengine.kernels import reference
from specengine.kernels.device.launch import record
from specengine.ops.backend import Backend


@dataclass(frozen=True)
class Case:
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    slots: Tensor
    q_start: Tensor
    context_len: Tensor

    def run(self, op: Callable[..., Tensor], **options: Any) -> Tensor:
        return op(
            self.query,
            self.kv_cache,
            self.block_table,
            self.slots,
            self.q_start,
            self.context_len,
            **options,
        )


def build_case(
    heads: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    seed: int = 0,
) -> Case:
    """heads: (H, Hkv, head_dim); lengths: (q_len, context_len) of each sequence. Blocks are scattered, and
    everything that no sequence owns is NaN."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    per_sequence = max((context + block_size - 1) // block_size for _, context in lengths)
    num_slots = len(lengths) + 2
    num_blocks = num_slots * per_sequence + 1
    table = torch.randperm(num_blocks, generator=generator)[: num_slots * per_sequence]
    table = table.view(num_slots, per_sequence).int()
    slots = torch.randperm(num_slots, generator=generator)[: len(lengths)].int()
    cache = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), float("nan"))
    for slot, (_, context) in zip(slots.tolist(), lengths, strict=True):
        for position in range(context):
            entry = cache[:, table[slot, position // block_size], :, position % block_size]
            entry.copy_(torch.randn(entry.shape, generator=generator))
    starts = torch.tensor([0, *[q_len for q_len, _ in lengths]]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), num_heads, head_dim, generator=generator) * 1.5
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    return Case(query, cache.to(dtype), table, slots, starts, contexts)


def rounded_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    context_len: Tensor,
) -> Tensor:
    """The reference with the operands of Triton's products, and of tiles': query and weights, before the division by
    their sum, are rounded to the cache's type."""
    dtype, block_size = kv_cache.dtype, kv_cache.shape[3]
    group = query.shape[1] // kv_cache.shape[2]
    out = torch.empty_like(query)
    for slot, first, last, length in zip(slots, q_start, q_start[1:], context_len.tolist(), strict=False):
        if first == last:
            continue
        blocks = block_table[slot, : -(-length // block_size)].long()
        cached = kv_cache[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :length].float()
        key, value = cached.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,hsd->hts", query[first:last].to(dtype).float(), key) * key.shape[2] ** -0.5
        is_later = torch.ones(scores.shape[1:]).triu(length - int(last - first) + 1).bool()
        scores.masked_fill_(is_later, float("-inf"))
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        mixed = torch.einsum("hts,hsd->htd", weights.to(dtype).float(), value)
        out[first:last] = (mixed / weights.sum(dim=-1, keepdim=True)).transpose(0, 1)
    return out.flatten(1)


def has_tiles() -> bool:
    return _C.build_info()["instruction_set"] in TILE_SETS


def check_paged_attention(ops: Backend, case: Case, op: Callable[..., Tensor] | None = None) -> None:
    """ops: whose arithmetic the honest reference has; op: what is checked, if it is not the backend's own."""
    copies = replace(case, **{field.name: getattr(case, field.name).clone() for field in fields(case)})
    is_rounded = ops is not NATIVE or (case.kv_cache.dtype == torch.bfloat16 and has_tiles())
    honest = case.run(rounded_attention if is_rounded else reference.paged_attention)
    exact = replace(case, query=case.query.double()).run(reference.paged_attention)
    assert_earned(case.run(op or ops.paged_attention), honest, exact)
    for field in fields(case):
        before, after = getattr(copies, field.name), getattr(case, field.name)
        assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{field.name} was written"


def fewer_heads(ops: Backend, heads: tuple[int, int, int]) -> tuple[int, int, int]:
    """Triton's interpreter takes ten milliseconds for each head of a tile: one key/value head will do."""
    num_heads, num_kv_heads, head_dim = heads
    return heads if ops is NATIVE else (min(num_heads // num_kv_heads, 2), 1, head_dim)


HEADS = [(4, 4, 64), (4, 2, 32), (2, 1, 8), (3, 3, 80), (2, 2, 20), (18, 1, 16), (2, 2, 128), (1, 1, 256)]
RAGGED = [(3, 130), (5, 5), (1, 300), (0, 40), (2, 128), (17, 129), (0, 0), (1, 1)]
# Contexts around the edges of blocks, splits and query tiles, with every number of rows that verification has.
EDGES = list(enumerate([1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 143, 144, 145, 255, 256, 257, 17], start=1))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_chunks(every_ops: Backend, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_paged_attention(every_ops, build_case(fewer_heads(every_ops, heads), RAGGED, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_tiles_blocks_and_splits(ops: Backend, dtype: torch.dtype) -> None:
    check_paged_attention(ops, build_case((1, 1, 8), EDGES, dtype))
    check_paged_attention(ops, build_case((4, 2, 8), [(40, 60), (33, 140)], dtype))


def test_batches_of_many_sequences(ops: Backend) -> None:
    lengths = [(0, 0)] * 67
    lengths[3], lengths[63], lengths[64], lengths[66] = (1, 3), (2, 9), (17, 20), (3, 7)
    check_paged_attention(ops, build_case((1, 1, 8), lengths))


def test_the_end_of_a_context_of_8192(ops: Backend) -> None:
    check_paged_attention(ops, build_case((1, 1, 16), [(2, 8192)], torch.bfloat16))


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 128, 200])
def test_any_block_size(ops: Backend, block_size: int) -> None:
    check_paged_attention(ops, build_case(fewer_heads(ops, (2, 2, 24)), RAGGED, block_size=block_size))


def test_large_scores_do_not_overflow(ops: Backend) -> None:
    case = build_case((2, 2, 32), [(2, 200)])
    check_paged_attention(ops, replace(case, query=case.query * 300))


@pytest.mark.usefixtures("tile_set")
def test_tiles_meet_any_block_size_and_all_edges() -> None:
    for block_size in (1, 5, 16, 32, 200):
        check_paged_attention(NATIVE, build_case((2, 2, 64), RAGGED, torch.bfloat16, block_size))
    check_paged_attention(NATIVE, build_case((1, 1, 8), EDGES, torch.bfloat16))
    case = build_case((2, 2, 32), [(2, 200)], torch.bfloat16)
    check_paged_attention(NATIVE, replace(case, query=case.query * 300))


def check_value_bits(heads: tuple[int, int, int], context: int, fault: str | None = None) -> None:
    """Where all weights are 1 a row of one tile is the sum of its values over their number. Values are of many sizes,
    so that their sums are rounded."""
    case = build_case(heads, [(1, context)], torch.bfloat16, seed=context)
    sizes = torch.randint(-12, 12, case.kv_cache.shape, generator=torch.Generator().manual_seed(context))
    cache = torch.ldexp(case.kv_cache, sizes)
    case = replace(case, query=torch.zeros_like(case.query), kv_cache=cache.bfloat16())
    positions = torch.arange(context)
    blocks = case.block_table[case.slots[0]].long()[positions // 16]
    values = case.kv_cache[1, blocks, :, positions % 16]  # [context, Hkv, head_dim]
    sums = [tile_product(torch.ones(1, context), value.T, fault) for value in values.unbind(1)]
    expected = torch.cat(sums).repeat_interleave(heads[0] // heads[1], dim=0) * torch.tensor(1.0 / context)
    assert torch.equal(case.run(NATIVE.paged_attention).view(heads[0], heads[2]), expected), context


@pytest.mark.usefixtures("tile_set")
@pytest.mark.parametrize("heads", [(1, 1, 64), (4, 2, 20), (32, 1, 16)], ids=str)
def test_values_are_weighed_in_tiles_with_the_bits_that_are_specified(heads: tuple[int, int, int]) -> None:
    for context in (1, 2, 3, 31, 32, 33, 65, 100, 128):
        check_value_bits(heads, context)


@pytest.mark.usefixtures("tile_set")
@pytest.mark.parametrize("fault", ["tail", "one chain", "order"])
def test_another_order_of_weighed_values_is_noticed(fault: str) -> None:
    with pytest.raises(AssertionError, match="100"):
        check_value_bits((1, 1, 64), 100, fault)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
def test_what_a_row_does_not_see_does_it_no_harm(
    instructions: str, dtype: torch.dtype, poison: float
) -> None:
    """A draft's keys and values that are no numbers meet only the rows from its own on. (Triton: docs/gpu.md.)"""
    case = build_case((4, 2, 20), [(9, 140)], dtype)
    _C.set_instruction_set(instructions)
    for op in (NATIVE.paged_attention, reference.paged_attention):
        expected = case.run(op)
        for row in (3, 8):
            position = int(case.context_len) - 9 + row
            block = int(case.block_table[case.slots[0], position // 16])
            for part in (0, 1):
                cache = case.kv_cache.clone()
                cache[part, block, :, position % 16, 5] = poison
                poisoned = replace(case, kv_cache=cache)
                result = poisoned.run(op)
                assert torch.equal(result[:row], expected[:row]), (row, part)
                assert not torch.equal(result[row:], expected[row:])
                alone = part_of(poisoned, row, 1).run(op)
                assert torch.equal(result[row].isfinite(), alone[0].isfinite())
    _C.set_instruction_set("auto")


def part_of(whole: Case, first: int, size: int) -> Case:
    """Rows first … first + size - 1 of a case of one sequence, the tokens behind them not yet there."""
    num_behind = whole.query.shape[0] - first - size
    return replace(
        whole,
        query=whole.query[first : first + size].contiguous(),
        q_start=torch.tensor([0, size], dtype=torch.int32),
        context_len=whole.context_len - num_behind,
    )


def as_sequences(whole: Case, rows: list[int]) -> Case:
    """Rows of a case of one sequence as a batch in which each is a sequence of its own."""
    num_before = int(whole.context_len) - whole.query.shape[0]
    return replace(
        whole,
        query=whole.query[rows].contiguous(),
        slots=whole.slots.expand(len(rows)).contiguous(),
        q_start=torch.arange(len(rows) + 1, dtype=torch.int32),
        context_len=torch.tensor(rows, dtype=torch.int32) + num_before + 1,
    )


@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_keeps_its_bits_in_every_chunk_and_batch(
    every_ops: Backend, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    op = every_ops.paged_attention
    if every_ops is NATIVE:
        num_rows, context = 260, 260
        chunkings = [[1, 5, 6, 16, 17, 83, 128, 4], [129, 131], [7] * 37 + [1]]
    else:
        num_rows, context = 40, 270
        chunkings = [[1, 17, 22]]
    whole = build_case(fewer_heads(every_ops, heads), [(num_rows, context)], dtype, seed=1)
    expected = whole.run(op)
    for sizes in chunkings:
        done = 0
        for size in sizes:
            part = part_of(whole, done, size).run(op)
            assert torch.equal(part, expected[done : done + size]), (done, size)
            done += size
        assert done == num_rows
    rows = [0, num_rows // 2 - 3, num_rows // 2 - 2, num_rows * 3 // 4, num_rows - 1]
    assert torch.equal(as_sequences(whole, rows).run(op), expected[rows])
    if every_ops is NATIVE:
        for count in (1, 2):
            with native_threads(count):
                assert torch.equal(whole.run(op), expected)


@pytest.mark.parametrize("heads", [(6, 2, 64), (3, 3, 20), (32, 1, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_that_threads_share_has_the_bits_of_one(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """With few heads for the threads a long context is shared out by tiles, on every instruction set; not where the
    queries are more than one visit's."""
    for lengths in ([(1, 1500)], [(3, 700), (0, 0), (1, 130), (2, 1025)], [(1, 641)]):
        case = build_case(heads, lengths, dtype, seed=3)
        for name in _C.instruction_sets():
            _C.set_instruction_set(name)
            with native_threads(1):  # nothing is shared out
                expected = case.run(NATIVE.paged_attention)
            assert expected.isfinite().all()
            for count in (2, 5, 13):
                with native_threads(count):
                    assert torch.equal(case.run(NATIVE.paged_attention), expected), (name, lengths, count)
            _C.set_instruction_set("auto")


def test_moving_blocks_changes_no_bit(ops: Backend) -> None:
    case = build_case((2, 2, 16), [(3, 150)])
    moved = torch.randperm(case.kv_cache.shape[1], generator=torch.Generator().manual_seed(8))
    cache = torch.empty_like(case.kv_cache)
    cache[:, moved] = case.kv_cache
    other = replace(case, kv_cache=cache, block_table=moved[case.block_table.long()].int())
    assert torch.equal(case.run(ops.paged_attention), other.run(ops.paged_attention))


def test_wrong_arguments_are_named(ops: Backend) -> None:
    case = build_case((2, 2, 16), [(3, 20), (1, 33)])
    wrong = {
        "query: 3 heads": {"query": torch.zeros(4, 3, 16)},
        "query: expected": {"query": torch.zeros(4, 2, 15)},
        "kv_cache: expected": {"kv_cache": case.kv_cache.double()},
        "block_table: expected": {"block_table": case.block_table.T},
        "slots: expected": {"slots": case.slots.long()},
        "q_start: expected": {"q_start": case.q_start[1:]},
        "context_len: expected": {"context_len": case.context_len[:1]},
    }
    wrong_values = {
        "context_len: 2 at index 0": {"context_len": torch.tensor([2, 33], dtype=torch.int32)},
        "context_len: 999 at index 1": {"context_len": torch.tensor([20, 999], dtype=torch.int32)},
        "slots: 4 at index 1": {"slots": torch.tensor([0, 4], dtype=torch.int32)},
        "q_start: runs from 0 to 3": {"q_start": torch.tensor([0, 3, 3], dtype=torch.int32)},
        "block_table: 99": {"block_table": torch.full_like(case.block_table, 99)},
    }
    if ops is NATIVE:
        wrong |= wrong_values
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(ops.paged_attention)
    if ops is TRITON:
        with pytest.raises(ValueError, match="out: expected"):
            case.run(ops.paged_attention, out=torch.zeros(4, 33))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_is_noticed(ops: Backend, shift: int) -> None:
    case = build_case((2, 2, 16), [(1, 40), (2, 60)])
    case = replace(case, kv_cache=case.kv_cache.nan_to_num(0.5))

    def off_by_one(query, kv_cache, block_table, slots, q_start, context_len):
        return ops.paged_attention(query, kv_cache, block_table, slots, q_start, context_len + shift)

    check_paged_attention(ops, case)
    with pytest.raises(AssertionError):
        check_paged_attention(ops, case, off_by_one)


def test_a_dropped_mask_a_wrong_block_or_a_lost_row_is_noticed(ops: Backend) -> None:
    case = build_case((1, 1, 16), [(17, 140)])
    case = replace(case, kv_cache=case.kv_cache.nan_to_num(0.5))

    def no_mask(query, kv_cache, block_table, slots, q_start, context_len):
        num_rows = query.shape[0]
        starts = torch.arange(num_rows + 1, dtype=torch.int32)
        batch = (slots.expand(num_rows).contiguous(), starts, context_len.expand(num_rows).contiguous())
        return ops.paged_attention(query, kv_cache, block_table, *batch)

    def next_block(query, kv_cache, block_table, *batch):
        return ops.paged_attention(query, kv_cache, block_table.roll(-1, dims=1), *batch)

    def without_its_tail(query, *rest):
        return ops.paged_attention(query, *rest) * (torch.arange(query.shape[0]) < 16)[:, None]

    check_paged_attention(ops, case)
    for fault in (no_mask, next_block, without_its_tail):
        with pytest.raises(AssertionError):
            check_paged_attention(ops, case, fault)


@pytest.mark.triton
@pytest.mark.parametrize("grid", [(-1, 0, 0), (0, 0, -1)], ids=["tile", "split"])
def test_a_program_that_is_not_launched_is_noticed(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int]
) -> None:
    launch = kernel.launch

    def launch_fewer(function: Any, full: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launch(function, tuple(map(sum, zip(full, grid, strict=True))), *arguments, **options)

    case = build_case((1, 1, 8), [(33, 290)])

    def op(*arguments: Tensor) -> Tensor:
        return TRITON.paged_attention(*arguments, out=torch.zeros(33, 8))

    check_paged_attention(TRITON, case, op)
    monkeypatch.setattr(kernel, "launch", launch_fewer)
    with pytest.raises(AssertionError):
        check_paged_attention(TRITON, case, op)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_in_one_program_or_many_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case = build_case((2, 1, 20), [(1, 300), (17, 257), (2, 5)], dtype)
    expected = case.run(TRITON.paged_attention)
    monkeypatch.setattr(kernel, "BUSY_PROGRAMS", 1)
    assert torch.equal(case.run(TRITON.paged_attention), expected)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_that_are_multiplied_in_steps(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kernel, "choose_tile", lambda dtype, head_dim: (32, 4))
    check_paged_attention(TRITON, build_case((1, 1, 16), [(5, 135), (18, 66)], dtype))
    case = build_case((1, 1, 16), [(18, 140)], dtype)
    expected = case.run(TRITON.paged_attention)
    alone = as_sequences(case, [0, 17])
    assert torch.equal(alone.run(TRITON.paged_attention), expected[[0, 17]])


@pytest.mark.triton
def test_padding_is_left_alone() -> None:
    case = build_case((2, 1, 8), [(3, 150), (2, 20), (0, 0), (0, 0)])
    expected = case.run(TRITON.paged_attention)
    padded = replace(case, query=torch.cat([case.query, torch.full((19, 2, 8), float("nan"))]))
    memory = torch.full((24, 20), 7.0)
    assert padded.run(TRITON.paged_attention, out=memory[:, :16]).shape == (24, 16)
    assert torch.equal(memory[:5, :16], expected)
    assert (memory[5:] == 7).all()
    assert (memory[:, 16:] == 7).all()


@pytest.mark.triton
def test_counters_reset_themselves_and_scratch_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    parts = torch.full((1 << 16,), float("nan"), device=DEVICE)
    case = build_case((1, 1, 8), [(3, 300), (0, 0), (17, 150), (1, 9)])
    expected = case.run(TRITON.paged_attention)
    monkeypatch.setattr(kernel, "zeroed", lambda count, dtype, device: counters)
    monkeypatch.setattr(kernel, "scratch", lambda count, dtype, device: parts)
    for _ in range(2):
        assert torch.equal(case.run(TRITON.paged_attention), expected)
        assert not counters.any()
    assert torch.isfinite(parts).any()


@pytest.mark.triton
def test_a_launch_depends_on_shapes_only() -> None:
    case = build_case((2, 1, 8), [(1, 300)])
    on_meta = replace(case, **{field.name: getattr(case, field.name).to("meta") for field in fields(case)})
    with record() as launches:
        on_meta.run(kernel.paged_attention)
    assert [launch.name for launch in launches] == ["spec_paged_attention"]
    assert launches[0].grid == (1, 2, 5)
