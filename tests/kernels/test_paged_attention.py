"""paged_attention: ragged causal chunks straight from blocks; a row's bits depend on its own context only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import DTYPES, NATIVE, assert_earned
from torch import Tensor

from specengine import _C
from specengine.kernels import reference


@dataclass(frozen=True)
class Case:
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    slots: Tensor
    q_start: Tensor
    context_len: Tensor

    def run(self, op) -> Tensor:
        return op(self.query, self.kv_cache, self.block_table, self.slots, self.q_start, self.context_len)


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


def check_paged_attention(op, case: Case) -> None:
    honest = case.run(reference.paged_attention)
    exact = replace(case, query=case.query.double()).run(reference.paged_attention)
    assert_earned(case.run(op), honest, exact)


HEADS = [(4, 4, 64), (4, 2, 32), (2, 1, 8), (3, 3, 80), (2, 2, 20), (18, 1, 16), (1, 1, 256)]
RAGGED = [(3, 130), (5, 5), (1, 300), (2, 128), (17, 129), (1, 1)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_ragged_chunks(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_paged_attention(NATIVE.paged_attention, build_case(heads, RAGGED, dtype))


@pytest.mark.parametrize("block_size", [1, 5, 16, 128, 200])
def test_any_block_size(block_size: int) -> None:
    check_paged_attention(NATIVE.paged_attention, build_case((2, 2, 24), RAGGED, block_size=block_size))


def test_large_scores_do_not_overflow() -> None:
    case = build_case((2, 2, 32), [(2, 200)])
    check_paged_attention(NATIVE.paged_attention, replace(case, query=case.query * 300))


@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_a_row_keeps_its_bits_in_every_chunk_and_batch(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    whole = build_case(heads, [(260, 260)], dtype, seed=1)
    expected = whole.run(NATIVE.paged_attention)
    for sizes in ([1, 5, 6, 16, 17, 83, 128, 4], [129, 131], [7] * 37 + [1]):
        done = 0
        for size in sizes:
            part = replace(
                whole,
                query=whole.query[done : done + size].contiguous(),
                q_start=torch.tensor([0, size], dtype=torch.int32),
                context_len=torch.tensor([done + size], dtype=torch.int32),
            )
            assert torch.equal(part.run(NATIVE.paged_attention), expected[done : done + size]), (done, size)
            done += size
        assert done == 260
    rows = [0, 127, 128, 200, 259]
    batch = replace(
        whole,
        query=whole.query[rows].contiguous(),
        slots=whole.slots.expand(len(rows)).contiguous(),
        q_start=torch.arange(len(rows) + 1, dtype=torch.int32),
        context_len=torch.tensor(rows, dtype=torch.int32) + 1,
    )
    assert torch.equal(batch.run(NATIVE.paged_attention), expected[rows])
    _C.set_num_threads(1)
    assert torch.equal(whole.run(NATIVE.paged_attention), expected)
    _C.set_num_threads(2)
    assert torch.equal(whole.run(NATIVE.paged_attention), expected)


def test_moving_blocks_changes_no_bit() -> None:
    case = build_case((2, 2, 16), [(3, 150)])
    moved = torch.randperm(case.kv_cache.shape[1], generator=torch.Generator().manual_seed(8))
    cache = torch.empty_like(case.kv_cache)
    cache[:, moved] = case.kv_cache
    other = replace(case, kv_cache=cache, block_table=moved[case.block_table.long()].int())
    assert torch.equal(case.run(NATIVE.paged_attention), other.run(NATIVE.paged_attention))


def test_wrong_arguments_are_named() -> None:
    case = build_case((2, 2, 16), [(3, 20), (1, 33)])
    wrong = {
        "context_len: 2 at index 0": {"context_len": torch.tensor([2, 33], dtype=torch.int32)},
        "context_len: 999 at index 1": {"context_len": torch.tensor([20, 999], dtype=torch.int32)},
        "slots: 4 at index 1": {"slots": torch.tensor([0, 4], dtype=torch.int32)},
        "q_start: runs from 0 to 3": {"q_start": torch.tensor([0, 3, 3], dtype=torch.int32)},
        "block_table: 99": {"block_table": torch.full_like(case.block_table, 99)},
        "query: 3 heads": {"query": torch.zeros(4, 3, 16)},
        "kv_cache: expected": {"kv_cache": case.kv_cache.double()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(case, **change).run(NATIVE.paged_attention)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_is_noticed(shift: int) -> None:
    case = build_case((2, 2, 16), [(1, 40), (2, 64)])
    case = replace(case, kv_cache=case.kv_cache.nan_to_num(0.5))

    def off_by_one(query, kv_cache, block_table, slots, q_start, context_len):
        return NATIVE.paged_attention(query, kv_cache, block_table, slots, q_start, context_len + shift)

    check_paged_attention(NATIVE.paged_attention, case)
    with pytest.raises((AssertionError, ValueError)):
        check_paged_attention(off_by_one, case)
