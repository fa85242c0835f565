"""The paged KV cache manager: its laws one by one, then all of them under random operations against a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_kv_cache_model import CheckedCache

from specengine import errors
from specengine._C import PagedKVCache

B = 4  # block size of the unit tests
TARGET, DRAFT = 0, 1


class Pool:
    """A manager with its block table, and the few steps that nearly every test takes."""

    def __init__(self, *, num_blocks: int = 17, max_sequences: int = 4, **options: Any) -> None:
        max_blocks_per_sequence = options.pop("max_blocks_per_sequence", 8)
        self.table = np.full((max_sequences, max_blocks_per_sequence), -1, dtype=np.int32)
        self.cache = PagedKVCache(
            num_blocks=num_blocks,
            block_size=options.pop("block_size", B),
            max_sequences=max_sequences,
            max_blocks_per_sequence=max_blocks_per_sequence,
            num_models=options.pop("num_models", 2),
            block_table_address=self.table.ctypes.data,
            **options,
        )

    def start(self, tokens: Sequence[int], *, computed: Sequence[int] | None = None) -> int:
        """Allocate, compute (all tokens by every model unless told) and publish."""
        slot = self.cache.allocate(list(tokens), len(tokens))
        self.cache.extend(slot, 0, len(tokens))
        for model, num_tokens in enumerate(computed or (len(tokens), len(tokens))):
            self.cache.set_computed(slot, model, num_tokens)
        self.cache.publish(slot, list(tokens))
        return slot

    def watermarks(self, slot: int) -> tuple[int, int]:
        return self.cache.num_computed_tokens(slot, TARGET), self.cache.num_computed_tokens(slot, DRAFT)

    def hits(self, tokens: Sequence[int], max_cached_tokens: int | None = None) -> tuple[int, int]:
        """How much of tokens a new sequence would find, by model."""
        slot = self.cache.allocate(
            list(tokens), len(tokens) if max_cached_tokens is None else max_cached_tokens
        )
        watermarks = self.watermarks(slot)
        self.cache.free(slot)
        return watermarks

    def state(self) -> tuple[Any, ...]:
        """Everything that can be observed without changing anything."""
        cache, slots = self.cache, range(len(self.table))
        alive = [slot for slot in slots if self.table[slot].any()]
        return (
            self.table.tolist(),
            [cache.reference_count(block) for block in range(cache.num_blocks)],
            [(cache.capacity(slot), self.watermarks(slot)) for slot in alive],
            (cache.num_free_blocks, cache.num_cached_blocks, cache.num_sequences),
        )


# --- Positions and blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1])
def test_extend_makes_exactly_the_covering_blocks_addressable(num_tokens: int) -> None:
    pool = Pool()
    slot = pool.cache.allocate([], 0)
    num_blocks = -(-num_tokens // B)

    assert pool.cache.num_blocks_needed(slot, 0, num_tokens) == num_blocks
    assert pool.cache.extend(slot, 0, num_tokens) == []

    assert pool.cache.capacity(slot) == num_blocks * B
    assert pool.cache.num_free_blocks == 16 - num_blocks
    blocks = pool.cache.sequence_blocks(slot)
    assert pool.table[slot].tolist() == blocks + [0] * (8 - num_blocks)
    assert 0 not in blocks
    assert len(set(blocks)) == num_blocks


@pytest.mark.parametrize("length", [2 * B - 1, 2 * B, 2 * B + 1, 3 * B])
@pytest.mark.parametrize("num_tokens", [0, 1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1])
def test_rollback_lowers_watermarks_and_nothing_else(length: int, num_tokens: int) -> None:
    pool = Pool()
    slot = pool.start(range(length), computed=(length, B))
    before = pool.state()

    pool.cache.rollback(slot, num_tokens)

    assert pool.watermarks(slot) == (min(length, num_tokens), min(B, num_tokens))
    pool.cache.set_computed(slot, TARGET, length)
    pool.cache.set_computed(slot, DRAFT, B)
    assert pool.state() == before


def test_blocks_and_slots_return_to_the_start() -> None:
    pool = Pool()
    start = pool.state()
    parent = pool.start(range(11))
    child = pool.cache.fork(parent, 9)
    pool.cache.extend(child, 9, 20)
    pool.cache.trim(child, 13)
    for slot in (parent, child):
        pool.cache.free(slot)
    pool.cache.reset_prefix_cache()
    assert pool.state() == start
    pool.cache.check_invariants()


@pytest.mark.parametrize(
    ("num_tokens", "num_left"), [(0, 0), (1, 1), (B, 1), (B + 1, 2), (2 * B, 2), (8 * B, 3)]
)
def test_trim_gives_back_whole_blocks(num_tokens: int, num_left: int) -> None:
    pool = Pool()
    slot = pool.cache.allocate([], 0)
    pool.cache.extend(slot, 0, 3 * B)
    pool.cache.set_computed(slot, TARGET, 3 * B)
    pool.cache.trim(slot, num_tokens)
    assert pool.cache.capacity(slot) == num_left * B
    assert pool.watermarks(slot) == (num_left * B, 0)
    assert pool.cache.num_free_blocks == 16 - num_left
    assert not pool.table[slot, num_left:].any()


# --- Forks and copy on write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, B - 1, B, B + 1, 2 * B])
def test_fork_shares_the_covering_blocks(num_tokens: int) -> None:
    pool = Pool()
    parent = pool.start(range(2 * B), computed=(2 * B, B))
    child = pool.cache.fork(parent, num_tokens)

    num_shared = -(-num_tokens // B)
    blocks = pool.cache.sequence_blocks(parent)
    assert pool.cache.sequence_blocks(child) == blocks[:num_shared]
    assert [pool.cache.reference_count(block) for block in blocks] == [2] * num_shared + [1] * (
        2 - num_shared
    )
    assert pool.watermarks(child) == (num_tokens, min(B, num_tokens))
    assert pool.watermarks(parent) == (2 * B, B)


@pytest.mark.parametrize(
    ("first_position", "num_tokens", "copied"),
    [
        (B + 1, B + 2, [1]),
        (B - 1, B + 1, [0, 1]),
        (B, B + 1, [1]),
        (B - 1, B, [0]),
        (2 * B - 2, 3 * B, [1]),
        (2 * B, 3 * B, []),
        (B + 1, B + 1, []),
    ],
)
def test_a_shared_block_is_copied_before_it_is_written(
    first_position: int, num_tokens: int, copied: list[int]
) -> None:
    pool = Pool()
    parent = pool.start(range(2 * B))
    child = pool.cache.fork(parent, 2 * B)
    shared = pool.cache.sequence_blocks(parent)
    num_new = max(0, -(-num_tokens // B) - 2)

    assert pool.cache.num_blocks_needed(child, first_position, num_tokens) == len(copied) + num_new
    copies = pool.cache.extend(child, first_position, num_tokens)

    blocks = pool.cache.sequence_blocks(child)
    assert copies == [(shared[i], blocks[i]) for i in copied]
    assert pool.cache.sequence_blocks(parent) == shared
    for i, block in enumerate(shared):
        assert pool.cache.reference_count(block) == (1 if i in copied else 2)
    # Both halves are exclusive now: neither needs another copy.
    assert pool.cache.extend(child, first_position, num_tokens) == []
    if copied:
        assert pool.cache.extend(parent, B * copied[0], B * copied[0] + 1) == []


def test_the_copy_belongs_to_the_writer_whoever_that_is() -> None:
    pool = Pool()
    parent = pool.start(range(B + 2))
    child = pool.cache.fork(parent, B + 2)
    shared = pool.cache.sequence_blocks(child)
    [(source, destination)] = pool.cache.extend(parent, B + 2, B + 3)
    assert pool.cache.sequence_blocks(child) == shared
    assert (source, destination) == (shared[1], pool.cache.sequence_blocks(parent)[1])


# --- The prefix index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shared", [0, 1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1])
def test_a_prompt_finds_the_full_blocks_it_shares(num_shared: int) -> None:
    pool = Pool()
    pool.cache.free(pool.start(range(100, 100 + 3 * B)))
    prompt = [*range(100, 100 + num_shared), *range(200, 200 + B)]
    assert pool.hits(prompt) == (num_shared // B * B,) * 2


@pytest.mark.parametrize(("limit", "num_found"), [(0, 0), (B - 1, 0), (B, B), (2 * B - 1, B), (2 * B, 2 * B)])
def test_max_cached_tokens_limits_what_is_found(limit: int, num_found: int) -> None:
    pool = Pool()
    pool.cache.free(pool.start(range(2 * B)))
    assert pool.hits(range(2 * B), limit) == (num_found, num_found)


def test_a_block_is_a_hit_for_a_model_only_as_far_as_that_model_computed_it() -> None:
    pool = Pool()
    slot = pool.start(range(3 * B), computed=(3 * B, 2 * B - 1))
    assert pool.cache.num_cached_blocks == 3
    assert pool.hits(range(3 * B)) == (3 * B, B)

    pool.cache.set_computed(slot, DRAFT, 3 * B)
    assert pool.hits(range(3 * B)) == (3 * B, B), "noted by publish, not before"
    pool.cache.publish(slot, list(range(3 * B)))
    assert pool.hits(range(3 * B)) == (3 * B, 3 * B)


def test_a_model_stops_at_its_first_gap() -> None:
    pool = Pool()
    slot = pool.start(range(3 * B))
    pool.cache.set_computed(slot, DRAFT, B)
    pool.cache.extend(slot, B, 2 * B)
    pool.cache.free(slot)
    assert pool.hits(range(3 * B)) == (3 * B, B)


def test_the_chain_goes_on_as_long_as_any_model_computed_the_block() -> None:
    pool = Pool()
    slot = pool.start(range(3 * B), computed=(B, 3 * B))
    pool.cache.free(slot)
    assert pool.hits(range(3 * B)) == (B, 3 * B)


def test_only_full_committed_computed_blocks_are_published() -> None:
    pool = Pool()
    slot = pool.cache.allocate([], 0)
    pool.cache.extend(slot, 0, 3 * B)
    pool.cache.set_computed(slot, TARGET, 2 * B - 1)
    pool.cache.publish(slot, list(range(3 * B)))
    assert pool.cache.num_cached_blocks == 1
    pool.cache.set_computed(slot, TARGET, 3 * B)
    pool.cache.publish(slot, list(range(3 * B - 1)))
    assert pool.cache.num_cached_blocks == 2


def test_publishing_token_by_token_equals_publishing_once() -> None:
    tokens = list(range(5 * B + 2))
    pool = Pool()
    slot = pool.cache.allocate([], 0)
    pool.cache.extend(slot, 0, len(tokens))
    for num_tokens in range(len(tokens) + 1):
        pool.cache.set_computed(slot, TARGET, num_tokens)
        pool.cache.publish(slot, np.array(tokens[:num_tokens], dtype=np.int32))
    assert pool.cache.num_cached_blocks == 5
    assert pool.hits(tokens) == (5 * B, 0)


def test_of_equal_blocks_the_first_stays_indexed() -> None:
    pool = Pool(max_sequences=3)
    tokens = list(range(2 * B))
    first, second = pool.cache.allocate(tokens, 0), pool.cache.allocate(tokens, 0)
    for slot in (first, second):
        pool.cache.extend(slot, 0, 2 * B)
        pool.cache.set_computed(slot, TARGET, 2 * B)
        pool.cache.publish(slot, tokens)
    assert pool.cache.num_cached_blocks == 2
    third = pool.cache.allocate(tokens, 2 * B)
    assert pool.cache.sequence_blocks(third) == pool.cache.sequence_blocks(first)
    pool.cache.free(third)

    # When the first is gone for good, the second takes its place at its next publish.
    pool.cache.free(first)
    pool.cache.reset_prefix_cache()
    pool.cache.publish(second, tokens)
    assert pool.hits(tokens) == (2 * B, 0)


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    pool = Pool()
    pool.cache.free(pool.start([1] * B + [2] * B))
    assert pool.hits([2] * B + [1] * B) == (0, 0)
    assert pool.hits([1] * B + [3] * B) == (B, B)


def test_a_reused_block_cannot_stand_in_for_a_parent() -> None:
    pool = Pool(num_blocks=5)
    first = pool.start([1] * B)
    second = pool.cache.allocate([1] * B + [2] * B, 0)
    pool.cache.extend(second, 0, 2 * B)
    pool.cache.set_computed(second, TARGET, 2 * B)
    pool.cache.publish(second, [1] * B + [2] * B)  # the second block hangs on first's block
    pool.cache.extend(pool.cache.allocate([], 0), 0, B)  # the last free block
    [parent] = pool.cache.sequence_blocks(first)
    pool.cache.free(first)

    usurper = pool.start([3] * B)
    assert pool.cache.sequence_blocks(usurper) == [parent]

    assert pool.hits([3] * B + [2] * B) == (B, B)
    assert pool.hits([1] * B + [2] * B) == (0, 0)


def test_repeating_what_is_there_keeps_a_block_findable() -> None:
    pool = Pool()
    slot = pool.start(range(2 * B))
    block = pool.cache.sequence_blocks(slot)[1]
    assert pool.cache.extend(slot, 2 * B - 1, 2 * B + 1) == []
    assert pool.cache.sequence_blocks(slot)[1] == block
    assert pool.hits(range(2 * B)) == (2 * B, 2 * B)


def test_rewriting_after_a_rollback_withdraws_the_block() -> None:
    pool = Pool()
    slot = pool.start(range(3 * B))
    pool.cache.rollback(slot, B + 1)
    assert pool.hits(range(3 * B)) == (3 * B, 3 * B), "nothing has been written yet"
    pool.cache.extend(slot, B + 1, B + 2)
    assert pool.hits(range(3 * B)) == (B, B)
    pool.cache.check_invariants()


def test_what_replaces_rolled_back_tokens_is_published() -> None:
    pool = Pool()
    slot = pool.start(range(3 * B))
    tokens = [*range(B), *range(100, 100 + B)]
    pool.cache.rollback(slot, B)
    pool.cache.extend(slot, B, 2 * B)
    pool.cache.set_computed(slot, TARGET, 2 * B)
    pool.cache.publish(slot, tokens)
    assert pool.hits(tokens) == (2 * B, B)
    assert pool.hits(range(3 * B)) == (B, B)


def test_rewriting_an_equal_block_breaks_its_tie_to_the_indexed_one() -> None:
    pool = Pool()
    old, new = [1] * 2 * B, [2] * 2 * B + [3] * B
    pool.start(old)
    slot = pool.cache.allocate(old, 0)
    for tokens in (old, new):
        pool.cache.rollback(slot, 0)
        pool.cache.extend(slot, 0, len(tokens))
        pool.cache.set_computed(slot, TARGET, len(tokens))
        pool.cache.publish(slot, tokens)
    assert pool.hits(new) == (3 * B, 0)
    assert pool.hits(old + [3] * B) == (2 * B, 2 * B)


def test_a_model_that_recomputes_withdraws_its_own_hits_only() -> None:
    pool = Pool()
    slot = pool.start(range(2 * B))
    pool.cache.set_computed(slot, DRAFT, 0)
    pool.cache.extend(slot, 0, 2 * B)
    assert pool.hits(range(2 * B)) == (2 * B, 0)
    pool.cache.set_computed(slot, DRAFT, 2 * B)
    pool.cache.publish(slot, list(range(2 * B)))
    assert pool.hits(range(2 * B)) == (2 * B, 2 * B)


def test_catching_up_in_a_shared_block_copies_it() -> None:
    pool = Pool()
    first = pool.start(range(B), computed=(B, 0))
    second = pool.cache.allocate(list(range(B)), B)
    [(source, destination)] = pool.cache.extend(second, 0, B)
    assert [source] == pool.cache.sequence_blocks(first)
    assert [destination] == pool.cache.sequence_blocks(second)
    assert pool.hits(range(B)) == (B, 0)


def test_a_copy_takes_the_place_of_its_evicted_original() -> None:
    pool = Pool(num_blocks=5)
    tokens = list(range(2 * B))
    first, second = pool.start(tokens), pool.cache.allocate(tokens, 2 * B)
    [(original, copy)] = pool.cache.extend(second, 0, B)
    pool.cache.free(first)
    usurper = pool.cache.allocate([], 0)
    pool.cache.extend(usurper, 0, 2 * B)
    assert original in pool.cache.sequence_blocks(usurper)
    assert pool.hits(tokens) == (0, 0)

    pool.cache.publish(second, tokens)
    assert pool.hits(tokens) == (2 * B, 2 * B)
    assert pool.cache.sequence_blocks(second)[0] == copy


def test_eviction_takes_the_least_recently_freed_and_the_deepest_first() -> None:
    pool = Pool(num_blocks=7)
    old, new = pool.start([1] * 3 * B), pool.start([2] * 3 * B)
    old_blocks, new_blocks = pool.cache.sequence_blocks(old), pool.cache.sequence_blocks(new)
    pool.cache.free(old)
    pool.cache.free(new)
    assert pool.cache.num_free_blocks == 6
    assert pool.hits([1] * 3 * B) == (3 * B, 3 * B)  # being used makes it the most recent

    slot = pool.cache.allocate([], 0)
    pool.cache.extend(slot, 0, 6 * B)
    assert pool.cache.sequence_blocks(slot) == new_blocks[::-1] + old_blocks[::-1]
    assert pool.cache.num_cached_blocks == 0


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = Pool(num_blocks=5)
    pool.cache.free(pool.start(range(2 * B)))
    slot = pool.cache.allocate([], 0)
    pool.cache.extend(slot, 0, 2 * B)
    assert pool.cache.num_cached_blocks == 2
    pool.cache.extend(slot, 2 * B, 2 * B + 1)
    assert pool.cache.num_cached_blocks == 1
    assert pool.hits(range(2 * B)) == (B, B), "the parent outlives its child"


def test_the_prefix_cache_can_be_off() -> None:
    pool = Pool(enable_prefix_cache=False)
    pool.cache.free(pool.start(range(2 * B)))
    assert pool.cache.num_cached_blocks == 0
    assert pool.hits(range(2 * B)) == (0, 0)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, list, tuple])
def test_token_ids_may_be_any_integer_sequence(dtype: Any) -> None:
    pool = Pool()
    tokens = [-(2**31), 2**31 - 1, 0, 7] * 2
    token_ids = dtype(tokens) if dtype in (list, tuple) else np.array(tokens, dtype=dtype)
    slot = pool.cache.allocate(token_ids, 2 * B)
    pool.cache.extend(slot, 0, 2 * B)
    pool.cache.set_computed(slot, TARGET, 2 * B)
    pool.cache.publish(slot, token_ids[::-1])
    assert pool.hits(tokens[::-1]) == (2 * B, 0)


# --- Misuse --------------------------------------------------------------------------------------------------------


def misuse(name: str, *arguments: Any, error: type[Exception], match: str) -> Any:
    return pytest.param(name, arguments, error, match, id=f"{name}{arguments}")


LIVE, DEAD = 0, 3

MISUSES = [
    *(
        misuse(name, slot, *arguments, error=errors.UnknownSequenceError, match=f"slot={slot}")
        for slot in (DEAD, -1, 4, 2**31, -(2**63))
        for name, *arguments in [
            ("extend", 0, 1), ("can_extend", 0, 1), ("num_blocks_needed", 0, 1), ("num_computed_tokens", TARGET),
            ("set_computed", TARGET, 0), ("rollback", 0), ("fork", 0), ("publish", [1]), ("trim", 0), ("free",),
            ("capacity",), ("sequence_blocks",),
        ]
    ),
    *(
        misuse(name, LIVE, *arguments, value, error=ValueError, match=rf"num_tokens={value} ")
        for value in (-1, 8 * B + 1, 2**31, 2**62, 2**63 - 1, -(2**63))
        for name, *arguments in [
            ("extend", 0), ("can_extend", 0), ("num_blocks_needed", 0), ("set_computed", TARGET), ("rollback",),
            ("fork",), ("trim",),
        ]
    ),
    *(
        misuse("extend", LIVE, value, 2 * B, error=ValueError, match=f"first_position={value} ")
        for value in (-1, 2 * B + 1, 2**31)
    ),
    *(
        misuse(name, LIVE, value, *arguments, error=ValueError, match=f"model={value} ")
        for value in (-1, 2, 2**31)
        for name, *arguments in [("num_computed_tokens",), ("set_computed", 0)]
    ),
    *(misuse("reference_count", value, error=ValueError, match=f"block={value} ") for value in (-1, 17, 2**31)),
    misuse("set_computed", LIVE, TARGET, 2 * B + 1, error=ValueError, match=f"num_tokens={2 * B + 1} "),
    misuse("fork", LIVE, 2 * B + 1, error=ValueError, match=f"num_tokens={2 * B + 1} "),
    misuse("rollback", LIVE, 10**30, error=ValueError, match="num_tokens=9223372036854775807 "),
    misuse("rollback", LIVE, 1.0, error=TypeError, match="rollback"),
    misuse("allocate", [0] * (8 * B + 1), 0, error=ValueError, match=r"len\(token_ids\)=33 "),
    misuse("allocate", [1], -1, error=ValueError, match="max_cached_tokens=-1 "),
    misuse("allocate", [1], 2**31, error=ValueError, match="max_cached_tokens=2147483648 "),
    misuse("allocate", [1, 2**31], 0, error=ValueError, match=r"token_ids\[1\]=2147483648 "),
    misuse("allocate", [0.5], 0, error=ValueError, match="token_ids"),
    misuse("allocate", "text", 0, error=ValueError, match="token_ids"),
    misuse("allocate", np.zeros((2, 2), dtype=np.int32), 0, error=ValueError, match="token_ids has 2 dimensions"),
    misuse("allocate", np.zeros(2, dtype=np.float32), 0, error=ValueError, match="token_ids"),
    misuse("publish", LIVE, None, error=ValueError, match="token_ids"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "error", "match"), MISUSES)
def test_misuse_is_refused_by_name_and_changes_nothing(
    name: str, arguments: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    pool = Pool()
    assert pool.start(range(2 * B)) == LIVE
    before = pool.state()
    with pytest.raises(error, match=match):
        getattr(pool.cache, name)(*arguments)
    assert pool.state() == before
    pool.cache.check_invariants()


def test_a_sequence_is_freed_once() -> None:
    pool = Pool()
    slot = pool.start(range(B))
    pool.cache.free(slot)
    before = pool.state()
    with pytest.raises(errors.UnknownSequenceError, match=f"slot={slot} "):
        pool.cache.free(slot)
    assert pool.state() == before


def test_out_of_blocks_changes_nothing() -> None:
    pool = Pool(num_blocks=7)
    pool.cache.free(pool.start([1] * 2 * B))
    parent = pool.start([2] * 2 * B)
    child = pool.cache.fork(parent, 2 * B)
    before = pool.state()

    assert pool.cache.num_blocks_needed(child, B - 1, 5 * B) == 5  # two copies and three more
    assert not pool.cache.can_extend(child, B - 1, 5 * B)
    with pytest.raises(errors.OutOfBlocksError, match=r"slot 1 to 20 tokens needs 5 .* 4 of 6 are free"):
        pool.cache.extend(child, B - 1, 5 * B)
    assert pool.state() == before
    assert pool.hits([1] * 2 * B) == (2 * B, 2 * B), "nothing was evicted for it"

    assert pool.cache.can_extend(child, B - 1, 4 * B)
    assert len(pool.cache.extend(child, B - 1, 4 * B)) == 2
    assert pool.cache.num_free_blocks == 0


@pytest.mark.parametrize("take", [lambda cache: cache.allocate([1], 0), lambda cache: cache.fork(0, B)])
def test_out_of_slots_changes_nothing(take: Callable[[PagedKVCache], int]) -> None:
    pool = Pool(max_sequences=1)
    pool.start(range(B))
    before = pool.state()
    with pytest.raises(errors.OutOfSlotsError, match="max_sequences=1"):
        take(pool.cache)
    assert pool.state() == before


@pytest.mark.parametrize("name", ["OutOfBlocksError", "OutOfSlotsError", "UnknownSequenceError"])
def test_errors_are_specengine_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.KVCacheError)
    assert issubclass(errors.KVCacheError, errors.SpecEngineError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(
            ["num_blocks", "max_sequences", "max_blocks_per_sequence"], [0, -1, 2**31, 2**63, 10**30]
        ),
        *itertools.product(["block_size"], [0, -1, 65537, 2**31, 2**63]),
        *itertools.product(["num_models"], [0, -1, 33, 2**31]),
        ("num_blocks", 1),
        ("num_blocks", 2**31 - 1),  # a valid id, but 160 GB of bookkeeping
        ("max_blocks_per_sequence", 2**29),  # positions are int32
        ("block_table_address", 0),
        ("block_table_address", 4097),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(name: str, value: int) -> None:
    table = np.zeros((4, 8), dtype=np.int32)
    options = {
        "num_blocks": 17, "block_size": B, "max_sequences": 4, "max_blocks_per_sequence": 8, "num_models": 2,
        "block_table_address": table.ctypes.data,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"{name}={min(value, 2**63 - 1)} "):
        PagedKVCache(**{**options, name: value})


# --- Random operations against the model ---------------------------------------------------------------------------

CHOICES = st.integers(0, 15)  # reduced to what is possible when the rule runs
MODEL_MASKS = st.integers(0, 7)
FEW_TOKENS = st.builds(lambda zeros, ones: [0] * zeros + [1] * ones, st.integers(0, 6), st.integers(0, 4))


def state_machine(build_manager: Callable[..., Any], events: Counter[str]) -> type[RuleBasedStateMachine]:
    """All operations in any order, on pools so small and tokens so few that blocks meet, run out and come again."""

    class Operations(RuleBasedStateMachine):
        checked: CheckedCache

        @initialize(
            num_blocks=st.integers(4, 12),
            block_size=st.integers(1, 3),
            max_sequences=st.integers(2, 4),
            max_blocks_per_sequence=st.integers(2, 5),
            num_models=st.integers(1, 3),
        )
        def build(self, **sizes: int) -> None:
            self.checked = CheckedCache(build_manager, events, **sizes)

        def slot(self, choice: int) -> int:
            return sorted(self.checked.tokens)[choice % len(self.checked.tokens)]

        def models(self, mask: int) -> set[int]:
            return {model for model in range(self.checked.num_models) if mask >> model & 1}

        def has_sequence(self) -> bool:
            return len(self.checked.tokens) > 0

        def has_free_slot(self) -> bool:
            return len(self.checked.tokens) < self.checked.max_sequences

        @precondition(has_free_slot)
        @rule(prompt=FEW_TOKENS, num_kept_back=st.sampled_from([0, 1, 2, 16]), writers=MODEL_MASKS)
        def start(self, prompt: list[int], num_kept_back: int, writers: int) -> None:
            prompt = prompt[: self.checked.max_tokens]
            slot = self.checked.allocate(prompt, max(0, len(prompt) - num_kept_back))
            for model in sorted(self.models(writers)):
                watermark = self.checked.model.sequences[slot].computed[model]
                self.checked.write(slot, watermark, prompt[watermark:], writers={model})
            if writers:
                self.checked.publish(slot, prompt)

        @precondition(lambda self: self.has_sequence() and not self.has_free_slot())
        @rule(choice=CHOICES)
        def start_one_too_many(self, choice: int) -> None:
            slot = self.slot(choice)
            for take in (
                lambda: self.checked.manager.allocate([0], 1),
                lambda: self.checked.manager.fork(slot, 0),
            ):
                with pytest.raises(errors.OutOfSlotsError):
                    take()

        @precondition(has_sequence)
        @rule(choice=CHOICES, gap=st.integers(-4, 1), new_tokens=FEW_TOKENS, writers=MODEL_MASKS)
        def write(self, choice: int, gap: int, new_tokens: list[int], writers: int) -> None:
            slot = self.slot(choice)
            watermarks = self.checked.model.sequences[slot].computed
            first_position = min(max(0, watermarks[choice % len(watermarks)] + gap), self.checked.max_tokens)
            self.checked.write(slot, first_position, new_tokens, writers=self.models(writers))

        @precondition(has_sequence)
        @rule(choice=CHOICES, num_tokens=CHOICES, new_tokens=FEW_TOKENS, writers=MODEL_MASKS)
        def regenerate(self, choice: int, num_tokens: int, new_tokens: list[int], writers: int) -> None:
            slot = self.slot(choice)
            num_tokens %= len(self.checked.tokens[slot]) + 1
            self.checked.rollback(slot, num_tokens)
            self.checked.write(slot, num_tokens, new_tokens[::-1], writers=self.models(writers))
            self.checked.publish(slot, self.checked.tokens[slot])

        @precondition(has_sequence)
        @rule(choice=CHOICES, num_tokens=CHOICES)
        def rollback(self, choice: int, num_tokens: int) -> None:
            slot = self.slot(choice)
            self.checked.rollback(slot, num_tokens % (len(self.checked.tokens[slot]) + 1))

        @precondition(has_sequence)
        @rule(choice=CHOICES, num_tokens=CHOICES)
        def lower_one_watermark(self, choice: int, num_tokens: int) -> None:
            slot = self.slot(choice)
            watermarks = self.checked.model.sequences[slot].computed
            model = choice % len(watermarks)
            self.checked.set_computed(slot, model, num_tokens % (watermarks[model] + 1))

        @precondition(lambda self: self.has_sequence() and self.has_free_slot())
        @rule(choice=CHOICES, num_tokens=CHOICES)
        def fork(self, choice: int, num_tokens: int) -> None:
            slot = self.slot(choice)
            self.checked.fork(slot, num_tokens % (self.checked.capacity(slot) + 1))

        @precondition(has_sequence)
        @rule(choice=CHOICES, num_missing=st.integers(0, 3), uncomputed=FEW_TOKENS)
        def publish(self, choice: int, num_missing: int, uncomputed: list[int]) -> None:
            slot = self.slot(choice)
            committed = self.checked.tokens[slot]
            self.checked.publish(slot, committed[:-num_missing] if num_missing else committed + uncomputed)

        @precondition(has_sequence)
        @rule(choice=CHOICES, num_tokens=CHOICES)
        def trim(self, choice: int, num_tokens: int) -> None:
            self.checked.trim(self.slot(choice), num_tokens % (self.checked.max_tokens + 1))

        @precondition(has_sequence)
        @rule(choice=CHOICES)
        def free(self, choice: int) -> None:
            slot = self.slot(choice)
            self.checked.free(slot)
            with pytest.raises(errors.UnknownSequenceError):
                self.checked.manager.free(slot)

        @precondition(lambda self: len(self.checked.model.index) > 3)
        @rule()
        def reset_prefix_cache(self) -> None:
            self.checked.reset_prefix_cache()

        @invariant()
        def everything_agrees(self) -> None:
            if hasattr(self, "checked"):
                self.checked.check()

        def teardown(self) -> None:
            if not hasattr(self, "checked"):
                return
            for slot in list(self.checked.tokens):
                self.checked.free(slot)
            self.checked.reset_prefix_cache()
            self.checked.check()
            assert self.checked.manager.num_free_blocks == self.checked.num_blocks - 1

    return Operations


EVENTS = {
    "hit", "hit for one model only", "copy on write", "eviction or withdrawal", "out of blocks", "rollback", "fork",
    "publication", "equal block published",
}  # fmt: skip


def run_operations(
    build_manager: Callable[..., Any], *, stateful_step_count: int = 40, **options: Any
) -> Counter[str]:
    events: Counter[str] = Counter()
    fixed = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(
        state_machine(build_manager, events),
        settings=settings(stateful_step_count=stateful_step_count, **fixed, **options),
    )
    return events


def test_random_operations_agree_with_the_model() -> None:
    events = run_operations(PagedKVCache, max_examples=100, derandomize=True)
    assert {event for event, count in events.items() if count > 0} == EVENTS


@pytest.mark.slow
def test_many_random_operations_agree_with_the_model() -> None:
    run_operations(PagedKVCache, max_examples=2000, stateful_step_count=80)


# --- Planted faults ------------------------------------------------------------------------------------------------


class BrokenManager:
    def __init__(self, **sizes: int) -> None:
        self.block_size, self.num_models = sizes["block_size"], sizes["num_models"]
        self.manager = PagedKVCache(**sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)


class CopiesNothing(BrokenManager):
    """A writer gets a fresh block but not what was in it."""

    def extend(self, slot: int, first_position: int, num_tokens: int) -> list[tuple[int, int]]:
        self.manager.extend(slot, first_position, num_tokens)
        return []


class WritesSharedBlocks(BrokenManager):
    """As if a fork did not count references: everybody writes in place."""

    def extend(self, slot: int, first_position: int, num_tokens: int) -> list[tuple[int, int]]:
        return self.manager.extend(slot, num_tokens, num_tokens)


class ForgetsOneModelInRollback(BrokenManager):
    """The classic: the draft's cache is not rolled back."""

    def rollback(self, slot: int, num_tokens: int) -> None:
        last_model = self.num_models - 1
        watermark = self.manager.num_computed_tokens(slot, last_model)
        self.manager.rollback(slot, num_tokens)
        self.manager.set_computed(slot, last_model, watermark)


class TrustsHashes(BrokenManager):
    """Prefix hits by a hash (here the number of tokens) that nobody verifies."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.first_with_hash: dict[int, list[int]] = {}

    def allocate(self, token_ids: Sequence[int], max_cached_tokens: int) -> int:
        same_hash = self.first_with_hash.get(len(token_ids), token_ids)
        return self.manager.allocate(same_hash, max_cached_tokens)

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        self.first_with_hash.setdefault(len(token_ids), list(token_ids))
        self.manager.publish(slot, token_ids)


class FindsTooMuch(BrokenManager):
    """Every model is believed to have computed whatever any model has."""

    def allocate(self, token_ids: Sequence[int], max_cached_tokens: int) -> int:
        slot = self.manager.allocate(token_ids, max_cached_tokens)
        for model in range(self.num_models):
            self.manager.set_computed(slot, model, self.manager.capacity(slot))
        return slot


@pytest.mark.parametrize(
    "broken", [CopiesNothing, WritesSharedBlocks, ForgetsOneModelInRollback, TrustsHashes, FindsTooMuch]
)
def test_the_checker_notices(broken: type[BrokenManager]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_operations(broken, max_examples=300, derandomize=True, phases=[Phase.generate])
