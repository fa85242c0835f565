"""`specengine serve` as a process: how it starts, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from running_server import events_of, read_all, request_bytes, wait_until
from typer.testing import CliRunner

from specengine.cli import app

PATIENCE_SECONDS = 120.0
LONG = {"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "temperature": 0, "stream": True}


class Process:
    """log: what it has said so far"""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.log = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specengine", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line

    def ready(self) -> Process:
        wait_until(lambda: " ready: " in self.log or self._process.poll() is not None, PATIENCE_SECONDS)
        assert self._process.poll() is None, self.log
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)$", self.log, re.MULTILINE)
        assert found, self.log
        return int(found[1])

    def signal(self, number: int = signal.SIGTERM) -> float:
        """When it was sent."""
        self._process.send_signal(number)
        return time.monotonic()

    def wait(self) -> int:
        code = self._process.wait(PATIENCE_SECONDS)
        self._reading.join(PATIENCE_SECONDS)
        assert self._process.stdout is not None
        assert self._process.stdout.read() == ""
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def connect(self, body: Any) -> socket.socket:
        """A connection on which an answer has begun."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)
        connection.sendall(request_bytes("/v1/completions", body))
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        return connection

    def status(self, path: str, body: Any = None) -> int:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def launch(chat_model: Path) -> Iterator[Callable[..., Process]]:
    """launch(*arguments): the tiny model, served by a process that is gone after the test."""
    started: list[Process] = []

    def begin(*arguments: str, model: Path | str = chat_model, **options: Any) -> Process:
        process = Process("--model", str(model), "--dtype", "float32", *arguments, **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_before_the_end(launch: Callable[..., Process], number: int) -> None:
    """R5: new ones are refused at once, and the exit code is 0."""
    process = launch("--draft-model", "suffix").ready()
    with process.connect(LONG) as connection:
        process.signal(number)
        wait_until(lambda: "shutting down: 1 requests" in process.log)
        assert process.status("/v1/completions", {"prompt": "x"}) == 503
        assert (process.status("/ready"), process.status("/health")) == (503, 200)
        content = read_all(connection)
    assert content.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    assert b'"finish_reason":"length"' in content
    assert process.wait() == 0
    assert "Traceback" not in process.log


def test_a_second_signal_ends_them_where_they_stand(launch: Callable[..., Process]) -> None:
    process = launch("--max-num-seqs", "2").ready()
    with process.connect({**LONG, "n": 16}) as connection:
        process.signal()
        wait_until(lambda: "shutting down" in process.log)
        sent = process.signal()
        read_all(connection)
        assert time.monotonic() - sent < 4.0
    assert process.wait() == 130
    assert time.monotonic() - sent < 20.0  # on a machine that has other things to do
    assert "Traceback" not in process.log


def test_time_to_finish_is_limited(launch: Callable[..., Process]) -> None:
    process = launch("--max-num-seqs", "2", "--shutdown-timeout", "0.2").ready()
    with process.connect({**LONG, "n": 16}) as connection:
        sent = process.signal()
        content = read_all(connection)
    assert process.wait() == 0
    assert time.monotonic() - sent < 8.0
    assert b'"finish_reason":"abort"' in content
    assert b"[DONE]" in content


def test_vllms_names_of_options_and_the_key_from_the_environment(launch: Callable[..., Process]) -> None:
    process = launch(
        *("--served-model-name", "mine", "--max-num-seqs", "3", "--max-model-len", "64"),
        environment={"SPECENGINE_API_KEY": "secret"},
    ).ready()
    assert "secret" not in process.log
    assert process.status("/v1/models") == 401
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{process.port}/v1", api_key="secret", max_retries=0)
    (model,) = client.models.list()
    assert model.id == "mine"
    assert model.model_dump()["max_model_len"] == 64
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(client.completions.create, model="mine", prompt="x", max_tokens=5, seed=1)
            for _ in range(5)
        ]
        assert len({each.result().choices[0].text for each in asked}) == 1
    process.signal()
    assert process.wait() == 0


def test_one_socket_listens_and_on_loopback(launch: Callable[..., Process]) -> None:
    process = launch().ready()
    inodes = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        inodes |= {found[1]} if found else set()
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or table.startswith("udp")):
                listening.append(fields[1])
    assert listening == [f"0100007F:{process.port:04X}"]


def test_a_port_that_is_taken_is_told(launch: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = launch("--port", str(taken.getsockname()[1]))
        assert process.wait() == 1
    assert "Traceback" not in process.log
    assert "Address already in use" in process.log


def test_a_model_that_is_none_is_told_in_a_line(launch: Callable[..., Process], tmp_path: Path) -> None:
    process = launch(model=tmp_path)
    assert process.wait() == 1
    assert "Traceback" not in process.log
    assert process.log.splitlines()[-1].startswith("specengine: ")
    assert "config.json" in process.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port must be between 0 and 65535, got 70000"),
        (["--port", "http"], "'http' is not an integer"),
        (["--max-num-seqs", "0"], "max_batch_size must be between 1 and 4096, got 0"),
        (["--stream-period", "nan"], "stream_period must be finite"),
        (["--request-timeout", "0"], "request_timeout must be above 0"),
        (["--temperature", "1"], "No such option"),
        (["--model", ""], "model must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_listens(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_its_packages_it_says_which_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from specengine.cli import main; main(['serve', '--port', '0'])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 1
    assert output.stderr == "specengine: serving needs uvicorn: pip install 'specengine[serve]'\n"


def test_events_of_a_process_are_events(launch: Callable[..., Process]) -> None:
    """As curl sees them."""
    process = launch().ready()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{process.port}/v1/chat/completions",
        json.dumps(
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *chunks, done = events_of(answer.read())
    assert done == "[DONE]"
    assert chunks[0]["object"] == "chat.completion.chunk"
