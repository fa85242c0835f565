"""How long a program takes: its instructions one after the other, each when its operands are there and its unit free.

All warps are taken to go in step. What one of them waits for, the others wait for, too; what they share, they queue
for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_costs import machine
from gpu_costs.sass import Instruction

_WAIT = "ACQBULK"
_SHARED = "shared memory and shuffles"


@dataclass(frozen=True)
class Timed:
    """Cycles from the wait for the kernel before until each instruction is issued, and until the last ends; and for
    how many of them the program keeps the busiest unit of its multiprocessor to itself."""

    issued: list[float]
    end: float
    busy: float


def time_path(path: Sequence[Instruction], num_warps: int, *, is_early: bool = True) -> Timed:
    """The path's instructions, executed by a program that has a multiprocessor to itself.

    is_early: it began while the kernel before still ran, so that what comes before the wait is over when that ends:
              this is what dependent launches are for
    """
    a_scheduler = num_warps / machine.SCHEDULERS
    ready: dict[str, float] = {}
    issue = copied = last = 0.0
    free: Counter[str] = Counter()  # when a unit is, in cycles
    busy: Counter[str] = Counter()
    copies: list[float] = []
    issued: list[float] = []
    for each in path:
        name = each.opcode
        if is_early and name.startswith(_WAIT):
            ready, issue, free, last = {}, 0.0, Counter(), 0.0
        at = max([issue, *(ready.get(register, 0.0) for register in each.read)])
        if name.startswith("DEPBAR"):
            at = max([at, *copies[: len(copies) - _groups_left(each)]])
        unit, cycles = _unit_of(name, num_warps)
        at = max(at, free[unit])
        issued.append(at)
        free[unit] = at + cycles
        issue = at + max(1.0, a_scheduler)
        end = max(issue, free[unit] if unit == _SHARED else 0.0) + (
            machine.entry_of(name, machine.LATENCY) or 0
        )
        busy["issue"] += a_scheduler
        busy[unit] += cycles
        if name.startswith("LDGSTS"):
            copied = max(copied, end)
        elif name.startswith("LDGDEPBAR"):
            copies.append(copied)
        elif name.startswith(("BAR", "MEMBAR")):
            issue = end
        for register in each.written:
            ready[register] = end
        last = max(last, end)
    return Timed(issued, last, max(busy.values()))


def _groups_left(wait: Instruction) -> int:
    """Of asynchronous copies, those that a wait does not wait for."""
    return int(wait.operands.split(",")[1].strip(), 16)


def _unit_of(name: str, num_warps: int) -> tuple[str, float]:
    """The unit that an instruction of all warps keeps busy, and for how many cycles."""
    shared = machine.entry_of(name, machine.SHARED_UNIT_CYCLES)
    if shared is not None:
        return _SHARED, shared * _transactions(name) * num_warps
    unit, cycles = machine.entry_of(name, machine.UNIT) or ("integer", 1)
    return unit, cycles * num_warps / machine.SCHEDULERS


def _transactions(name: str) -> int:
    """Of 128 bytes, which a warp's instruction on memory takes."""
    if name.startswith("SHFL"):
        return 1
    if ".M88" in name:
        return int(name[-1]) if name[-1].isdigit() else 1
    return 4 if ".128" in name else 2 if ".64" in name else 1


def load_levels(path: Sequence[Instruction]) -> list[int]:
    """For each instruction, how many loads from global memory must have come back, one after the other, before it can
    be issued: its own operands' and, as a warp issues in order, those that instructions before it waited for."""
    level: dict[str, int] = {}
    reached, copies, pending = 0, [0], 0
    found = []
    for each in path:
        reached = max([reached, *(level.get(register, 0) for register in each.read)])
        if each.opcode.startswith("DEPBAR"):
            reached = max([reached, *copies[: len(copies) - _groups_left(each)]])
        found.append(reached)
        if each.opcode.startswith("LDGSTS"):
            pending = max(pending, reached + 1)
        elif each.opcode.startswith("LDGDEPBAR"):
            copies.append(pending)
        is_load = each.opcode.startswith(("LDG.", "ATOM"))
        for register in each.written:
            level[register] = reached + is_load
    return found
