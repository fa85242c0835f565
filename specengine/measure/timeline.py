"""The parts of decoding, timed: by the spans of `specengine.ranges` as they run, or by a trace of what a GPU did."""

from __future__ import annotations

import bisect
import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specengine import ranges
from specengine.errors import SpecEngineError

DECODE = "decode"
GRAPH, OTHER = "graph", "other"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")


@dataclass(frozen=True)
class Part:
    """A part of decoding.

    name:  draft, verify, commit, host: everything else; on CUDA also graph: replays of recorded rounds, and other: work
           on the device that none of these asked for
    calls: times that the part was entered; on CUDA, launches of kernels, copies and graphs
    """

    name: str
    calls: int
    seconds: float


class PartTimes:
    """A sink of one thread's spans: how often each was entered, and its own time, without the spans inside it."""

    takes_times = True

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str, payload: Mapping[str, int]) -> None:
        self._charge()
        self._open.append(name)
        self.calls[name] += 1

    def note(self, name: str, payload: Mapping[str, int]) -> None:
        pass

    def leave(self, name: str) -> None:
        self._charge()
        self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        self.calls[name] += 1
        self.seconds[name] += seconds
        if self._open:  # there it was a part of what is open
            self.seconds[self._open[-1]] -= seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def parts(self, seconds: float) -> tuple[Part, ...]:
        """The parts of that many seconds; what is in no span is the host's."""
        timed = [Part(_short(name), self.calls[name], self.seconds[name]) for name in ranges.PARTS[:-1]]
        rest = seconds - sum(part.seconds for part in timed)
        return (*timed, Part(_short(ranges.HOST), self.calls[ranges.HOST], rest))


class TraceRanges:
    """A sink that makes each span an event of PyTorch's profiler."""

    takes_times = False

    def __init__(self) -> None:
        self._open: list[torch.profiler.record_function] = []

    def enter(self, name: str, payload: Mapping[str, int]) -> None:
        event = torch.profiler.record_function(name)
        event.__enter__()
        self._open.append(event)

    def note(self, name: str, payload: Mapping[str, int]) -> None:
        pass

    def leave(self, name: str) -> None:
        self._open.pop().__exit__(None, None, None)


def read_trace(path: Path) -> dict[str, Any]:
    """A Chrome trace, zipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        trace: dict[str, Any] = json.load(file)
    return trace


def device_parts(trace: Mapping[str, Any]) -> tuple[Part, ...]:
    """What the device did while decoding, by the span that launched it; the host's is the time it did nothing.

    Where work overlaps, the time is that of the work which began first, so that parts add up to the time that passed.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    window = next(_interval(event) for event in annotations if event["name"] == DECODE)
    spans = sorted(
        (*_interval(event), event["name"]) for event in annotations if event["name"] in ranges.PARTS
    )
    launched_by = {
        event["args"]["correlation"]: _owner(event, spans)
        for event in events
        if event.get("cat") in _LAUNCHES and window[0] <= event["ts"] <= window[1]
    }
    launches: defaultdict[str, set[int]] = defaultdict(set)
    microseconds: defaultdict[str, float] = defaultdict(float)
    busy_until = window[0]
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    for event in sorted(work, key=lambda event: float(event["ts"])):
        launch = event["args"].get("correlation")
        if launch in launched_by:
            begin, end = _interval(event)
            microseconds[launched_by[launch]] += max(0.0, end - max(begin, busy_until))
            launches[launched_by[launch]].add(launch)
            busy_until = max(busy_until, end)
    if not launches:
        raise SpecEngineError(
            "the trace holds no work of the device: is another profiler attached? Then add --no-trace"
        )
    names = [_short(name) for name in ranges.PARTS[:-1]]
    names += [name for name in (GRAPH, OTHER) if launches[name]]
    parts = [Part(name, len(launches[name]), microseconds[name] * 1e-6) for name in names]
    idle = (window[1] - window[0]) * 1e-6 - sum(part.seconds for part in parts)
    return (*parts, Part(_short(ranges.HOST), 0, max(0.0, idle)))


def _interval(event: Mapping[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _owner(launch: Mapping[str, Any], spans: list[tuple[float, float, str]]) -> str:
    """The part that a launch belongs to. What the host's span launches (copies of results) is no part of a round."""
    if str(launch["name"]).startswith(_GRAPH_LAUNCHES):
        return GRAPH
    place = bisect.bisect_right(spans, (float(launch["ts"]), float("inf"), "")) - 1
    if place < 0 or launch["ts"] > spans[place][1] or spans[place][2] == ranges.HOST:
        return OTHER
    return _short(spans[place][2])


def _short(name: str) -> str:
    return name.removeprefix("step/")
