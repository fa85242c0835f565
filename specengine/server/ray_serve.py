"""The same server on a Ray cluster: one process takes requests as ever, and replicas elsewhere answer them.

What listens is this process with its limits, its key and its log. It hands on what the routes of a server would be
asked: Ray Serve keeps the replicas, looks after their health, and chooses which one is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Response
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.types import Message, Receive, Scope, Send

from specengine.call import prepare_engine
from specengine.errors import SpecEngineError
from specengine.server.app import add_error_handlers, build_app
from specengine.server.build import build_service, load, name_of_model
from specengine.server.errors import ApiError
from specengine.server.metrics import CONTENT_TYPE
from specengine.server.middleware import OPEN_PATHS, Gate
from specengine.server.options import ServerOptions
from specengine.server.page import PATHS, add_page
from specengine.server.ray_cluster import Share, share_cluster

_log = logging.getLogger("specengine.server")
APPLICATION = "specengine"
# Requests whose prompts have so many characters in common go to one replica, whose prefix cache has them.
_NUM_PREFIX_CHARACTERS = 256
# Room for those that ask for no generation: health, metrics, an end.
_NUM_SPARE_REQUESTS = 16
# How often an answer that has not begun is asked for when a replica dies over it.
_NUM_TRIES = 2
_METRICS_SECONDS = 5.0
_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("headers", "client", "server"),
)


class Replica:
    """A server without a socket: it is called with what one would have read from it."""

    async def __init__(self, options: Mapping[str, Any], server_options: ServerOptions) -> None:  # type: ignore[misc]
        self._service = build_service(options, server_options)
        self._app = build_app(self._service)
        await load(self._service)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages that the application sends. Who does not want the rest cancels."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            await asyncio.Event().wait()
            raise AssertionError("it never comes")

        answering = asyncio.create_task(self._app(scope, receive, messages.put))
        answering.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await answering
        finally:
            answering.cancel()

    async def metrics(self) -> tuple[str, bytes]:
        """Its name, and what it has counted, in Prometheus' text format."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text()

    async def abort_all(self) -> None:
        self._service.abort_all()

    async def check_health(self) -> None:
        """Raises where nobody will be answered any more: Ray Serve then begins another."""
        if not self._service.is_alive:
            raise RuntimeError("the engine's thread has ended")


