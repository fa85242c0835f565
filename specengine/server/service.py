"""The server's middle: who is admitted, whose turn is over, and what the engine is asked for.

It knows nothing of HTTP: whatever brings requests (routes, a file of them, a replica elsewhere) opens a `Visit` for
each, and reads its events or its results.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread

from specengine.engine import Engine
from specengine.outputs import GenerationResult, StreamEvent
from specengine.prompt import Prompt
from specengine.runtime.sequence import SMOOTH_STREAM_INTERVAL, Request
from specengine.server.errors import ApiError
from specengine.server.metrics import Metrics
from specengine.server.options import ServerOptions
from specengine.server.worker import Generation, Worker, merge_events

_log = logging.getLogger("specengine.server")
_MAX_RETRY_AFTER = 60
# Characters or ids of prompts that are made into requests at once: a thread costs more than to tokenise so many.
_SHORT_PROMPT = 2000
# What the thread that steps the engine is given, before an answer is begun, to schedule the request: while it computes,
# it needs no Python, and whoever writes answers has Python alone.
_HEAD_START_SECONDS = 0.002
_Value = TypeVar("_Value")


async def in_thread(
    function: Callable[[], _Value], *, limiter: anyio.CapacityLimiter | None = None
) -> _Value:
    """What takes long leaves the event loop alone; what the library refuses is the client's error (`ApiError`).

    limiter: how many of these may run at once
    """
    return await anyio.to_thread.run_sync(lambda: _refusing(function), limiter=limiter)


def _refusing(function: Callable[[], _Value]) -> _Value:
    """What the library refuses is the client's error."""
    try:
        return function()
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error)) from None


