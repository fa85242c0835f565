"""What stands before the routes: the key, limits on headers and bodies, one line of the log for each request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Collection
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specengine.server.errors import ApiError
from specengine.server.options import ServerOptions

_log = logging.getLogger("specengine.server")
MAX_NUM_HEADERS = 100
# Seconds that a client has to send its body.
MAX_BODY_SECONDS = 30.0
# How many times what a body may have is read before the connection is closed.
_PATIENCE = 4
# These say nothing that is anybody's, and those who watch over a server have no key.
OPEN_PATHS = ("/health", "/ready")


class Gate:
    """ASGI middleware. A body is read to its end here: whoever is let through has sent all of it.

    open_paths: of the routes that need no key
    """

    def __init__(
        self, app: ASGIApp, options: ServerOptions, *, open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._max_body_bytes = options.max_body_bytes
        self._credentials = None if options.api_key is None else f"Bearer {options.api_key}".encode()
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(receive)
            await self._app(scope, _replayed(body, receive), send_noting_status)
        except ApiError as error:
            # What is still on its way is not waited for.
            headers = {**(error.headers or {}), "Connection": "close"}
            answer = JSONResponse(error.body, error.status, headers=headers)
            await answer(scope, receive, send_noting_status)
        finally:
            milliseconds = (time.monotonic() - began) * 1e3
            _log.info("%s %s %d %.0f ms", scope["method"], quote(scope["path"]), status, milliseconds)

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(headers) > MAX_NUM_HEADERS:
            raise ApiError(431, f"a request may have {MAX_NUM_HEADERS} headers, this one has {len(headers)}")
        found = dict(headers)
        if self._credentials is not None and scope["path"] not in self._open_paths:
            given = found.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._credentials):
                raise ApiError(
                    401,
                    "this server wants its API key as a bearer token",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if found.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "bodies are read as they are: leave Content-Encoding out")

    async def _read(self, receive: Receive) -> bytes:
        """Who sends too much is heard out for a while, and none of it kept: else it would not read the answer."""
        body, size, deadline = bytearray(), 0, time.monotonic() + MAX_BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except (asyncio.TimeoutError, TimeoutError):
                raise ApiError(408, f"the body was not there after {MAX_BODY_SECONDS:g} seconds") from None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= self._max_body_bytes:
                body += piece
            if not message.get("more_body", False) or size > _PATIENCE * self._max_body_bytes:
                break
        if size > self._max_body_bytes:
            raise ApiError(413, f"a body may have {self._max_body_bytes} bytes")
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message; then whatever comes."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def receive_again() -> Message:
        nonlocal message
        first, message = message, None
        return await receive() if first is None else first

    return receive_again
