"""What rounds take, part by part: for whoever chooses how many tokens to draft.

On a CPU by the host's clock, around each part. On CUDA by events around it: they are read with the round's results,
which come after them, so nothing waits. A round that is replayed is one part.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# Rounds that are remembered.
NUM_TIMES = 256
_NUM_PARTS = 3


class RoundTimes(NamedTuple):
    """Seconds that a round took.

    batch_size, k: its sequences, and the most drafts that any of them may have had
    draft, verify, commit: its parts (the host's part of drafting is in `draft`); None where it was replayed as a whole
    device:        all three
    host:          what the host made of its results, from when they were there
    """

    batch_size: int
    k: int
    draft: float | None
    verify: float | None
    commit: float | None
    device: float
    host: float


@dataclass(slots=True)
class Stopwatch:
    """Of one round that is under way. `mark` ends a part of it."""

    clock: Clock
    batch_size: int
    k: int
    moments: list[float] = field(default_factory=list)
    events: list[torch.cuda.Event] = field(default_factory=list)
    host_began: float = 0.0

    def mark(self) -> None:
        """Here one part ends, and the next begins."""
        self.clock.mark(self)

    def begin_host(self) -> None:
        """The results are there."""
        self.host_began = time.perf_counter()


class Clock:
    """Starts and stops the stopwatches of an engine's rounds. Events are used again and again."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._free: list[torch.cuda.Event] = []

    def start(self, batch_size: int, k: int) -> Stopwatch:
        """A round begins."""
        watch = Stopwatch(self, batch_size, k)
        self.mark(watch)
        return watch

    def restart(self, watch: Stopwatch) -> None:
        """The round begins now: what came before was no part of it."""
        self._free += watch.events
        watch.events.clear()
        watch.moments.clear()
        self.mark(watch)

    def mark(self, watch: Stopwatch) -> None:
        """Notes this moment: the host's, or the device's once it comes to it."""
        if not self._is_cuda:
            watch.moments.append(time.perf_counter())
            return
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        watch.events.append(event)

    def split(self, watch: Stopwatch, rounds: list[tuple[float, float, float]]) -> list[Stopwatch]:
        """Stopwatches of rounds that ran in one call, which is over now: of each the seconds of its three parts. What
        the first round's took until the call, the host's part of drafting, is in its draft."""
        end, watches = time.perf_counter(), []
        for draft, verify, commit in reversed(rounds):
            moments = [end - commit - verify - draft, end - commit - verify, end - commit, end]
            watches.append(Stopwatch(self, watch.batch_size, watch.k, moments))
            end = moments[0]
        watches[-1].moments[0] = watch.moments[0]
        return watches[::-1]

    def stop(self, watch: Stopwatch) -> RoundTimes:
        """What the round took: its results have been read, and worked through."""
        host = time.perf_counter() - watch.host_began
        parts = [end - start for start, end in itertools.pairwise(watch.moments)]
        if watch.events:
            first, *others = watch.events
            ends = [0.0, *(first.elapsed_time(event) / 1000 for event in others)]
            parts = [end - start for start, end in itertools.pairwise(ends)]
            self._free += watch.events
        draft, verify, commit = parts if len(parts) == _NUM_PARTS else (None, None, None)
        return RoundTimes(watch.batch_size, watch.k, draft, verify, commit, sum(parts), host)
