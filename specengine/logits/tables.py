"""The device's tables of what is done to logits, a row a slot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from specengine.kernels.types.transforms import Transforms
from specengine.logits.entries import LogitEntry

# Entries that there is room for at first; then as many as a request needs, in powers of two.
MIN_CAPACITY = 16


class TransformTables:
    """Owns the tables. They keep their place until a request has more entries, or longer
    prefixes, than there is room for.

    history: `[S, L]` int32, the tokens of each slot, which somebody else writes
    """

    def __init__(self, history: Tensor) -> None:
        self.tables = _empty(history, MIN_CAPACITY)
        self._counts = [0] * history.shape[0]

    def admit(self, slot: int, entries: Sequence[LogitEntry]) -> None:
        """Fills a slot's row."""
        count = len(entries)
        if count or self._counts[slot]:
            self._counts[slot] = count
            self.tables.num_entries[slot] = count
        if count:
            entries = sorted(entries, key=lambda entry: entry.token)
            token, value, first, end, prefixes = zip(*entries, strict=True)
            lengths = [len(prefix) for prefix in prefixes]
            starts = list(itertools.accumulate(lengths, initial=0))
            self._make_room(count, starts[-1])
            columns = (token, value, first, end, starts[:-1], lengths, tuple(itertools.chain(*prefixes)))
            for table, values in zip(self.tables[2:], columns, strict=True):
                table[slot, : len(values)] = torch.tensor(values, dtype=table.dtype).to(table.device)

    def _make_room(self, num_entries: int, num_prefix_tokens: int) -> None:
        capacity, prefix_capacity = self.tables.token.shape[1], self.tables.prefix.shape[1]
        if num_entries > capacity or num_prefix_tokens > prefix_capacity:
            self.tables = _grown(
                self.tables, _room(num_entries, capacity), _room(num_prefix_tokens, prefix_capacity)
            )


def _room(count: int, capacity: int) -> int:
    return capacity if count <= capacity else 1 << (count - 1).bit_length()


def _empty(history: Tensor, capacity: int, prefix_capacity: int = 0) -> Transforms:
    num_slots, device = history.shape[0], history.device

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    shape = (num_slots, capacity)
    return Transforms(
        history=history,
        num_entries=zeros(num_slots),
        token=zeros(*shape),
        value=zeros(*shape, dtype=torch.float32),
        first=zeros(*shape),
        end=zeros(*shape),
        prefix_start=zeros(*shape),
        prefix_length=zeros(*shape),
        prefix=zeros(num_slots, prefix_capacity),
    )


def _grown(tables: Transforms, capacity: int, prefix_capacity: int) -> Transforms:
    grown = _empty(tables.history, capacity, prefix_capacity)
    grown.num_entries.copy_(tables.num_entries)
    for new, old in zip(grown[2:], tables[2:], strict=True):
        new[:, : old.shape[1]] = old
    return grown
