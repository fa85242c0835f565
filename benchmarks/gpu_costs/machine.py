"""The machine of the model: an H200's sizes, and how long its instructions take.

Nothing here was measured by us. Sizes and rates are the vendor's (CUDA C++ Programming Guide, "Arithmetic
Instructions" and "Compute Capabilities", 9.0). Latencies are of the order that microbenchmarks of Volta to Hopper
found (Jia et al. 2018, arXiv 1804.06826; Luo et al. 2024, arXiv 2402.13499), rounded. What nobody published is an
assumption, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TypeVar

Entry = TypeVar("Entry")

NUM_SMS = 132
WARPS_PER_SM, PROGRAMS_PER_SM = 64, 32
REGISTERS_PER_SM, REGISTER_UNIT = 65536, 256  # a warp's are given out in units
SHARED_PER_SM, SHARED_PER_PROGRAM = 228 << 10, 1 << 10  # bytes; what the system takes of each program's
SCHEDULERS = 4

CLOCK_GHZ = 1.755  # what an H100 holds under load; an H200's highest is 1.98
BANDWIDTH = 4.3e12  # bytes/s: copies on an H200 (docs/gpu.md)
LAUNCH_US = 0.8  # assumed: from the end of a kernel to the first wait of the dependent one in a graph

# Cycles until a result can be used, by the beginning of an instruction's name; the longest that fits counts.
LATENCY = {
    "": 5,  # arithmetic
    "IMAD": 5,
    "MUFU": 20,
    "HMMA": 33,
    "IMMA": 33,
    "SHFL": 24,
    "REDUX": 24,
    "LDS": 29,
    "LDSM": 33,
    "S2R": 20,
    "S2UR": 20,
    "R2UR": 12,
    "LDC": 30,
    "LDG": 263,  # of the L2 cache: weights were asked into it, and all else was written a moment ago
    "LDGSTS": 263,
    "ATOM": 263,
    "RED": 5,
    "MEMBAR": 263,  # until what was stored is seen by all: about a trip to the L2 cache
    "BAR": 25,
    "I2F": 14,
    "F2I": 14,
}

# The unit of a scheduler that a warp's instruction keeps busy, and for how many cycles.
UNIT = {
    "": ("integer", 2),  # 64 operations a cycle on a multiprocessor, a warp has 32
    "FADD": ("float", 1),
    "FMUL": ("float", 1),
    "FFMA": ("float", 1),
    "IMAD": ("float", 2),
    "FSEL": ("float", 1),
    "MOV": ("float", 1),
    "CS2R": ("float", 1),
    "MUFU": ("special", 8),
    "I2F": ("special", 8),
    "F2I": ("special", 8),
    "F2FP": ("float", 2),
    "HMMA": ("tensor", 8),
    "IMMA": ("tensor", 8),
    "LD": ("memory", 1),
    "ST": ("memory", 1),
    "BAR": ("memory", 1),
    "BRA": ("branch", 1),
}

# Cycles for which it keeps what all warps of a multiprocessor share busy; of loads and stores to shared memory, for
# each 128 bytes.
SHARED_UNIT_CYCLES = {"SHFL": 1, "LDS": 1, "STS": 1, "LDSM": 1, "STSM": 1}


def entry_of(opcode: str, table: Mapping[str, Entry]) -> Entry | None:
    """The entry with the longest name that the opcode begins with."""
    found = [name for name in table if opcode.startswith(name)]
    return table[max(found, key=len)] if found else None


@dataclass(frozen=True)
class Share:
    """What some programs take of a multiprocessor."""

    programs: int
    warps: int
    registers: int
    shared_bytes: int

    def __add__(self, other: Share) -> Share:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Share(*(one + another for one, another in pairs))

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor has it."""
        return (
            self.programs <= PROGRAMS_PER_SM
            and self.warps <= WARPS_PER_SM
            and self.registers <= REGISTERS_PER_SM
            and self.shared_bytes <= SHARED_PER_SM
        )


def share_of(programs: int, num_warps: int, registers: int, shared_bytes: int) -> Share:
    """What programs of a kernel take. registers: a thread's; shared_bytes: a program's"""
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps = programs * num_warps
    return Share(programs, warps, warps * a_warp, programs * (shared_bytes + SHARED_PER_PROGRAM))


def programs_per_sm(num_warps: int, registers: int, shared_bytes: int) -> int:
    """Programs of a kernel that fit on a multiprocessor at a time."""
    counts = range(PROGRAMS_PER_SM, 0, -1)
    return next((count for count in counts if share_of(count, num_warps, registers, shared_bytes).fits), 0)
