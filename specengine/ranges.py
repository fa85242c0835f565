"""Names the parts of a step for whoever watches: Nsight Systems, `specengine profile`, or, as a rule, nobody.

    with ranges.span(ranges.HOST, batch_size=4, k=5) as part:
        part.note(accepted=11)

With nobody watching, every span is one shared object that does nothing. NVTX ranges, of the domain "specengine", are
made when a tool has attached itself (it sets NVTX_INJECTION64_PATH); the environment variable SPECENGINE_NVTX=1 makes
them always, 0 never. They need the package nvtx.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np

DOMAIN = "specengine"
DRAFT, VERIFY, COMMIT, HOST = "step/draft", "step/verify", "step/commit", "step/host"
PARTS = (DRAFT, VERIFY, COMMIT, HOST)


class Sink(Protocol):
    """Is told of every span, on the thread that runs it. Spans of one thread are left in reverse order.

    takes_times: whether it will do with what parts took, once they are over (`add`); while somebody wants to see them
                 as they happen, rounds run part by part
    """

    takes_times: bool

    def enter(self, name: str, payload: Mapping[str, int]) -> None:
        """A span begins. payload: what is known of it by then."""

    def note(self, name: str, payload: Mapping[str, int]) -> None:
        """What the span has found out since."""

    def leave(self, name: str) -> None:
        """A span ends, by an exception too."""


class TimesSink(Sink, Protocol):
    """A sink that takes times."""

    def add(self, name: str, seconds: float) -> None:
        """A part is over, within the span that is open."""


class Span:
    """A part of a step, for a `with` statement. This one is watched by nobody."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def note(self, **payload: int) -> None:
        """Adds what was not known when the span began."""


class _WatchedSpan(Span):
    __slots__ = ("_name", "_payload", "_sinks")

    def __init__(self, name: str, payload: Mapping[str, int], sinks: tuple[Sink, ...]) -> None:
        self._name = name
        self._payload = payload
        self._sinks = sinks

    def __enter__(self) -> Span:
        for sink in self._sinks:
            sink.enter(self._name, self._payload)
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in reversed(self._sinks):
            sink.leave(self._name)

    def note(self, **payload: int) -> None:
        for sink in self._sinks:
            sink.note(self._name, payload)


def span(name: str, **payload: int) -> Span:
    """The span `name`. payload: batch_size, k, …"""
    return _WatchedSpan(name, payload, _sinks) if _sinks else _UNWATCHED


def wants_spans() -> bool:
    """Whether somebody has to see parts as they happen."""
    return any(not sink.takes_times for sink in _sinks)


def tell(parts: tuple[float, float, float]) -> None:
    """What drafts, verification and commit of a round took, in seconds, that ran in one call just now."""
    for sink in _sinks:
        for name, seconds in zip(PARTS, parts, strict=False):
            cast(TimesSink, sink).add(name, seconds)


@contextmanager
def record(sink: Sink) -> Iterator[None]:
    """Every span that begins in the block is told to `sink`."""
    global _sinks
    _sinks = (*_sinks, sink)
    try:
        yield
    finally:
        _sinks = tuple(each for each in _sinks if each is not sink)


class NvtxSink:
    """Spans as NVTX ranges. domain: of the package nvtx; its dummy, if no tool listens, will do.

    A range's payload is fixed when it begins: what is noted later becomes a mark inside it.
    """

    takes_times = False

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def enter(self, name: str, payload: Mapping[str, int]) -> None:
        fields = np.array(tuple(payload.values()), dtype=[(field, np.int64) for field in payload])
        self._domain.push_range(message=name, payload=fields if payload else None)

    def note(self, name: str, payload: Mapping[str, int]) -> None:
        for field, value in payload.items():
            self._domain.mark(message=field, payload=value)

    def leave(self, name: str) -> None:
        self._domain.pop_range()


def nvtx_sinks(environment: Mapping[str, str]) -> tuple[Sink, ...]:
    """An `NvtxSink` where ranges are wanted, else nothing. Warns where they are but the package nvtx is missing."""
    wanted = environment.get("SPECENGINE_NVTX", "auto")
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"SPECENGINE_NVTX={wanted!r}: expected auto, 0 or 1")
    if wanted == "0" or (wanted == "auto" and not environment.get("NVTX_INJECTION64_PATH")):
        return ()
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError as error:
        warnings.warn(
            f"a profiler that reads NVTX is attached, but gets no ranges: {error}; try: pip install nvtx",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()
    return (NvtxSink(nvtx.get_domain(DOMAIN)),)


_UNWATCHED = Span()
_sinks = nvtx_sinks(os.environ)
