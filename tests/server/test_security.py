"""What strangers may send: whatever it is, the next request is answered, memory stays, and the event loop goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chat_templates import save_chat_model
from running_server import Running, events_of, resident_bytes

from specengine.engine import Engine

MEGABYTE = 1 << 20
KEY = "sk-läbel-é"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Watch:
    """How long the event loop did not come round, at most, in seconds.

    worked: of its own thread's time, which other processes do not lengthen
    passed: on the clock, which tells if it waited for something
    """

    def __init__(self, server: Running) -> None:
        self.worked = self.passed = 0.0
        self._server = server
        self._is_over = False

    async def _watch(self) -> None:
        while not self._is_over:
            began, began_work = time.monotonic(), time.thread_time()
            await asyncio.sleep(0.005)
            self.worked = max(self.worked, time.thread_time() - began_work)
            self.passed = max(self.passed, time.monotonic() - began)

    def __enter__(self) -> Watch:
        asyncio.run_coroutine_threadsafe(self._watch(), self._server.loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True


@pytest.fixture(autouse=True)
def unharmed(server: Running) -> Iterator[None]:
    before = resident_bytes()
    with Watch(server) as watch:
        yield
    assert resident_bytes() - before < 50 * MEGABYTE
    # 0.25 s is what may be; a slow processor whose caches others use takes up to twice as long for the same.
    assert watch.worked < 0.5
    assert watch.passed < 2.0
    server.check_alive()
    server.check_clean()


def refused(server: Running, body: Any, path: str = COMPLETIONS) -> dict[str, Any]:
    """The error of a request that is the client's own fault."""
    status, answer = server.post(path, body)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert len(answer["error"]["message"]) < 500
    return dict(answer["error"])


# Values


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("n", [10**6, 2**63, -1, 0, 1.5, "2", True, [1]]),
        ("best_of", [10**6, 2**63, -1, 0]),
        ("prompt", ["", [], [[]], None, 5, {}, [-1], [370], [2**31], [2**63], [1.5], [True], ["a", [[1]]], [None]]),
        ("max_tokens", [10**12, -1, 0, 1.5, "5", True, 2**63]),
        ("logprobs", [320, 10**9, -2, 21, True, "1"]),
        ("prompt_logprobs", [10**9, -1]),
        ("num_speculative_tokens", [-1, 10**6, 65, "many", 1.5]),
        ("min_tokens", [-1, 10**12, 17]),
        ("top_k", [-2, 2**31, 1.5]),
        ("seed", [-1, 2**64, 1.5, "1"]),
        ("stop", ["", ["a"] * 5, ["a"] * 10_000, "a" * MEGABYTE, [1], {"a": 1}, ["\ud800"]]),
        ("stop_token_ids", [[-1], [2**31], ["a"], [1.0]]),
        ("logit_bias", [{str(i): 1 for i in range(100_000)}, {"-1": 1}, {"x": 1}, {"1": "a"}, {"1": 1e9}, {"٣": 1}]),
        ("logit_bias", [[1], {"400": 1}, {"1": None}]),
        ("bad_words", [["a"] * 2000, [""], [[-1]], 5, [["a"]]]),
        ("acceptance", ["best", "", 1]),
        ("model", [5, "a" * 5000]),
        ("stream", ["yes", 1]),
        ("stream_options", [{"include_usage": "yes"}, {"other": 1}, 5]),
        ("timeout", [0, -1, 10**9, "1"]),
        ("echo", [1, "true"]),
        ("suffix", ["after"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_values_that_cannot_be_are_refused(server: Running, param: str, values: list[Any]) -> None:
    for value in values:
        error = refused(server, {"prompt": "x", param: value})
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("acceptance_threshold", "acceptance_delta", "draft_confidence", "timeout"),
    ],
)
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", "1e39", "-5e9", '"1"', "[]", "true"]
)
def test_numbers_are_finite_and_within_bounds(server: Running, name: str, value: str) -> None:
    raw = f'{{"prompt": "x", "{name}": {value}}}'.encode()
    status, _, content = server.ask("POST", COMPLETIONS, raw=raw)
    assert status == 400
    assert name in json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"5", b"[]", b'"x"', b"null", b"true", b"{", b'{"prompt": }', b"\xff\xfe", b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 9**5 + b"]" * 9**5 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", b"\x80\x04\x95", b"\x00" * 1000,
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_request_is_refused(server: Running, raw: bytes) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        status, _, content = server.ask("POST", path, raw=raw)
        assert status == 400
        assert json.loads(content)["error"]["message"]


def test_of_equal_keys_the_last_counts(server: Running) -> None:
    status, _, content = server.ask(
        "POST", COMPLETIONS, raw=b'{"prompt": "x", "ignore_eos": true, "max_tokens": 0, "max_tokens": 3}'
    )
    assert status == 200
    assert json.loads(content)["usage"]["completion_tokens"] == 3