class Service:
    """An engine that serves, from before it is loaded until it is drained.

    build:     makes the engine, in the thread that steps it
    on_ready:  called when it is there
    failure:   why it could not be made
    on_failed: called then
    """

    def __init__(self, build: Callable[[], Engine], options: ServerOptions, *, model_name: str) -> None:
        self.options = options
        self.model_name = options.served_model_name or model_name
        self.metrics = Metrics(self.model_name, prefix=options.metrics_prefix)
        self.failure: BaseException | None = None
        self.on_ready: Callable[[], object] = lambda: None
        self.on_failed: Callable[[], object] = lambda: None
        self.is_draining = False
        self.created = int(time.time())
        self._engine: Engine | None = None
        self._num_admitted = 0
        self._visits: set[Visit] = set()
        self._has_left = asyncio.Event()
        self._worker = Worker(
            build,
            on_ready=self._begin,
            on_failed=self._fail,
            on_result=self.metrics.note_result,
            on_error=self.metrics.note_error,
            on_step=self.metrics.note_step,
        )

    def start(self) -> None:
        """Begins to load, on the running event loop."""
        self._worker.start()

    def stop(self, timeout: float = 5.0) -> None:
        self._worker.stop(timeout)

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and not self.is_draining

    @property
    def is_alive(self) -> bool:
        """Whether there is still somebody who steps the engine."""
        return self._worker.is_alive

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._visits

    @property
    def engine(self) -> Engine:
        """Raises `ApiError` while there is none, and none any more for those who come."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
        if self._engine is None:
            raise ApiError(503, "the model is being loaded", headers={"Retry-After": "5"})
        return self._engine

    def drain(self) -> None:
        """From here on nobody is admitted."""
        self.is_draining = True
        _log.info("shutting down: %d requests are finished first", len(self._visits))

    def abort_all(self) -> None:
        """Ends everybody's requests where they stand."""
        for visit in list(self._visits):
            visit.abort()

    def open(self, num_prompts: int, num_samples: int, *, timeout: float | None, streams: bool) -> Visit:
        """Admits so many prompts, before they are looked at.

        Raises `ApiError`: 429 while there is no room for them, 400 where there never is.
        """
        engine, count, capacity = self.engine, num_prompts * num_samples, self._capacity
        if count > capacity:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={num_samples} are {count} sequences; this server takes {capacity}",
                param="prompt",
            )
        if self._num_admitted + count > capacity:
            self.metrics.note_rejection()
            raise ApiError(
                429,
                f"{self._num_admitted} sequences run or wait, of {capacity} at most: try again later",
                headers={"Retry-After": str(self._retry_after(engine))},
            )
        seconds = min(timeout or math.inf, self.options.request_timeout)
        visit = Visit(self, engine, num_prompts, count, timeout=seconds, streams=streams)
        self._num_admitted += count
        self._visits.add(visit)
        return visit

    async def wait_for(self, num_prompts: int, num_samples: int, *, timeout: float | None) -> Visit:
        """The same for those who can wait for room, and want whole results."""
        count = num_prompts * num_samples
        while self._num_admitted + count > self._capacity >= count:
            self._has_left.clear()
            await self._has_left.wait()
        return self.open(num_prompts, num_samples, timeout=timeout, streams=False)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` for another model than the one that is served."""
        if name not in (None, self.model_name):
            raise ApiError(404, f"no model is called {name!r} here", param="model", code="model_not_found")

    @property
    def _capacity(self) -> int:
        """Sequences that run or wait."""
        return self.engine.config.max_batch_size + self.options.max_queued_requests

    def submit(self, visit: Visit, requests: list[Request]) -> None:
        self._worker.submit(visit.generation, requests)

    def leave(self, visit: Visit) -> None:
        """A visit is over: its unfinished requests end, its place is free."""
        if visit in self._visits:
            self._visits.remove(visit)
            self._num_admitted -= visit.num_sequences
            self._has_left.set()
            self._worker.abort(visit.requests)

    def abort(self, requests: list[Request]) -> None:
        self._worker.abort(requests)

    def _retry_after(self, engine: Engine) -> int:
        """Seconds until as many sequences as wait will have been begun, as requests went so far."""
        turns = 1.0 + engine.num_waiting / engine.config.max_batch_size
        return max(1, min(_MAX_RETRY_AFTER, math.ceil(turns * self.metrics.mean_latency)))

    def _begin(self, engine: Engine) -> None:
        self._engine = engine
        self.metrics.watch(engine)
        draft = f", drafted for by {engine.draft_name}" if engine.has_drafter else ""
        self.on_ready()
        _log.info("ready: %s%s, context of %d tokens", self.model_name, draft, engine.max_seq_len)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.on_failed()


class Visit:
    """One client's request, from its admission to `close`.

    requests:   what the engine was asked for, once `begin` has been called
    is_expired: its time was over before it was finished
    """

    def __init__(
        self,
        service: Service,
        engine: Engine,
        num_prompts: int,
        num_sequences: int,
        *,
        timeout: float,
        streams: bool,
    ) -> None:
        self.num_sequences = num_sequences
        self.requests: list[Request] = []
        self.is_expired = self.is_aborted = False
        self.engine = engine
        self.generation = Generation(num_prompts, keeps_events=streams)
        self._service = service
        self._began = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(timeout, self._expire)

    async def begin(self, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> None:
        """Checks and tokenises the prompts, and queues them. Raises `ApiError` for what cannot be."""

        def build() -> list[Request]:
            return self.engine.build_requests(
                list(prompts), stream_interval=SMOOTH_STREAM_INTERVAL, **sampling
            )

        is_short = sum(map(len, prompts)) <= _SHORT_PROMPT
        self.requests = _refusing(build) if is_short else await in_thread(build)
        self._service.submit(self, self.requests)
        await asyncio.sleep(_HEAD_START_SECONDS)
        if self.is_expired or self.is_aborted:
            self.abort()

    async def events(self, *, period: float = 0.0) -> list[StreamEvent]:
        """What came since the last call, one event a sample; [] at the end. Not before a multiple of `period` seconds
        from the visit's beginning, where one is given: then nothing tells when a round was over."""
        events = await self.generation.news()
        if not events:
            self._check()
        elif period:
            await asyncio.sleep(period - (time.monotonic() - self._began) % period)
            events = merge_events([*events, *self.generation.take()])
        return events

    async def results(self) -> list[GenerationResult]:
        """Waits for all of it. Raises `ApiError` for a prompt that ended with an error, or had not begun in time."""
        while await self.generation.news():
            pass
        self._check()
        return self.finished

    @property
    def finished(self) -> list[GenerationResult]:
        results = [result for result in self.generation.results if result is not None]
        assert len(results) == len(self.generation.results), "every prompt is finished"
        return results

    def abort(self) -> None:
        """Ends it where it stands; what there is of it remains to be read."""
        self.is_aborted = True
        self._service.abort(self.requests)

    def close(self) -> None:
        """Nobody wants to know more of it."""
        self._timer.cancel()
        self._service.leave(self)

    def _expire(self) -> None:
        self.is_expired = True
        self.abort()

    def _check(self) -> None:
        if self.generation.error is not None:
            raise ApiError(500, f"the request failed: {self.generation.error}", code="engine_error")
        outputs = [output for result in self.finished for output in result.outputs]
        failed = [output for output in outputs if output.finish_reason == "error"]
        if failed:
            raise ApiError(500, failed[0].error or "the request failed", code="engine_error")
        if self.is_expired and not any(output.token_ids for output in outputs):
            raise ApiError(408, "the request's time was over before it could be begun")
