"""One thread that builds an engine and steps it; asyncio beside it.

The event loop never waits for the engine: it puts commands in a queue, which the thread works through between steps,
and hears of what became of requests by callbacks. Nothing else touches the engine's queues.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from specengine.engine import Engine
from specengine.outputs import GenerationResult, StreamEvent
from specengine.runtime.sequence import Request

_log = logging.getLogger("specengine.server")
# Steps that fail in a row before a request is ended of which nobody knows that it is to blame: what passes by itself
# costs nobody an answer.
_NUM_TRIES = 2
_Command = Callable[[Engine], object]


class Generation:
    """What became of the prompts of one client, as far as it has not been told.

    results: by place, those that are finished
    error:   why the engine gave them up
    """

    def __init__(self, num_prompts: int, *, keeps_events: bool) -> None:
        self.results: list[GenerationResult | None] = [None] * num_prompts
        self.error: Exception | None = None
        self._num_left = num_prompts
        self._keeps_events = keeps_events
        self._events: list[StreamEvent] = []
        self._has_news = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        return self._num_left == 0

    def note(self, event: StreamEvent) -> None:
        """More of it is there. Its index is the prompt's place."""
        if self._keeps_events:
            self._events.append(event)
        if event.result is not None:
            self.results[event.index] = event.result
            self._num_left -= 1
        if self._keeps_events or self.is_finished:
            self._has_news.set()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self._has_news.set()

    async def news(self) -> list[StreamEvent]:
        """Waits for events, and takes them: one a sample, however many came meanwhile. [] when nothing more comes.

        A slow reader holds no more than its own tokens.
        """
        while not self._events:
            if self.is_finished or self.error is not None:
                return []
            await self._has_news.wait()
            self._has_news.clear()
        return merge_events(self.take())

    def take(self) -> list[StreamEvent]:
        """What there is, without waiting."""
        events, self._events = self._events, []
        return events


def merge_events(events: Iterable[StreamEvent]) -> list[StreamEvent]:
    """One event a sample, in the order in which samples first occur."""
    by_sample: dict[tuple[int, int], list[StreamEvent]] = {}
    for event in events:
        by_sample.setdefault((event.index, event.output_index), []).append(event)
    return [each[0] if len(each) == 1 else _join(each) for each in by_sample.values()]


def _join(events: list[StreamEvent]) -> StreamEvent:
    def concatenated(name: str) -> Any:
        lists = [getattr(event, name) for event in events]
        return None if lists[0] is None else [item for each in lists for item in each]

    names = ("token_ids", "token_source", "logprobs", "rounds")
    text = "".join(event.text_delta for event in events)
    lists = {name: concatenated(name) for name in names}
    return replace(events[-1], text_delta=text, elapsed=events[0].elapsed, **lists)


class Worker:
    """The thread, and who waits for it. All methods but the thread's own are for the event loop.

    build:     makes the engine
    on_ready:  called with it
    on_failed: called where it could not be made
    on_result: called with every result, whether anybody still waits for it or not
    on_error:  called with every request that was given up for an error
    on_step:   called after steps, with the engine
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        *,
        on_ready: Callable[[Engine], object],
        on_failed: Callable[[BaseException], object],
        on_result: Callable[[GenerationResult], object],
        on_error: Callable[[Request], object],
        on_step: Callable[[Engine], object],
    ) -> None:
        self._build = build
        self._on_ready, self._on_failed = on_ready, on_failed
        self._on_result, self._on_error, self._on_step = on_result, on_error, on_step
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        # By request id: who waits for it, and its place there. The event loop's.
        self._waiting: dict[int, tuple[Generation, int]] = {}
        # By request id, in the order in which they came. The thread's.
        self._requests: dict[int, Request] = {}
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name="specengine-steps", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ends the thread, and with it what is unfinished; waits at most `timeout` seconds for a step to end."""
        self._commands.put(None)
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def submit(self, generation: Generation, requests: list[Request]) -> None:
        """Queues the requests, one for each of the generation's places."""
        for place, request in enumerate(requests):
            self._waiting[request.request_id] = generation, place

        def add(engine: Engine) -> None:
            for request in requests:
                self._requests[request.request_id] = request
                engine.add_request(request)

        self._commands.put(add)

    def abort(self, requests: Iterable[Request]) -> None:
        """Ends what is unfinished of these: their results come as of any other."""
        ids = [request.request_id for request in requests if request.request_id in self._waiting]

        def abort(engine: Engine) -> None:
            for request_id in ids:
                engine.abort(request_id)

        if ids:
            self._commands.put(abort)

    # -- the thread's own -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:  # whatever it is, it is the main thread's to tell
            self._tell(self._on_failed, error)
            return
        self._tell(self._on_ready, engine)
        with engine:
            while self._obey(engine):
                if engine.has_work:
                    self._step(engine)

    def _obey(self, engine: Engine) -> bool:
        """Works through the queue, and waits for it where there is nothing else to do. False at the end."""
        while not (self._commands.empty() and engine.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        return True

    def _step(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except Exception as error:  # of whatever a request brought with it; the engine is as it was before
            self._num_failures += 1
            _log.exception("a step failed (%d in a row)", self._num_failures)
            self._give_up(engine, error)
            return
        self._num_failures = 0
        for event in events:
            if event.result is not None:
                self._requests.pop(event.index, None)
        self._tell(self._deliver, engine, events)

    def _give_up(self, engine: Engine, error: Exception) -> None:
        """Ends the request that an error names; where it names none and is there again, the one that came last."""
        blamed = self._requests.get(getattr(error, "request_id", -1))
        if blamed is None and self._num_failures >= _NUM_TRIES:
            blamed = next(reversed(self._requests.values()), None)
        if blamed is not None:
            self._tell(self._fail, blamed, error)
            engine.abort(blamed.request_id)

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None, "it was started"
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            _log.debug("nobody heard of a step")

    # -- the event loop's -------------------------------------------------------------------------------------

    def _deliver(self, engine: Engine, events: list[StreamEvent]) -> None:
        for event in events:
            generation, place = self._waiting[event.index]
            if event.result is not None:
                del self._waiting[event.index]
                self._on_result(event.result)
            generation.note(replace(event, index=place))
        self._on_step(engine)

    def _fail(self, request: Request, error: Exception) -> None:
        waiting = self._waiting.get(request.request_id)
        if waiting is not None:
            self._on_error(request)
            waiting[0].fail(error)
