"""The device's tables of what is done to logits, a row a slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specengine.kernels.types.transforms import Transforms
from specengine.logits.entries import LogitEntry

# Entries that there is room for at first; then as many as a request needs, in powers of two.
MIN_CAPACITY = 16


class TransformTables:
    """Owns the tables. They keep their place until a request has more entries than there is room for.

    history: `[S, L]` int32, the tokens of each slot, which somebody else writes
    """

    def __init__(self, history: Tensor) -> None:
        self.tables = _empty(history, MIN_CAPACITY)
        self._counts = [0] * history.shape[0]

    def admit(self, slot: int, entries: Sequence[LogitEntry]) -> None:
        """Fills a slot's row."""
        count = len(entries)
        if count > self.tables.token.shape[1]:
            self.tables = _grown(self.tables, 1 << (count - 1).bit_length())
        if count or self._counts[slot]:
            self._counts[slot] = count
            self.tables.num_entries[slot] = count
        if count:
            columns = zip(*sorted(entries, key=lambda entry: entry.token), strict=True)
            for table, values in zip(self.tables[2:], columns, strict=True):
                table[slot, :count] = torch.tensor(values, dtype=table.dtype).to(table.device)


def _empty(history: Tensor, capacity: int) -> Transforms:
    num_slots, device = history.shape[0], history.device

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    shape = (num_slots, capacity)
    value = zeros(*shape, dtype=torch.float32)
    return Transforms(history, zeros(num_slots), zeros(*shape), value, zeros(*shape), zeros(*shape))


def _grown(tables: Transforms, capacity: int) -> Transforms:
    grown = _empty(tables.history, capacity)
    grown.num_entries.copy_(tables.num_entries)
    for new, old in zip(grown[2:], tables[2:], strict=True):
        new[:, : old.shape[1]] = old
    return grown
