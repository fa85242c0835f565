"""The paged KV cache manager in plain Python, and a KV memory that remembers what each position was computed from.

`PagedKVCacheModel` says what `specengine._C.PagedKVCache` must do, down to the block ids, with dictionaries where the
C++ has intrusive lists. `KVMemory` says whether doing that is enough: it knows nothing about blocks being shared.
`CheckedCache` runs operations on all three and compares.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from specengine.errors import OutOfBlocksError

EMPTY_PREFIX = 0


class OutOfBlocks(Exception):  # noqa: N818
    """The model's answer where the manager raises OutOfBlocksError."""


@dataclass
class ModelSequence:
    computed: list[int]  # tokens, by model
    marked: list[int]  # blocks noted as computed, by model
    blocks: list[int] = field(default_factory=list)
    num_published: int = 0

    def limit_published(self, num_blocks: int) -> None:
        self.num_published = min(self.num_published, num_blocks)
        self.marked = [min(marked, num_blocks) for marked in self.marked]


@dataclass
class IndexEntry:
    block: int
    key: tuple[int, tuple[int, ...]]  # the prefix before the block, the block's tokens
    prefix: int  # the prefix up to and including the block
    models: set[int] = field(default_factory=set)


class PagedKVCacheModel:
    def __init__(self, *, num_blocks: int, block_size: int, max_sequences: int, num_models: int) -> None:
        self.block_size, self.num_models = block_size, num_models
        self.free_blocks = list(range(num_blocks - 1, 0, -1))
        self.free_slots = list(range(max_sequences - 1, -1, -1))
        self.references = [0] * num_blocks
        self.evictable: dict[int, None] = {}  # oldest first
        self.sequences: dict[int, ModelSequence] = {}
        self.index: dict[tuple[int, tuple[int, ...]], IndexEntry] = {}
        self.entries: dict[
            int, IndexEntry
        ] = {}  # what was published in a block: its own entry or an equal block's
        self.new_prefix = itertools.count(EMPTY_PREFIX + 1)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks) + len(self.evictable)

    def allocate(self, token_ids: Sequence[int], max_cached_tokens: int) -> int:
        slot = self.free_slots.pop()
        sequence = self.sequences[slot] = ModelSequence([0] * self.num_models, [0] * self.num_models)
        parent, models = EMPTY_PREFIX, set(range(self.num_models))
        for end in range(self.block_size, min(len(token_ids), max_cached_tokens) + 1, self.block_size):
            entry = self.index.get((parent, tuple(token_ids[end - self.block_size : end])))
            if entry is None:
                break
            self._add_reference(entry.block)
            sequence.blocks.append(entry.block)
            parent, models = entry.prefix, models & entry.models
            for model in models:
                sequence.computed[model], sequence.marked[model] = end, end // self.block_size
        sequence.num_published = len(sequence.blocks)
        return slot

    def extend(self, slot: int, first_position: int, num_tokens: int) -> list[tuple[int, int]]:
        if self.num_blocks_needed(slot, first_position, num_tokens) > self.num_free_blocks:
            raise OutOfBlocks
        sequence, copies = self.sequences[slot], []
        for i in self._written_blocks(slot, first_position, num_tokens):
            block = sequence.blocks[i]
            if self.references[block] == 1:
                self._withdraw(sequence, i, min(num_tokens, (i + 1) * self.block_size))
                continue
            sequence.blocks[i] = self._take_block()
            self.references[block] -= 1
            sequence.limit_published(i)
            copies.append((block, sequence.blocks[i]))
        while len(sequence.blocks) * self.block_size < num_tokens:
            sequence.blocks.append(self._take_block())
        return copies

    def num_blocks_needed(self, slot: int, first_position: int, num_tokens: int) -> int:
        blocks = self.sequences[slot].blocks
        num_shared = sum(
            self.references[blocks[i]] > 1 for i in self._written_blocks(slot, first_position, num_tokens)
        )
        return num_shared + max(0, -(-num_tokens // self.block_size) - len(blocks))

    def rollback(self, slot: int, num_tokens: int) -> None:
        sequence = self.sequences[slot]
        sequence.computed = [min(computed, num_tokens) for computed in sequence.computed]

    def fork(self, slot: int, num_tokens: int) -> int:
        parent, child = self.sequences[slot], self.free_slots.pop()
        blocks = parent.blocks[: -(-num_tokens // self.block_size)]
        for block in blocks:
            self._add_reference(block)
        self.sequences[child] = ModelSequence(parent.computed, parent.marked, blocks, parent.num_published)
        self.sequences[child].limit_published(num_tokens // self.block_size)
        self.rollback(child, num_tokens)
        return child

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        sequence, size = self.sequences[slot], self.block_size
        while sequence.num_published and not self._is_findable(sequence.blocks[sequence.num_published - 1]):
            sequence.limit_published(sequence.num_published - 1)
        for i in range(sequence.num_published, min(len(token_ids), max(sequence.computed)) // size):
            parent = self.entries[sequence.blocks[i - 1]].prefix if i else EMPTY_PREFIX
            self._publish_block(sequence.blocks[i], (parent, tuple(token_ids[i * size : (i + 1) * size])))
            sequence.num_published = i + 1
        for model, computed in enumerate(sequence.computed):
            end = min(sequence.num_published, computed // size)
            for block in sequence.blocks[sequence.marked[model] : end]:
                if self.entries[block].block == block:
                    self.entries[block].models.add(model)
            sequence.marked[model] = max(sequence.marked[model], end)

    def trim(self, slot: int, num_tokens: int) -> None:
        sequence = self.sequences[slot]
        while (len(sequence.blocks) - 1) * self.block_size >= num_tokens and sequence.blocks:
            self._release_block(sequence.blocks.pop())
        sequence.limit_published(len(sequence.blocks))
        self.rollback(slot, len(sequence.blocks) * self.block_size)

    def free(self, slot: int) -> None:
        self.trim(slot, 0)
        del self.sequences[slot]
        self.free_slots.append(slot)

    def reset_prefix_cache(self) -> None:
        self.free_blocks += self.evictable
        self.evictable.clear()
        self.index.clear()
        self.entries.clear()

    def findable_entries(self) -> list[tuple[tuple[int, ...], IndexEntry]]:
        """Every entry that an allocation can reach, with all tokens up to its end."""
        found, tokens_of = [], {EMPTY_PREFIX: ()}
        for entry in sorted(self.index.values(), key=lambda entry: entry.prefix):
            parent, tokens = entry.key
            if parent in tokens_of:
                tokens_of[entry.prefix] = tokens_of[parent] + tokens
                found.append((tokens_of[entry.prefix], entry))
        return found

    def _written_blocks(self, slot: int, first_position: int, num_tokens: int) -> range:
        end = min(-(-num_tokens // self.block_size), len(self.sequences[slot].blocks))
        return range(first_position // self.block_size, end if first_position < num_tokens else 0)

    def _withdraw(self, sequence: ModelSequence, i: int, write_end: int) -> None:
        block = sequence.blocks[i]
        entry = self.entries.get(block)
        stale = {model for model, computed in enumerate(sequence.computed) if computed < write_end}
        for model in stale:
            sequence.marked[model] = min(sequence.marked[model], i)
        if entry and entry.block == block:
            entry.models -= stale
            if not entry.models:
                self._unindex(block)
        if len(stale) == self.num_models:
            self.entries.pop(block, None)
        if block not in self.entries:
            sequence.limit_published(i)

    def _publish_block(self, block: int, key: tuple[int, tuple[int, ...]]) -> None:
        entry = self.entries.get(block)
        if entry and entry.block == block:
            if entry.key == key:
                return
            self._unindex(block)
        if key not in self.index:
            self.index[key] = IndexEntry(block, key, next(self.new_prefix))
        self.entries[block] = self.index[key]

    def _is_findable(self, block: int) -> bool:
        entry = self.entries.get(block)
        return entry is not None and self.index.get(entry.key) is entry

    def _unindex(self, block: int) -> None:
        del self.index[self.entries.pop(block).key]

    def _take_block(self) -> int:
        if self.free_blocks:
            block = self.free_blocks.pop()
        else:
            block = next(iter(self.evictable))
            del self.evictable[block]
            self._unindex(block)
        self.references[block] = 1
        return block

    def _add_reference(self, block: int) -> None:
        self.references[block] += 1
        self.evictable.pop(block, None)

    def _release_block(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] > 0:
            return
        if self._is_findable(block) and self.entries[block].block == block:
            self.evictable[block] = None
        else:
            self.entries.pop(block, None)
            self.free_blocks.append(block)


class KVMemory:
    """Every model's KV tensor; a position holds the tokens that its KV was computed from instead of numbers."""

    def __init__(self, *, block_size: int, num_models: int) -> None:
        self.block_size, self.num_models = block_size, num_models
        self._cells: dict[tuple[int, int, int], tuple[int, ...]] = {}  # (model, block, offset)

    def write(self, model: int, blocks: Sequence[int], tokens: Sequence[int], first: int, end: int) -> None:
        for position in range(first, end):
            block, offset = blocks[position // self.block_size], position % self.block_size
            self._cells[model, block, offset] = tuple(tokens[: position + 1])

    def copy(self, source: int, destination: int) -> None:
        for model, offset in itertools.product(range(self.num_models), range(self.block_size)):
            self._cells[model, destination, offset] = self._cells.get((model, source, offset), ())

    def read(self, model: int, block: int, offset: int) -> tuple[int, ...]:
        return self._cells.get((model, block, offset), ())


class CheckedCache:
    """Runs every operation on the manager, the model and the KV memory, and compares them after each one."""

    def __init__(self, build_manager: Callable[..., Any], events: Counter[str], **sizes: int) -> None:
        self.block_size, self.num_models = sizes["block_size"], sizes["num_models"]
        self.max_tokens = sizes["max_blocks_per_sequence"] * self.block_size
        self.max_sequences, self.num_blocks = sizes["max_sequences"], sizes["num_blocks"]
        self.table = np.full((self.max_sequences, sizes["max_blocks_per_sequence"]), -1, dtype=np.int32)
        self.manager = build_manager(block_table_address=self.table.ctypes.data, **sizes)
        del sizes["max_blocks_per_sequence"]
        self.model = PagedKVCacheModel(**sizes)
        self.memory = KVMemory(block_size=self.block_size, num_models=self.num_models)
        self.tokens: dict[int, list[int]] = {}  # of every sequence, as far as any model has computed them
        self.events = events

    def capacity(self, slot: int) -> int:
        return len(self.model.sequences[slot].blocks) * self.block_size

    def allocate(self, token_ids: list[int], max_cached_tokens: int) -> int:
        slot = self.model.allocate(token_ids, max_cached_tokens)
        assert self.manager.allocate(np.array(token_ids, dtype=np.int32), max_cached_tokens) == slot
        computed = self.model.sequences[slot].computed
        self.tokens[slot] = token_ids[: max(computed)]
        self.events["hit"] += max(computed) > 0
        self.events["hit for one model only"] += len(set(computed)) > 1
        return slot

    def write(self, slot: int, first_position: int, new_tokens: list[int], *, writers: set[int]) -> None:
        """Extend, then let some models compute: below the highest watermark the tokens are what they were."""
        tokens = self.tokens[slot]
        if first_position > len(tokens):
            tokens = tokens + [0] * (first_position - len(tokens))
        tokens = (tokens[:first_position] + new_tokens)[: self.max_tokens]
        tokens = self.tokens[slot] + tokens[len(self.tokens[slot]) :]
        end = max(first_position, min(first_position + len(new_tokens), self.max_tokens))
        if not self.extend(slot, first_position, end):
            return
        for model in sorted(writers):
            self.memory.write(model, self.manager.sequence_blocks(slot), tokens, first_position, end)
            if self.model.sequences[slot].computed[model] >= first_position:
                self.set_computed(slot, model, max(end, self.model.sequences[slot].computed[model]))
        self.tokens[slot] = tokens[: max(self.model.sequences[slot].computed)]

    def extend(self, slot: int, first_position: int, num_tokens: int) -> bool:
        num_needed = self.model.num_blocks_needed(slot, first_position, num_tokens)
        is_possible = num_needed <= self.model.num_free_blocks
        assert self.manager.num_blocks_needed(slot, first_position, num_tokens) == num_needed
        assert self.manager.can_extend(slot, first_position, num_tokens) == is_possible
        num_cached = len(self.model.index)
        try:
            expected = self.model.extend(slot, first_position, num_tokens)
        except OutOfBlocks:
            self.events["out of blocks"] += 1
            with pytest.raises(OutOfBlocksError):
                self.manager.extend(slot, first_position, num_tokens)
            return False
        self.events["eviction or withdrawal"] += len(self.model.index) < num_cached
        self.events["copy on write"] += len(expected) > 0
        for source, destination in self.manager.extend(slot, first_position, num_tokens):
            self.memory.copy(source, destination)
        return True

    def set_computed(self, slot: int, model: int, num_tokens: int) -> None:
        self.model.sequences[slot].computed[model] = num_tokens
        self.manager.set_computed(slot, model, num_tokens)
        self._forget_uncomputed(slot)

    def rollback(self, slot: int, num_tokens: int) -> None:
        self.events["rollback"] += num_tokens < len(self.tokens[slot])
        self.model.rollback(slot, num_tokens)
        self.manager.rollback(slot, num_tokens)
        self._forget_uncomputed(slot)

    def fork(self, slot: int, num_tokens: int) -> None:
        child = self.model.fork(slot, num_tokens)
        assert self.manager.fork(slot, num_tokens) == child
        self.tokens[child] = list(self.tokens[slot])
        self._forget_uncomputed(child)
        self.events["fork"] += 1

    def publish(self, slot: int, token_ids: list[int]) -> None:
        num_cached = len(self.model.index)
        self.model.publish(slot, token_ids)
        self.manager.publish(slot, token_ids)
        self.events["publication"] += len(self.model.index) > num_cached
        sequence = self.model.sequences[slot]
        own = [
            self.model.entries[block].block == block for block in sequence.blocks[: sequence.num_published]
        ]
        self.events["equal block published"] += not all(own)

    def trim(self, slot: int, num_tokens: int) -> None:
        self.model.trim(slot, num_tokens)
        self.manager.trim(slot, num_tokens)
        self._forget_uncomputed(slot)

    def free(self, slot: int) -> None:
        self.model.free(slot)
        self.manager.free(slot)
        del self.tokens[slot]

    def reset_prefix_cache(self) -> None:
        self.model.reset_prefix_cache()
        self.manager.reset_prefix_cache()

    def _forget_uncomputed(self, slot: int) -> None:
        del self.tokens[slot][max(self.model.sequences[slot].computed) :]

    def check(self) -> None:
        self.check_contents()
        self.check_findable_contents()
        self.check_accounts()

    def check_contents(self) -> None:
        """What a sequence believes a model has computed is in that model's memory, through the real block table."""
        for (slot, tokens), model in itertools.product(self.tokens.items(), range(self.num_models)):
            for position in range(self.manager.num_computed_tokens(slot, model)):
                block, offset = self.table[slot, position // self.block_size], position % self.block_size
                content = self.memory.read(model, block, offset)
                assert content == tuple(tokens[: position + 1]), (
                    f"content of {slot=} {model=} {position=} {block=}"
                )

    def check_findable_contents(self) -> None:
        for tokens, entry in self.model.findable_entries():
            for model, offset in itertools.product(entry.models, range(self.block_size)):
                expected = tokens[: len(tokens) - self.block_size + offset + 1]
                assert self.memory.read(model, entry.block, offset) == expected, (
                    f"findable {entry=} {offset=}"
                )

    def check_accounts(self) -> None:
        manager, model = self.manager, self.model
        manager.check_invariants()
        for slot, row in enumerate(self.table.tolist()):
            blocks = model.sequences[slot].blocks if slot in model.sequences else []
            assert row == blocks + [0] * (len(row) - len(blocks)), f"row of {slot=}"
        for slot, sequence in model.sequences.items():
            assert manager.sequence_blocks(slot) == sequence.blocks
            assert manager.capacity(slot) == len(sequence.blocks) * self.block_size
            watermarks = [manager.num_computed_tokens(slot, i) for i in range(self.num_models)]
            assert watermarks == sequence.computed, f"watermarks of {slot=}"
        assert [manager.reference_count(block) for block in range(self.num_blocks)] == model.references
        assert manager.num_free_blocks == model.num_free_blocks
        assert manager.num_cached_blocks == len(model.index)
        assert manager.num_sequences == len(model.sequences)