def test_penalties_go_with_every_number_of_drafts(server: Running) -> None:
    body = {
        "prompt": "abab" * 6,
        "max_tokens": 30,
        "temperature": 0,
        "presence_penalty": 0.7,
        "repetition_penalty": 1.2,
    }
    texts = {
        server.complete(**body, num_speculative_tokens=k)["choices"][0]["text"] for k in (0, 1, 3, 64, "auto")
    }
    assert len(texts) == 1


def test_many_errors_are_one(server: Running) -> None:
    """A list of a hundred thousand wrong values takes no longer than its first."""
    refused(server, {"prompt": [{}] * 100_000})
    refused(server, {"prompt": "x", "logit_bias": {f"x{i}": 1 for i in range(50_000)}})
    refused(server, {f"field{i}": 1 for i in range(50_000)})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, {"prompt": [5] * 600_000}, 400),
        (COMPLETIONS, {"prompt": [5] * 400_000 + [True]}, 400),
        (COMPLETIONS, {"prompt": [[5]] * 400_000}, 400),
        (COMPLETIONS, {"prompt": ["a"] * 400_000}, 400),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [5] * 600_000, "max_tokens": 1}, 200),
        (COMPLETIONS, {"prompt": "x", "bad_words": [[5] * 256] * 1024, "max_tokens": 1}, 200),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 40_000}, 400),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_900_000}]}, 400),
        ("/tokenize", {"prompt": "a" * 600_000}, 200),
        ("/detokenize", {"tokens": [5] * 200_000}, 200),
    ],
    ids=range(10),
)
def test_large_bodies_hold_nobody_up(server: Running, path: str, body: Any, status: int) -> None:
    """As large as a body may be. (How long the loop was busy with it, `unharmed` looks at.)"""
    assert server.post(path, body)[0] == status


# Programs and places in a request


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"},
        {"chat_template_kwargs": {"tools": [1]}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"documents": [{"url": "http://127.0.0.1:9/"}]},
        {"prompt_embeds": "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg=="},
        {"lora_path": "/etc/passwd"},
        {"response_format": {"type": "json_schema"}},
        {"cache_salt": "x"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_would_run_or_fetch_something_is_no_field(server: Running, field: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x"}]
    refused(server, {"messages": messages, **field}, CHAT)
    refused(server, {"prompt": "x", **field})


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:{port}/"}}],
        [{"type": "input_audio", "input_audio": {"data": "file:///etc/passwd"}}],
        5,
        None,
    ],
    ids=["image", "audio", "number", "null"],
)
def test_a_url_in_a_message_is_not_followed(server: Running, content: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        text = json.dumps(content).replace("{port}", str(listening.getsockname()[1]))
        refused(server, {"messages": [{"role": "user", "content": json.loads(text)}]}, CHAT)
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "http://127.0.0.1/x", "tiny/", "TINY", "tiny\x00"]
)
def test_another_models_name_is_a_name_only(server: Running, name: str) -> None:
    for path, body in [
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    ]:
        status, answer = server.post(path, {**body, "model": name})
        assert status == 404
        assert answer["error"]["code"] == "model_not_found"
    assert server.post("/tokenize", {"prompt": "x", "model": name})[0] == 404


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__init__.__globals__ }}", "not allowed"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
    ids=["globals", "endless", "huge", "refusal"],
)
def test_a_models_template_is_held(tmp_path: Path, template: str, message: str) -> None:
    """It is the model's, and may be anybody's: an error of the request, while others are answered."""
    model = save_chat_model(tmp_path / "model", template)
    with Running(model) as server:
        server.ready()
        body = {"messages": [{"role": "user", "content": "x"}]}
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(server.post, CHAT, body)
            began = time.monotonic()
            server.check_alive()
            assert time.monotonic() - began < 2.0
            status, answer = asked.result()
        assert status == 400
        assert message in answer["error"]["message"]
        server.check_clean()


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with Running(model) as server:
        server.ready().check_alive()
    assert not (tmp_path / "ran").exists()


# The key, the paths, the headers


@pytest.fixture(scope="module")
def locked(chat_model: Path) -> Iterator[Running]:
    with Running(chat_model, server_options={"api_key": KEY}) as running:
        yield running.ready()


def routes(server: Running) -> list[tuple[str, str]]:
    document = json.loads(server.ask("GET", "/openapi.json", headers=bearer(server))[2])
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def bearer(server: Running) -> dict[str, Any]:
    return {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}".encode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": ""},
        {"Authorization": f"Basic {KEY}".encode()},
        {"Authorization": f"Bearer {KEY} ".encode() + b"x"},
        {"Authorization": f"Bearer {KEY[:-1]}".encode()},
        {"X-Api-Key": KEY.encode()},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=range(8),
)
def test_without_the_key_there_is_nothing(locked: Running, headers: dict[str, Any]) -> None:
    """R10."""
    found = routes(locked)
    assert len(found) >= 9
    for method, path in [*found, ("GET", "/openapi.json"), ("GET", "/nothing"), ("OPTIONS", COMPLETIONS)]:
        status, answer_headers, content = locked.ask(method, path, {} if method == "POST" else None, headers)
        if path in ("/health", "/ready"):
            assert status == 200
        else:
            assert status == 401, path
            assert answer_headers["www-authenticate"] == "Bearer"
            assert json.loads(content)["error"]["code"] == "invalid_api_key"


