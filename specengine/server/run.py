"""The process: uvicorn with limits of its own, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from specengine.server.app import build_app
from specengine.server.options import ServerOptions
from specengine.server.service import Service

_log = logging.getLogger("specengine.server")
# Seconds that a connection has to say what it wants, and those that it may then be silent between two requests.
MAX_HEADER_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 5
_MAX_HEADER_BYTES = 64 << 10
_MAX_CONNECTIONS = 4096
_BACKLOG = 2048
# Connections and tasks that are left when all requests are finished, or were ended.
_CLOSING_SECONDS = 2
_NUM_OWN_FILES = 64


class TimedProtocol(H11Protocol):
    """uvicorn's, with a limit on how long headers may take. (A body's is `Gate`'s.)"""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_headers()
        elif self._headers_timer is None:
            self._watch_headers()

    def _watch_headers(self) -> None:
        self._headers_timer = self.loop.call_later(MAX_HEADER_SECONDS, self._close_late)

    def _forget_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _close_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Serving(Protocol):
    """What a process asks of whatever answers its requests, here (`Service`) or elsewhere."""

    options: ServerOptions
    failure: BaseException | None
    on_failed: Callable[[], object]
    is_draining: bool

    @property
    def is_idle(self) -> bool: ...

    def drain(self) -> None: ...

    def abort_all(self) -> None: ...


class Server(uvicorn.Server):
    """Takes no more requests from the first signal on, and ends when those it has are finished; at the second signal
    they are ended where they stand.

    was_forced: whether there was a second
    """

    def __init__(self, config: uvicorn.Config, service: Serving) -> None:
        super().__init__(config)
        self.was_forced = False
        self._service = service
        self._deadline = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                shown = f"[{host}]" if ":" in host else host
                _log.info("listening on http://%s:%d", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self._service
        if not service.is_draining:
            self._deadline = time.monotonic() + service.options.shutdown_timeout
            service.drain()
            return
        self.was_forced = self.should_exit = True
        if self._loop is not None:  # it may be in the middle of anything
            self._loop.call_soon_threadsafe(service.abort_all)

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.is_draining:
            is_late = time.monotonic() >= self._deadline
            self.should_exit = self.should_exit or service.is_idle or is_late
            if is_late:
                service.abort_all()
        return await super().on_tick(counter)


def build_server(service: Serving, app: ASGIApp | None = None) -> Server:
    """uvicorn with what its defaults leave open. `app`: by default that of a `Service`"""
    if app is None:
        assert isinstance(service, Service), "who is elsewhere has an application of its own"
        app = build_app(service)
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        loop="asyncio",  # uvloop would come and go with what else is installed
        lifespan="on",
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=min(_MAX_CONNECTIONS, _raise_file_limit() - _NUM_OWN_FILES),
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )
    logging.getLogger("uvicorn.access").disabled = True  # its lines are `Gate`'s
    server = Server(config, service)

    def give_up() -> None:
        server.should_exit = True

    service.on_failed = give_up
    return server


def listen(options: ServerOptions) -> socket.socket:
    """Raises `OSError` that names the address where it cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"{options.host}:{options.port}: {error.strerror}") from None


def serve(service: Serving, app: ASGIApp | None = None) -> bool:
    """Serves until a signal ends it, or the model cannot be loaded. Returns whether a second signal cut it short."""
    server = build_server(service, app)
    server.run(sockets=[listen(service.options)])
    if service.failure is not None:
        raise service.failure
    return server.was_forced


def configure_logging() -> None:
    """One line for each event, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("specengine.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _raise_file_limit() -> int:
    """As many files as the system allows this process without asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_CONNECTIONS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
