"""What must not break a server: clients that leave, are slow or ask too much, and requests that fail."""

from __future__ import annotations

import gzip
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from chat_templates import save_chat_model
from running_server import (
    Running,
    events_of,
    read_all,
    request_bytes,
    resident_bytes,
    wait_until,
)

from specengine.drafters.base import DraftProposal
from specengine.engine import Engine
from specengine.errors import ModelLoadError
from specengine.runtime.sequence import Request
from specengine.runtime.state import RunningBatch
from specengine.server import middleware, run

Start = Callable[..., Running]
LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}
MEGABYTE = 1 << 20


def expected_text(library: Engine, prompt: str, num_tokens: int, seed: int) -> str:
    result: Any = library.generate(prompt, max_new_tokens=num_tokens, temperature=1.0, seed=seed)
    return str(result.text)


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_is_not_worked_for(
    start: Start, library: Engine, stream: bool, path: str
) -> None:
    """R1: within a second; and nobody else notices."""
    server = start(step_seconds=0.01)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(server.complete, prompt="other", max_tokens=60, seed=1)
        wait_until(lambda: server.engine.num_running == 1)
        asked = (
            {"prompt": "abc"}
            if path == "/v1/completions"
            else {"messages": [{"role": "user", "content": "a"}]}
        )
        with server.connected() as connection:
            connection.sendall(request_bytes(path, {**asked, **LONG, "stream": stream}))
            if stream:
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            wait_until(lambda: server.engine.num_running == 2)
        left = time.monotonic()
        wait_until(lambda: server.engine.num_running < 2)
        assert time.monotonic() - left < 1.0
        assert other.result()["choices"][0]["text"] == expected_text(library, "other", 60, 1)
    server.check_clean()
    assert server.metric("request_success_total") == 2


def test_a_client_that_leaves_while_it_waits_is_forgotten(start: Start) -> None:
    """Its stream has not sent a byte yet."""
    server = start(step_seconds=0.01, max_batch_size=1)
    with server.connected() as running:
        running.sendall(request_bytes("/v1/completions", {"prompt": "abc", **LONG, "stream": True}))
        wait_until(lambda: server.engine.num_running == 1)
        with server.connected() as waiting:
            waiting.sendall(request_bytes("/v1/completions", {"prompt": "abc", **LONG, "stream": True}))
            wait_until(lambda: server.engine.num_waiting == 1)
        wait_until(lambda: server.engine.num_waiting == 0, seconds=1.0)
        assert server.engine.num_running == 1
    server.check_clean()


def test_survivors_get_exactly_their_tokens(start: Start, library: Engine) -> None:
    """R2: of a hundred requests ten leave, and some have three samples."""
    server = start(step_seconds=0.002)
    texts: dict[int, Any] = {}

    def ask(place: int) -> None:
        body = {
            "prompt": f"request {place % 7}",
            "max_tokens": 12,
            "seed": place,
            "n": 3 if place % 9 == 0 else 1,
        }
        if place % 10 == 3:
            with server.connected() as connection:
                connection.sendall(request_bytes("/v1/completions", {**body, "stream": True}))
                connection.recv(1)
            return
        texts[place] = [choice["text"] for choice in server.complete(**body)["choices"]]

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(ask, range(100)))
    assert len(texts) == 90
    for place, found in texts.items():
        result: Any = library.generate(
            f"request {place % 7}", max_new_tokens=12, temperature=1.0, seed=place, n=len(found)
        )
        assert found == [output.text for output in result.outputs]
    server.check_clean()


# Too many, too large, too slow


