"""A server on a real socket, in a thread of the test's own process: what its engine holds can be looked at.

with Running(model, draft) as server:
    server.client().completions.create(model=server.model, prompt="x")
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai

from specengine.engine import Engine
from specengine.server.build import freeze_heap
from specengine.server.options import ServerOptions
from specengine.server.run import Server, build_server, listen
from specengine.server.service import Service

PATIENCE_SECONDS = 30.0


class Running:
    """A server of a model, with fields of `ServerOptions` and `EngineConfig`.

    build:        makes the engine, where that is another than these models'
    step_seconds: what each step takes longer
    """

    def __init__(
        self,
        model: Any,
        draft_model: Any = None,
        *,
        build: Callable[[], Engine] | None = None,
        server_options: dict[str, Any] | None = None,
        step_seconds: float = 0.0,
        **config: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "block_size": 4,
            "max_batch_size": 8,
            "num_threads": 1,
        }
        options = ServerOptions(**{"port": 0, "served_model_name": "tiny", **(server_options or {})})
        make = build or (lambda: Engine(model, draft_model, **{**defaults, **config}))
        self.model = options.served_model_name or ""
        self.api_key = options.api_key
        self.service = Service(lambda: slowed(make(), step_seconds), options, model_name="tiny")
        self.service.on_ready = freeze_heap
        self.server: Server = build_server(self.service)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.serve(sockets=[listen(self.service.options)]))
        self.loop.close()

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive())
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the server did not end"
        gc.unfreeze()

    def ready(self) -> Running:
        wait_until(lambda: self.service.is_ready)
        self.free_blocks = self.engine.num_free_blocks
        return self

    @property
    def engine(self) -> Engine:
        engine = self.service._engine
        assert engine is not None
        return engine

    @property
    def port(self) -> int:
        sockets = self.server.servers[0].sockets
        return int(sockets[0].getsockname()[1])

    def client(self, **options: Any) -> openai.OpenAI:
        key = options.pop("api_key", self.api_key or "none")
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60.0, **options
        )

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        raw: bytes | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer. `body` is sent as JSON, `raw` as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            content = raw if raw is not None else None if body is None else json.dumps(body).encode()
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body=content, headers=given)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        status, _, content = self.ask("POST", path, body, headers)
        return status, json.loads(content) if content else None

    def complete(self, **body: Any) -> dict[str, Any]:
        """The body of a completion that succeeds."""
        status, answer = self.post("/v1/completions", {"prompt": "x", **body})
        assert status == 200, answer
        return dict(answer)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.ask("GET", "/metrics", headers=self.bearer)[2].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"specengine:{name}{{"))

    @property
    def bearer(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def check_alive(self) -> None:
        """The next request is answered as if nothing had been."""
        assert self.post("/v1/completions", {"prompt": "ab", "max_tokens": 2}, self.bearer)[0] == 200

    def check_clean(self) -> None:
        """Nobody's blocks are left, and nobody is waited for."""
        wait_until(lambda: self.service.is_idle and not self.engine.has_work)
        assert self.engine.num_free_blocks == self.free_blocks

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS) as connection:
            yield connection

    def send(self, content: bytes) -> bytes:
        """What comes back for these bytes, to the connection's end."""
        with self.connected() as connection:
            with suppress(OSError):  # the server has heard enough
                connection.sendall(content)
            return read_all(connection)


def slowed(engine: Engine, seconds: float) -> Engine:
    """The same, each of whose steps takes so much longer."""
    step = engine.step

    def step_slowly() -> Any:
        time.sleep(seconds)
        return step()

    if seconds:
        engine.step = step_slowly  # type: ignore[method-assign]
    return engine


def request_bytes(path: str, body: Any, *, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def resident_bytes() -> int:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def read_all(connection: socket.socket) -> bytes:
    pieces = []
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)


def events_of(content: bytes) -> list[Any]:
    """The events of a stream, its [DONE] included."""
    data = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in data]
