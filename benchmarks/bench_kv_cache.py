"""Nanoseconds per call of the paged KV cache manager, on pools of 1 k, 32 k and 1 M blocks: flat, or it is not O(1).

Each round makes NUM_CALLS calls from Python and its time is divided by their number, so a call's price includes
Python's (about 100 ns). Blocks come from a shuffled free stack: neighbours in a sequence are strangers in memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from measure import Report, Subject
from pytest_benchmark.fixture import BenchmarkFixture

from specengine._C import PagedKVCache

BLOCK_SIZE = 16
NUM_CALLS = 128  # sequences, each called once a round
NUM_SLOTS = 2 * NUM_CALLS
PROMPT_BLOCKS = 2
PROMPT_TOKENS = PROMPT_BLOCKS * BLOCK_SIZE
NUM_BLOCKS = {"1k": 1 << 10, "32k": 1 << 15, "1M": 1 << 20}
ROUNDS = 200

PROMPTS = np.arange(NUM_CALLS * PROMPT_TOKENS, dtype=np.int32).reshape(NUM_CALLS, PROMPT_TOKENS)


class Pool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        max_blocks_per_sequence = num_blocks // NUM_CALLS
        self.table = np.zeros((NUM_SLOTS, max_blocks_per_sequence), dtype=np.int32)
        self.cache = PagedKVCache(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_sequences=NUM_SLOTS,
            max_blocks_per_sequence=max_blocks_per_sequence,
            num_models=2,
            block_table_address=self.table.ctypes.data,
        )
        self._shuffle_free_blocks()

    def _shuffle_free_blocks(self) -> None:
        owners = [slot for slot in range(NUM_SLOTS) for _ in range(self.num_blocks // NUM_SLOTS)][1:]
        random.Random(0).shuffle(owners)
        num_tokens = [0] * NUM_SLOTS
        self.allocate_empty(NUM_SLOTS)
        for slot in owners:
            num_tokens[slot] += BLOCK_SIZE
            self.cache.extend(slot, num_tokens[slot] - BLOCK_SIZE, num_tokens[slot])
        self.free_all()

    def allocate_empty(self, count: int) -> list[int]:
        return [self.cache.allocate(PROMPTS[0], 0) for _ in range(count)]

    def start(self) -> list[int]:
        """NUM_CALLS sequences that have computed and published their prompts."""
        slots = [self.cache.allocate(prompt, PROMPT_TOKENS) for prompt in PROMPTS]
        for slot, prompt in zip(slots, PROMPTS, strict=True):
            self.cache.extend(slot, 0, PROMPT_TOKENS)
            for model in range(2):
                self.cache.set_computed(slot, model, PROMPT_TOKENS)
            self.cache.publish(slot, prompt)
        return slots

    def free_all(self) -> None:
        for slot in np.flatnonzero(self.table[:, 0]).tolist():
            self.cache.free(slot)

    def assert_behaves(self) -> None:
        """What is timed is right: hits, copies on write, rollback, and every block back at the end."""
        cache, [slot, *_] = self.cache, self.start()
        child = cache.fork(slot, PROMPT_TOKENS - 1)
        assert len(cache.extend(child, PROMPT_TOKENS - 1, PROMPT_TOKENS)) == 1
        cache.rollback(child, 1)
        assert [cache.num_computed_tokens(child, model) for model in range(2)] == [1, 1]
        self.free_all()
        again = cache.allocate(PROMPTS[0], PROMPT_TOKENS)
        assert cache.num_computed_tokens(again, 1) == PROMPT_TOKENS
        self.free_all()
        assert cache.num_free_blocks == self.num_blocks - 1
        assert cache.num_sequences == 0
        cache.check_invariants()


@pytest.fixture(scope="module", params=NUM_BLOCKS)
def shared_pool(request: pytest.FixtureRequest) -> Pool:
    pool = Pool(NUM_BLOCKS[request.param])
    pool.assert_behaves()
    return pool


@pytest.fixture
def pool(shared_pool: Pool) -> Pool:
    shared_pool.free_all()
    shared_pool.cache.reset_prefix_cache()
    return shared_pool


class Measure:
    """The `measure` fixture: times a method of the pool and adds it to the report."""

    def __init__(self, benchmark: BenchmarkFixture, report: Report, pool: Pool) -> None:
        self._benchmark, self._report, self._pool = benchmark, report, pool

    def __call__(
        self, name: str, call: Callable[[], Any], *, before: Callable[[], Any] = lambda: None
    ) -> None:
        """Time call, which makes NUM_CALLS calls of one method, after bringing the pool into place with before."""
        self._benchmark.pedantic(call, setup=lambda: before() and None, rounds=ROUNDS, warmup_rounds=5)
        self._pool.cache.check_invariants()
        subject = Subject(f"kv_cache.{name}", f"{self._pool.num_blocks} blocks")
        self._report.record(self._benchmark, subject, calls_per_round=NUM_CALLS)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, report: Report, pool: Pool) -> Measure:
    return Measure(benchmark, report, pool)


def test_allocate_a_prompt_of_two_cached_blocks(measure: Measure, pool: Pool) -> None:
    pool.start()
    allocate, prompts = pool.cache.allocate, list(PROMPTS)

    def call() -> None:
        for prompt in prompts:
            allocate(prompt, PROMPT_TOKENS)

    measure("allocate", call, before=pool.free_all)


def test_extend_by_a_free_block(measure: Measure, pool: Pool) -> None:
    slots, extend = pool.start(), pool.cache.extend

    def call() -> None:
        for slot in slots:
            extend(slot, PROMPT_TOKENS, PROMPT_TOKENS + 5)

    def before() -> None:
        for slot in slots:
            pool.cache.trim(slot, PROMPT_TOKENS)

    measure("extend (free block)", call, before=before)


def test_extend_by_an_evicted_block(measure: Measure, pool: Pool) -> None:
    """Every free block is a cached one, and a round takes those that were freed longest ago."""
    cache, extend = pool.cache, pool.cache.extend
    columns = pool.table.shape[1] // 2
    tokens = np.arange(NUM_SLOTS * columns * BLOCK_SIZE, dtype=np.int32).reshape(NUM_SLOTS, -1)
    for slot, token_ids in zip(pool.allocate_empty(NUM_SLOTS), tokens, strict=True):
        num_tokens = min(columns, cache.num_free_blocks) * BLOCK_SIZE
        extend(slot, 0, num_tokens)
        cache.set_computed(slot, 0, num_tokens)
        cache.publish(slot, token_ids[:num_tokens])
    pool.free_all()
    assert cache.num_cached_blocks == pool.num_blocks - 1
    slots = pool.allocate_empty(NUM_CALLS)
    fresh = np.arange(BLOCK_SIZE, dtype=np.int32)

    def call() -> None:
        for slot in slots:
            extend(slot, 0, BLOCK_SIZE)

    def recycle() -> None:
        """Publish what the last round took under new tokens, so that nothing is ever free without being cached."""
        for i, slot in enumerate(slots):
            if cache.capacity(slot) > 0:
                fresh[:2] += (-1, i)
                cache.set_computed(slot, 0, BLOCK_SIZE)
                cache.publish(slot, fresh)
                cache.trim(slot, 0)
        assert cache.num_cached_blocks == pool.num_blocks - 1

    measure("extend (evicted block)", call, before=recycle)
    for slot in slots:
        cache.free(slot)


def test_rollback(measure: Measure, pool: Pool) -> None:
    slots, rollback = pool.start(), pool.cache.rollback

    def call() -> None:
        for slot in slots:
            rollback(slot, 3)

    def before() -> None:
        for slot in slots:
            pool.cache.set_computed(slot, 0, PROMPT_TOKENS)

    measure("rollback", call, before=before)


def test_fork_two_blocks(measure: Measure, pool: Pool) -> None:
    slots, fork = pool.start(), pool.cache.fork
    children: list[int] = []

    def call() -> None:
        for slot in slots:
            children.append(fork(slot, PROMPT_TOKENS))  # noqa: PERF401

    def before() -> None:
        while children:
            pool.cache.free(children.pop())

    measure("fork", call, before=before)


def test_publish_a_block(measure: Measure, pool: Pool) -> None:
    slots, publish = pool.start(), pool.cache.publish
    committed = [np.append(prompt, prompt[:BLOCK_SIZE]) for prompt in PROMPTS]

    def call() -> None:
        for slot, token_ids in zip(slots, committed, strict=True):
            publish(slot, token_ids)

    def before() -> None:
        for slot in slots:
            pool.cache.rollback(slot, PROMPT_TOKENS)
            pool.cache.extend(slot, PROMPT_TOKENS, PROMPT_TOKENS + BLOCK_SIZE)
            pool.cache.set_computed(slot, 0, PROMPT_TOKENS + BLOCK_SIZE)

    measure("publish", call, before=before)


def test_publish_nothing_new(measure: Measure, pool: Pool) -> None:
    slots, publish, prompts = pool.start(), pool.cache.publish, list(PROMPTS)

    def call() -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            publish(slot, prompt)

    measure("publish (nothing new)", call)


def test_free_two_blocks(measure: Measure, pool: Pool) -> None:
    slots, free = pool.start(), pool.cache.free

    def call() -> None:
        for slot in slots:
            free(slot)

    def before() -> None:
        if pool.cache.num_sequences == 0:
            slots[:] = pool.start()

    measure("free", call, before=before)
