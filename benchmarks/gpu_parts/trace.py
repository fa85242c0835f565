"""What a trace of torch.profiler says about rounds: when the GPU had nothing to do, and what made the host wait."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEADY = "specengine steady state"
RUNTIME = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
# Calls that return when the device is done. A copy from or to memory that is not pinned waits too, whatever its name.
BLOCKING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cudaMemset",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
)
PAGEABLE = "Pageable"

Event = dict[str, Any]
Span = tuple[float, float]


@dataclass(frozen=True)
class Steady:
    """Totals of the rounds in steady state; shares are of the time from the first to the last device event.

    idle_share: nothing was running and nothing had been launched that was: time between launches, a graph being one
    gap_share:  no kernel was running: the gaps between a graph's own kernels are in it, and tracing widens them
    blocking:   calls that wait for the device, by name
    """

    num_graph_launches: int = 0
    num_kernels: int = 0
    device_us: float = 0.0
    idle_share: float | None = None
    gap_share: float | None = None
    blocking: dict[str, int] = field(default_factory=dict)
    num_pageable_copies: int = 0


def read(path: Path) -> list[Event]:
    """The events of a trace, compressed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def steady(events: Iterable[Event]) -> Steady:
    """Of what was launched inside the annotation STEADY. Raises `ValueError` where there is none."""
    every = [event for event in events if event.get("ph") == "X"]
    marks = [
        event for event in every if event.get("name") == STEADY and event.get("cat") == "user_annotation"
    ]
    if not marks:
        raise ValueError(f"the trace has no annotation {STEADY!r}")
    start, end = span(marks[0])
    calls = [event for event in every if event.get("cat") in RUNTIME and start <= event["ts"] < end]
    launched = {correlation(event) for event in calls} - {None}
    work = [event for event in every if event.get("cat") in ON_DEVICE and correlation(event) in launched]
    launches = defaultdict(list)
    for event in work:
        launches[correlation(event)].append(span(event))
    names = Counter(event["name"] for event in calls)
    return Steady(
        num_graph_launches=sum(names[name] for name in GRAPH_LAUNCHES),
        num_kernels=sum(event["cat"] == "kernel" for event in work),
        device_us=covered([span(event) for event in work]),
        idle_share=uncovered_share(
            [(min(a for a, _ in group), max(b for _, b in group)) for group in launches.values()]
        ),
        gap_share=uncovered_share([span(event) for event in work]),
        blocking={name: names[name] for name in BLOCKING if names[name]},
        num_pageable_copies=sum(PAGEABLE in event["name"] for event in work),
    )


def span(event: Event) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


def correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def covered(spans: Iterable[Span]) -> float:
    """The time that at least one span covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def uncovered_share(spans: list[Span]) -> float | None:
    """Of the time from the first start to the last end; None where there is no span."""
    if not spans:
        return None
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return 1 - covered(spans) / whole if whole else 0.0
