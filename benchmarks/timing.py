"""What a timer is: `cpu_timing.Cpu` and `gpu_timing.Gpu` are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# An op on its arguments of a turn: each turn's lie elsewhere in memory, so that nothing comes from a cache.
Call = Callable[[int], Any]


@dataclass(frozen=True)
class Measured:
    """Seconds of single calls, ours and each rival's; kernels that a call of ours launches; why a rival is missing."""

    seconds: list[float]
    rivals: dict[str, list[float]] = field(default_factory=dict)
    launches: int | None = None
    notes: tuple[str, ...] = ()


class Timer(Protocol):
    """Times calls on one machine.

    bandwidth_name: what `bandwidth` is the bandwidth of: "read" or "copy"
    bandwidths:     what it was so far
    """

    bandwidth_name: str
    bandwidths: list[float]

    def about(self) -> dict[str, str]:
        """The machine, and versions that only matter there."""

    def bandwidth(self) -> float:
        """GB/s of the memory, now."""

    def measure(self, benchmark: BenchmarkFixture, ours: Call, rivals: dict[str, Call]) -> Measured:
        """All in turns; `benchmark` gets our times."""
