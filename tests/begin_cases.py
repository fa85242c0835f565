"""Cases for the ops that begin a round and its forwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import random_seeds
from torch import Tensor

from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.round import RoundPlan
from specengine.kernels.types.rows import COLUMNS, SamplingRows

LARGEST = 2**31 - 1
NUM_SLOTS = 40
BLOCK_SIZE, NUM_TOKENS, NUM_POSITIONS = 16, 300, 256


@dataclass(frozen=True)
class PlanCase:
    """The arguments of `plan_round`, in order."""

    slots: Tensor
    seq_len: Tensor
    length_limit: Tensor
    num_speculative: Tensor
    k: int
    draft_positions: int

    def run(self, op) -> RoundPlan:
        arguments = [getattr(self, name) for name in self.__dataclass_fields__]
        before = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        plan = op(*arguments)
        for now, then in zip(arguments, before, strict=True):
            assert now is then or torch.equal(torch.as_tensor(now), torch.as_tensor(then))
        return plan


def build_plan(count: int, k: int, draft_positions: int = 1024, seed: int = 0) -> PlanCase:
    """Sequences far from every limit, at one, and beyond it; every fourth row is padding, at the last slot."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (NUM_SLOTS,), generator=generator, dtype=torch.int32)

    seq_len = random(2, 60)
    room = torch.tensor([-3, 0, 1, 2, 3, 9, 50])[random(0, 7).long()]
    length_limit = torch.where(random(0, 5) == 0, LARGEST, seq_len + room).int()
    num_speculative = random(0, 12)
    seq_len[-1] = length_limit[-1] = num_speculative[-1] = 0
    slots = torch.randperm(NUM_SLOTS - 1, generator=generator)[:count].int()
    slots[3::4] = NUM_SLOTS - 1
    return PlanCase(slots, seq_len, length_limit, num_speculative, k, draft_positions)


def random_rows_of(count: int) -> SamplingRows:
    """Every column of every sequence another number."""
    generator = torch.Generator().manual_seed(count)
    values = [
        torch.randint(1, 1000, (count,), generator=generator).to(column.dtype) for column in COLUMNS.values()
    ]
    return SamplingRows(*values)._replace(seeds=random_seeds(count))


def random_tables(
    dtype: torch.dtype, width: int, *, has_positions: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Of tokens and of positions."""
    generator = torch.Generator().manual_seed(width)
    tables = [torch.randn(size, width, generator=generator).to(dtype) for size in (NUM_TOKENS, NUM_POSITIONS)]
    return tables[0], tables[1] if has_positions else None


def flat(start: ForwardStart) -> list[Tensor]:
    assert start.hidden is not None
    assert start.row_keys is not None
    rows, decided = start.row_keys
    return [*start.expanded, start.hidden, *rows, decided]