def test_who_finds_no_room_is_told_at_once(start: Start) -> None:
    """R3: ten times what fits: before anything is tokenised, and never as an error of the server's."""
    server = start(step_seconds=0.01, max_batch_size=2, server_options={"max_queued_requests": 2})
    built: list[int] = []
    build = server.engine.build_requests

    def count(prompts: Any, **options: Any) -> list[Request]:
        built.append(len(prompts))
        return build(prompts, **options)

    server.engine.build_requests = count  # type: ignore[method-assign]
    answers = []

    def ask(place: int) -> None:
        answers.append(
            server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 100, "ignore_eos": True})
        )

    with ThreadPoolExecutor(40) as pool:
        asking = [pool.submit(ask, place) for place in range(40)]
        wait_until(lambda: sum(answer[0] == 429 for answer in answers) >= 30)
        took = []
        for _ in range(9):
            began = time.monotonic()
            status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "x"})
            took.append(time.monotonic() - began)
            assert status == 429
            assert 1 <= int(headers["retry-after"]) <= 60
            assert json.loads(body)["error"]["code"] == "too_many_requests"
        for each in asking:
            each.result()
    statuses = [answer[0] for answer in answers]
    assert sorted(set(statuses)) == [200, 429]
    assert len(built) == statuses.count(200) >= 4
    assert sorted(took)[len(took) // 2] < 0.1
    assert server.metric("admission_rejections_total") == statuses.count(429) + 9
    server.check_clean()


def test_more_samples_than_there_can_be_are_refused_for_good(start: Start) -> None:
    """No later attempt would succeed: not 429."""
    server = start(max_batch_size=2, server_options={"max_queued_requests": 2})
    status, answer = server.post("/v1/completions", {"prompt": ["a", "b"], "n": 3})
    assert status == 400
    assert "6 sequences; this server takes 4" in answer["error"]["message"]


def test_a_request_that_can_never_fit_is_told_the_limit(server: Running, start: Start) -> None:
    """R12."""
    small = start(num_blocks=20)
    wanted = f"in a context of {server.engine.max_seq_len}"
    for where, body, limit in [
        (server, {"prompt": "a" * 500_000}, wanted),
        (server, {"prompt": [5] * 5000}, wanted),
        (small, {"prompt": [5] * 40, "max_tokens": 60}, "the engine has 19"),
    ]:
        took = []
        for _ in range(5):
            began = time.monotonic()
            status, answer = where.post("/v1/completions", body)
            took.append(time.monotonic() - began)
            assert status == 400
            assert limit in answer["error"]["message"], answer
        assert sorted(took)[len(took) // 2] < 0.1


def test_requests_of_several_times_the_pool_take_turns(start: Start, library: Engine) -> None:
    """R11."""
    server = start(num_blocks=40)
    with ThreadPoolExecutor(16) as pool:
        asked = [
            pool.submit(server.complete, prompt=f"turn {place}", max_tokens=60, seed=place, ignore_eos=True)
            for place in range(16)
        ]
        answers = [each.result() for each in asked]
    for place, answer in enumerate(answers):
        result: Any = library.generate(
            f"turn {place}", max_new_tokens=60, temperature=1.0, seed=place, ignore_eos=True
        )
        assert answer["choices"][0]["text"] == result.text
    assert server.metric("num_preemptions_total") > 0
    server.check_clean()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_time_is_over(start: Start, stream: bool) -> None:
    """R9: what is there of it is sent; who had not begun is told so."""
    server = start(step_seconds=0.01, max_batch_size=1)
    body = {"prompt": "abc", **LONG, "timeout": 0.4, "stream": stream}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.ask, "POST", "/v1/completions", body)
        wait_until(lambda: server.engine.num_running == 1)
        status, _, late = server.ask("POST", "/v1/completions", {**body, "timeout": 0.1})
        ended = first.result()
    if stream:
        assert events_of(late)[0]["choices"][0]["finish_reason"] == "abort"
        assert events_of(late)[1]["error"]["code"] == "request_timeout"
        *chunks, done = events_of(ended[2])
        assert done == "[DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks)
    else:
        assert status == 408
        assert ended[0] == 200
        choice = json.loads(ended[2])["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert choice["text"]
    server.check_clean()


def test_slow_headers_time_out_and_idle_connections_hurt_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R6: a byte at a time, a thousand that say nothing, and one that says half of a second request.

    That the slowest answers do not become slower either, benchmarks/soak_serve.py shows.
    """
    monkeypatch.setattr(run, "MAX_HEADER_SECONDS", 2.0)
    server = start()

    def time_first_tokens() -> float:
        took = []
        for _ in range(15):
            began = time.monotonic()
            server.complete(max_tokens=1)
            took.append(time.monotonic() - began)
        return sorted(took)[len(took) // 2]

    alone = time_first_tokens()
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    try:
        began = time.monotonic()
        beside = time_first_tokens()
        with server.connected() as slow, server.connected() as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert second.recv(1 << 16).startswith(b"HTTP/1.1 200")
            second.sendall(b"GET /he")
            for byte in b"GET /health HTTP/1.1\r\nX-Slow: ":
                slow.sendall(bytes([byte]))
            assert read_all(slow) == read_all(second) == b""
        for connection in idle:
            connection.settimeout(20)
            assert connection.recv(1) == b""
        assert time.monotonic() - began < 15.0
    finally:
        for connection in idle:
            connection.close()
    assert beside <= 1.5 * alone + 0.02
    server.check_alive()


def test_a_slow_body_times_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_SECONDS", 0.3)
    server = start()
    with server.connected() as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert read_all(connection).startswith(b"HTTP/1.1 408")
    server.check_alive()


def test_a_reader_that_does_not_read_holds_nobody_up(start: Start, library: Engine) -> None:
    """R7: the engine goes on, others' streams too, and what is kept is the reader's own tokens."""
    server = start()
    for listening in server.server.servers[0].sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of connections to come
    body = {
        "prompt": "abc",
        **LONG,
        "max_tokens": 600,
        "stream": True,
        "return_token_ids": True,
        "logprobs": 20,
    }
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        before = resident_bytes()
        connection.sendall(request_bytes("/v1/completions", body))
        wait_until(lambda: server.engine.num_running == 1)
        answer = server.complete(prompt="other", max_tokens=60, seed=1)
        assert answer["choices"][0]["text"] == expected_text(library, "other", 60, 1)
        wait_until(lambda: not server.engine.has_work)
        assert resident_bytes() - before < 50 * MEGABYTE
        content = b""
        while b"[DONE]" not in content:
            content += connection.recv(1 << 16)
    lines = [line for line in content.split(b"\r\n") if line.startswith(b"data: {")]
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    assert sum(len(choice["token_ids"]) for choice in choices) == 600
    assert len(choices) < 300  # what came while it did not read came at once
    server.check_clean()


def chunked(size: int) -> bytes:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    return head + piece * (size // 65536 + 1) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "send"),
    [
        (413, lambda server: server.ask("POST", "/tokenize", raw=b"x" * (2 * MEGABYTE + 1))[0]),
        (413, lambda server: int(server.send(chunked(2 * MEGABYTE)).split()[1])),
        (
            415,
            lambda server: server.ask(
                "POST",
                "/v1/completions",
                raw=gzip.compress(b" " * 200 * MEGABYTE),
                headers={"Content-Encoding": "gzip"},
            )[0],
        ),
    ],
    ids=["length", "chunked", "bomb"],
)
def test_a_body_has_a_limit(server: Running, status: int, send: Callable[[Running], int]) -> None:
    """R8: none is unpacked, none is kept."""
    before = resident_bytes()
    assert send(server) == status
    assert resident_bytes() - before < 50 * MEGABYTE
    server.check_alive()


def test_a_body_without_an_end_is_cut_off(server: Running) -> None:
    before = resident_bytes()
    assert server.send(chunked(256 * MEGABYTE))[:12] in (b"HTTP/1.1 413", b"")  # it may not be read any more
    assert resident_bytes() - before < 300 * MEGABYTE  # 256 of them are this test's
    server.check_alive()


# Loading, and requests that fail


def test_what_is_not_ready_says_so(chat_model: Path) -> None:
    """R4: alive while it loads and while it drains."""
    may_load = threading.Event()

    def build() -> Engine:
        assert may_load.wait(60)
        return Engine(chat_model, dtype="float32", block_size=4, num_threads=1)

    with Running(None, build=build) as server:
        for loaded in (False, True):
            if loaded:
                may_load.set()
                server.ready()
                assert server.ask("GET", "/ready")[0] == 200
                server.service.drain = lambda: None  # type: ignore[method-assign]
                server.service.is_draining = True
            assert server.ask("GET", "/ready")[0] == 503
            assert server.ask("GET", "/health")[0] == 200
            for path, body in [("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})]:
                status, headers, content = server.ask("POST", path, body)
                assert status == 503
                assert int(headers["retry-after"]) > 0
                assert json.loads(content)["error"]["type"] == "service_unavailable_error"
            assert server.ask("GET", "/metrics")[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    with Running(tmp_path / "nothing") as server:
        wait_until(lambda: server.server.should_exit)
    assert isinstance(server.service.failure, ModelLoadError)


class FailingDrafter:
    """Raises for the texts that hold a token, and for all of them where it is asked for a batch."""

    name = "failing"
    token = 0

    def propose(self, batch: RunningBatch) -> DraftProposal:
        raise AssertionError("it is asked sequence by sequence")

    def follow(self, sequence_id: int, drafted: Any, limit: int) -> list[int]:
        if self.token in self.heard[sequence_id]:
            raise RuntimeError("no draft for this one")
        return [5] * limit

    def hear(self, sequence_id: int, tokens: list[int], num_new: int) -> None:
        self.heard[sequence_id] = list(tokens)

    def observe(self, batch: RunningBatch, num_accepted: Any) -> None:
        pass

    def release(self, sequence_id: int) -> None:
        self.heard.pop(sequence_id, None)

    def __init__(self) -> None:
        self.heard: dict[int, list[int]] = {}


def _fail_in_a_processor(engine: Engine) -> None:
    """A request with this prompt brings code of its own, which raises after a few tokens."""
    build = engine.build_requests

    def fail(ids: list[int], logits: Any) -> Any:
        if len(ids) > 20:
            raise RuntimeError("a processor failed")
        return logits

    def with_processor(prompts: Any, **options: Any) -> list[Request]:
        options["logits_processor"] = fail if prompts[0] == "bad" else None
        return build(prompts, **options)

    engine.build_requests = with_processor  # type: ignore[method-assign]


def _run_out_of_memory(engine: Engine) -> None:
    """Steps fail as long as a request with this prompt is there, and nobody knows why."""
    step = engine._stepper.step

    def fail_where_bad() -> None:
        if any(request.prompt == "bad" for request in engine._scheduler.requests):
            raise MemoryError("out of memory")
        step()

    engine._stepper.step = fail_where_bad  # type: ignore[method-assign]


def _poisoned(directory: Path) -> str:
    """A model of which the token "~" makes every logit a NaN."""
    path = save_chat_model(directory, tie_word_embeddings=False)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    with Engine(path, num_threads=1) as engine:
        assert engine.tokenizer is not None
        token = engine.tokenizer.encode_part("~")[0]
    weights["model.embed_tokens.weight"][token] = float("nan")
    safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("how", ["nan", "processor", "drafter", "memory"])
@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_request_hurts_no_other(
    start: Start, chat_model: Path, tmp_path: Path, how: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """R13: it gets an error, and is counted; who ran beside it gets exactly its tokens."""
    model = _poisoned(tmp_path / "poisoned") if how == "nan" else chat_model
    drafter = FailingDrafter() if how == "drafter" else "suffix"

    def build() -> Engine:
        engine = Engine(model, drafter, dtype="float32", block_size=4, num_threads=1)
        if how == "processor":
            _fail_in_a_processor(engine)
        if how == "memory":
            _run_out_of_memory(engine)
        if isinstance(drafter, FailingDrafter) and engine.tokenizer is not None:
            drafter.token = engine.tokenizer.encode_part("~")[0]
        return engine

    server = start(build=build, step_seconds=0.01)
    prompt = {"nan": "~", "drafter": "a~b", "processor": "bad", "memory": "bad"}[how]
    with ThreadPoolExecutor() as pool:
        before = pool.submit(server.complete, prompt="before", max_tokens=80, seed=1)
        wait_until(lambda: server.engine.num_running == 1)
        body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": stream}
        failing = pool.submit(server.ask, "POST", "/v1/completions", body)
        if how != "memory":  # there the one that came last is ended
            wait_until(lambda: server.engine.num_running == 2 or failing.done())
        after = (
            pool.submit(server.complete, prompt="after", max_tokens=80, seed=2) if how != "memory" else before
        )
        status, _, content = failing.result()
        if stream:
            *_, error, done = events_of(content)
            assert (status, done) == (200, "[DONE]")
        else:
            assert status == 500
            error = json.loads(content)
        assert error["error"]["type"] == "server_error"
        before_text, after_text = (each.result()["choices"][0]["text"] for each in (before, after))
    with Engine(model, dtype="float32", block_size=4, num_threads=1) as library:
        assert before_text == expected_text(library, "before", 80, 1)
        if how != "memory":
            assert after_text == expected_text(library, "after", 80, 2)
    assert server.metric("corrupted_requests_total") == 1
    server.check_alive()
    server.check_clean()


# What is said, and to whom


def test_no_other_page_may_read_answers(server: Running) -> None:
    """R15: no cross-origin access is granted, with or without credentials."""
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("POST", "OPTIONS"):
        found = server.ask(method, "/v1/completions", {"prompt": "x", "max_tokens": 1}, headers)[1]
        assert not [name for name in found if name.startswith("access-control")]
    form = {"Content-Type": "text/plain"}  # what a page can send without asking
    assert server.ask("POST", "/v1/completions", {"prompt": "x"}, form)[0] == 400


def test_a_request_is_one_line_of_the_log_without_its_text(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """R15: nor can it begin another line, or colour the terminal."""
    secret = "SECRET\r\n\x1b[31m"
    with caplog.at_level(logging.INFO):
        logging.getLogger("specengine.server").propagate = True
        server.post("/v1/completions", {"prompt": secret, "max_tokens": 1})
        server.post("/v1/completions", {"prompt": "x", "model": secret})
        server.ask("GET", "/%0d%0a%1b%5b31m-FAKE")
        wait_until(lambda: any("FAKE" in message for message in caplog.messages))
    # A line before them may be the last test's: it is written when its answer has been sent.
    statuses = [message.split()[2] for message in caplog.messages[-3:]]
    assert statuses == ["200", "404", "404"]
    assert len(caplog.messages) <= 4
    for message in caplog.messages:
        assert "SECRET" not in message
        assert message.isprintable()


def test_reused_ids_and_connections_after_chaos(start: Start, library: Engine) -> None:
    """A few hundred requests of every kind, half of them wrong or left: afterwards all is as it was."""
    server = start(max_batch_size=4)
    random_number = random.Random(1)
    bodies: list[Any] = [
        {"prompt": "fine", "max_tokens": 5},
        {"prompt": "fine", "max_tokens": 5, "stream": True, "n": 2},
        {"prompt": "", "max_tokens": 5},
        {"prompt": "x", "top_p": 7},
        {"prompt": [5] * 5000},
        {"prompt": "x", "model": "other"},
    ]

    def ask(place: int) -> int:
        body = random_number.choice(bodies)
        if place % 5 == 0:
            with server.connected() as connection:
                connection.sendall(request_bytes("/v1/completions", {**body, "max_tokens": 300}))
            return 0
        return server.ask("POST", "/v1/completions", body)[0]

    with ThreadPoolExecutor(16) as pool:
        statuses = set(pool.map(ask, range(300)))
    assert statuses == {0, 200, 400, 404}
    server.check_clean()
    answer = server.complete(prompt="afterwards", max_tokens=20, seed=9)
    assert answer["choices"][0]["text"] == expected_text(library, "afterwards", 20, 9)