def test_with_the_key_all_is_there(locked: Running) -> None:
    headers = bearer(locked)
    for method, path in routes(locked):
        status = locked.ask(method, path, {} if method == "POST" else None, headers)[0]
        assert status == (400 if method == "POST" else 200)
    assert locked.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers)[0] == 200


@pytest.mark.parametrize(
    "line",
    [
        "GET /v1/models HTTP/1.1\r\nHost: x/health",
        "GET http://x/v1/models HTTP/1.1\r\nHost: x",
        "GET http://x/health/../v1/models HTTP/1.1\r\nHost: x",
        "GET //v1/models HTTP/1.1\r\nHost: x",
        "GET /%2Fv1%2Fmodels HTTP/1.1\r\nHost: x",
        "GET /health/../v1/models HTTP/1.1\r\nHost: x",
        "GET /v1/models?path=/health HTTP/1.1\r\nHost: x",
        "GET /v1/models#/health HTTP/1.1\r\nHost: x",
        "GET /v1/models HTTP/1.0",
        "GET /health;/v1/models HTTP/1.1\r\nHost: x",
        "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Original-URL: /health\r\nX-Forwarded-Prefix: /health",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_round_the_key(locked: Running, line: str) -> None:
    answer = locked.send(f"{line}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))
    assert b"tiny" not in answer


def test_no_other_route_is_there(server: Running) -> None:
    for path in (
        "/docs",
        "/redoc",
        "/debug",
        "/reset_prefix_cache",
        "/shutdown",
        "/sleep",
        "/server_info",
        "/v1",
        "/.env",
    ):
        assert server.ask("GET", path)[0] == 404
        assert server.ask("POST", path, {})[0] == 404
    assert server.ask("GET", COMPLETIONS)[0] == 405
    assert {path for _, path in routes(server)} == {
        *("/v1/models", COMPLETIONS, CHAT, "/tokenize", "/detokenize"),
        *("/health", "/ready", "/metrics", "/version"),
    }


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"".join(b"X-%d: 1\r\n" % i for i in range(200)), b"431"),
        (b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)), b"431"),
        (b"X-Long: " + b"a" * (100 * MEGABYTE) + b"\r\n", b"400"),
        (b"Bad Header\r\n", b"400"),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", b"400"),
        (b"Content-Length: -1\r\n", b"400"),
        (b"Transfer-Encoding: gzip\r\n", b"501"),
    ],
    ids=["200", "10000", "100 MB", "malformed", "two lengths", "negative", "encoding"],
)
def test_headers_have_limits(server: Running, content: bytes, status: bytes) -> None:
    answer = server.send(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + content + b"\r\n")
    assert answer[9:12] in (status, b"400", b"")  # who goes on sending may not be heard, nor hear


def test_upgrades_are_not_available(server: Running) -> None:
    answer = server.send(
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert not answer.startswith(b"HTTP/1.1 101")


# What tenants see of each other


def test_no_tenant_sees_anothers_words(start: Callable[..., Running], library: Engine) -> None:
    """Two of them share a model, a prefix cache and an index of texts; drafts are rejected, requests aborted between.

    The text of each is what the library says to it alone: nothing of the other's can be in it."""
    server = start("suffix", num_blocks=60, step_seconds=0.001)
    canaries = ["CANARY-alpha-7f3a", "CANARY-omega-91bc"]
    shared = "The secret is "

    def ask(place: int) -> None:
        canary, prompt = canaries[place % 2], f"{shared}{canaries[place % 2]}. The secret is "
        body = {
            "prompt": prompt,
            "max_tokens": 24,
            "seed": place,
            "num_speculative_tokens": 4,
            "return_rounds": True,
        }
        if place % 7 == 3:
            with server.connected() as connection:
                content = json.dumps({**body, "stream": True}).encode()
                head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                connection.recv(1)
            return
        choice = server.complete(**body)["choices"][0]
        expected: Any = library.generate(prompt, max_new_tokens=24, temperature=1.0, seed=place)
        assert choice["text"] == expected.text
        other = canaries[(place + 1) % 2]
        assert other[7:] not in json.dumps(choice)
        assert canary != other

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))


def test_events_tell_of_the_stream_only(server: Running) -> None:
    """A chunk holds the names that the documents list, and nothing else of the server."""
    content = server.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 3, "stream": True})[2]
    *chunks, _ = events_of(content)
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