class PrefixRouter(ConsistentHashRouter):  # type: ignore[misc]
    """By consistent hashing of a session, which stands for a prompt's beginning: those that begin alike go to one
    replica while it can run them at once, else to the next that can, else to where the fewest wait.
    """

    def initialize_state(self, *, max_running: int, **others: Any) -> None:
        """max_running: requests that a replica can run at once"""
        super().initialize_state(**others)
        self._max_running = max_running

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """One rank for each replica, the one to ask first before the others."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)

        def num_waiting(rank: list[Any]) -> int:
            num_asked = self.replica_queue_len_cache.get(rank[0].replica_id) or 0
            return max(0, num_asked - self._max_running + 1)

        return sorted(ranks, key=num_waiting)


class Replicas:
    """What `Service` is to a server's process, of replicas that are elsewhere."""

    def __init__(
        self, options: Mapping[str, Any], server_options: ServerOptions, *, num_replicas: int | None
    ) -> None:
        self.options = server_options
        self.failure: BaseException | None = None
        self.on_failed: Callable[[], object] = lambda: None
        self.is_draining = False
        self._config = prepare_engine(options).config
        self._engine_options = options
        self._num_replicas = num_replicas
        self._handle: Any = None
        self._num_asked = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_ready(self) -> bool:
        return self._handle is not None and not self.is_draining

    @property
    def is_idle(self) -> bool:
        return self._num_asked == 0

    def drain(self) -> None:
        self.is_draining = True
        _log.info("shutting down: %d requests are finished first", self._num_asked)

    def abort_all(self) -> None:
        if self._handle is not None:
            self._keep(self._handle.broadcast("abort_all").results_async(return_exceptions=True))

    def _keep(self, awaitable: Any) -> None:
        task = asyncio.ensure_future(awaitable)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- replicas ---------------------------------------------------------------------------------------------

    def _start(self) -> tuple[Any, Share]:
        """Waits until all are ready; those that cannot be begun are an error."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        share = share_cluster(self._num_replicas, on_gpu=str(self._config.device) != "cpu")
        max_running = self._config.max_batch_size
        deployment = serve.deployment(
            name="engine",
            num_replicas=share.num_engines,
            ray_actor_options=share.resources,
            # Who is admitted is for the replica's service to say.
            max_ongoing_requests=max_running + self.options.max_queued_requests + _NUM_SPARE_REQUESTS,
            graceful_shutdown_timeout_s=self.options.shutdown_timeout,
            max_constructor_retry_count=1,
            request_router_config=RequestRouterConfig(
                request_router_class=f"{__name__}.{PrefixRouter.__name__}",
                request_router_kwargs={
                    "max_running": max_running,
                    "num_fallback_replicas": share.num_engines - 1,
                },
            ),
        )(Replica)
        serve.start(proxy_location="Disabled")
        application = deployment.bind(self._engine_options, self.options)
        return serve.run(application, name=APPLICATION, route_prefix=None), share

    async def start(self) -> None:
        try:
            handle, share = await anyio.to_thread.run_sync(self._start)
        except (RayError, RayServeException, RuntimeError) as error:
            self.failure = SpecEngineError(f"Ray: {await anyio.to_thread.run_sync(_why, error)}")
        except SpecEngineError as error:
            self.failure = error
        else:
            self._handle = handle
            name = self.options.served_model_name or name_of_model(self._engine_options)
            _log.info("ready: %s, %d replicas of %s", name, share.num_engines, share.resources)
            return
        self.on_failed()

    async def stop(self) -> None:
        """Ends them when they have answered, at the latest after `shutdown_timeout`."""
        self._handle = None
        with suppress(RayError, RayServeException):
            await anyio.to_thread.run_sync(serve.delete, APPLICATION)

    # -- requests ---------------------------------------------------------------------------------------------

    async def ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: a replica's answer. Raises `ApiError` where none has begun to answer."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
        if self._handle is None:
            raise ApiError(503, "the model is being loaded", headers={"Retry-After": "5"})
        body = (await receive())["body"]
        kept = {name: scope[name] for name in _SCOPE if name in scope}
        self._num_asked += 1
        try:
            await self._ask(kept, body, receive, send)
        finally:
            self._num_asked -= 1

    async def _ask(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        handle = self._handle.options(method_name="answer", stream=True, session_id=affinity(body))
        deadline = time.monotonic() + self.options.request_timeout
        for num_left in reversed(range(_NUM_TRIES)):
            messages = handle.remote(scope, body)
            leaving = asyncio.create_task(_cancel_when_left(receive, messages))
            # What has begun has the replica's own clock.
            late = asyncio.get_running_loop().call_later(deadline - time.monotonic(), messages.cancel)
            began: Message | None = None
            try:
                async for message in messages:
                    late.cancel()
                    began = began or message
                    await send(message)
                return
            except (RayError, RayServeException) as error:
                if leaving.done():  # nobody wants to know
                    return
                if began is None and time.monotonic() >= deadline:
                    raise ApiError(408, "the request's time was over before it could be begun") from None
                _log.warning("a replica failed: %s", type(error).__name__)
                if began is not None:
                    await _end(began, send)
                    return
                if not num_left:
                    raise ApiError(500, "the replicas that were asked failed") from None
            finally:
                late.cancel()
                leaving.cancel()
                messages.cancel()

    async def metrics(self) -> bytes:
        """Of every replica that answers, each sample labelled with its name."""
        if self._handle is None:
            return b""
        try:
            heard = await self._handle.broadcast("metrics").results_async(
                timeout_s=_METRICS_SECONDS, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            raise ApiError(503, "no replica answers in time", headers={"Retry-After": "5"}) from None
        return merge_metrics(each for each in heard if not isinstance(each, BaseException))


def affinity(body: bytes) -> str:
    """The same for requests whose prompts begin alike; what is no request goes anywhere."""
    try:
        request = json.loads(body)
        prompt = request.get("messages") or request.get("prompt")
    except (ValueError, RecursionError, AttributeError):
        return ""
    text = json.dumps(prompt)[:_NUM_PREFIX_CHARACTERS]
    return hashlib.sha256(text.encode()).hexdigest()


async def _cancel_when_left(receive: Receive, messages: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    messages.cancel()


async def _end(began: Message, send: Send) -> None:
    """An answer whose replica is gone: a stream is told so, anything else is cut off."""
    is_stream = any(value.startswith(b"text/event-stream") for _, value in began.get("headers", []))
    if not is_stream:
        raise ApiError(500, "the replica failed")
    error = json.dumps(ApiError(500, "the replica failed").body, separators=(",", ":"))
    last = f"data: {error}\n\ndata: [DONE]\n\n".encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})


class _Families:
    """What `generate_latest` reads."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def add(self, replica: str, text: bytes) -> None:
        for family in text_string_to_metric_families(text.decode()):
            kept = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            kept.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def merge_metrics(texts: Iterable[tuple[str, bytes]]) -> bytes:
    """One text of several replicas': the same families, every sample with a label `replica`."""
    families = _Families()
    for replica, text in texts:
        families.add(replica, text)
    return generate_latest(families)


def _why(error: BaseException) -> str:
    """What Ray Serve says of a deployment that cannot be begun: the error in the replica, where there is one."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    texts = [line.strip() for each in deployments for line in each.message.splitlines() if line.strip()]
    named = [line for line in texts if "Error: " in line]
    return str((named or texts or [error])[-1])


def build_front(replicas: Replicas) -> FastAPI:
    """The application in front of replicas: what is the process's own, and the rest asked of one of them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(replicas.start())
        try:
            yield
        finally:
            await starting  # what is being begun must be there to be ended
            await replicas.stop()

    app = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Gate, options=replicas.options, open_paths=(*OPEN_PATHS, *PATHS))
    add_error_handlers(app)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        return Response(status_code=200 if replicas.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await replicas.metrics(), media_type=CONTENT_TYPE)

    add_page(app)
    app.mount("/", replicas.ask)
    return app
