"""Many machines: what one engine answers, several on a Ray cluster answer, whichever of them dies."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, request_bytes, wait_until
from typer.testing import CliRunner

from specengine.cli import app
from specengine.engine import Engine
from specengine.errors import SpecEngineError

ray = pytest.importorskip("ray")
ray_cluster = pytest.importorskip("specengine.server.ray_cluster")
ray_serve = pytest.importorskip("specengine.server.ray_serve")

PATIENCE_SECONDS = 240.0
ENGINE = ("--dtype", "float32", "--block-size", "4", "--max-batch-size", "2", "--draft-model", "suffix")
NUM_REQUESTS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs, which this process is in."""
    context = ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    assert not list(children())


def children() -> Iterator[tuple[int, str]]:
    """Process ids and titles of the cluster's workers: grandchildren of this process."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(directory.name)] = parent, (directory / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
    for pid, (parent, title) in found.items():
        if title.startswith("ray::") and found.get(parent, (0, ""))[0] == os.getpid():
            yield pid, title


def kill_one(title: str) -> None:
    """SIGKILL to one of the workers that are called so."""
    pid = next(pid for pid, each in children() if title in each)
    os.kill(pid, signal.SIGKILL)


# A file of requests


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Prompts of several kinds; some sampled, without a seed of their own; one that cannot be answered."""
    path = tmp_path / "in.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for place in range(NUM_REQUESTS):
            body = {"prompt": "abcab" * (place % 4 + 1), "max_tokens": 300, "temperature": place % 3 / 2}
            if place == NUM_REQUESTS // 2:
                body["n"] = 99
            request = {"custom_id": f"request {place}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**request, "body": body}) + "\n")
    return path


@pytest.fixture
def command(chat_model: Path, source: Path) -> Callable[..., list[str]]:
    """command(output, *options)"""

    def build(output: Path, *options: str) -> list[str]:
        return ["run-batch", str(source), str(output), "--model", str(chat_model), *ENGINE, *options]

    return build


def kept(answer: dict[str, Any]) -> Any:
    """What is the same in every run: not its body's id, its clock and its rounds."""
    body = {name: each for name, each in answer["response"]["body"].items() if name not in ("id", "created")}
    body.pop("metrics", None)
    if "usage" in body:  # what was found in the prefix cache depends on who came before
        body["usage"].pop("prompt_tokens_details")
    return {**answer, "response": {**answer["response"], "body": body}}


def read(path: Path) -> list[Any]:
    return [kept(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def undisturbed(command: Callable[..., list[str]], tmp_path: Path) -> list[Any]:
    """The answers of one machine, without Ray."""
    output = tmp_path / "undisturbed.jsonl"
    assert CliRunner().invoke(app, command(output)).exit_code == 0
    answers = read(output)
    assert len(answers) == NUM_REQUESTS
    return answers


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_workers_of_which_one_is_killed_answer_what_one_machine_answers(
    cluster: str, command: Callable[..., list[str]], tmp_path: Path, undisturbed: list[Any]
) -> None:
    output = tmp_path / "out.jsonl"
    num_at_kill: list[int] = []

    def kill_in_the_middle() -> None:
        wait_until(lambda: num_lines(output) > 0, PATIENCE_SECONDS)
        assert len([title for _, title in children() if "Answerer" in title]) == 2
        kill_one("Answerer")
        num_at_kill.append(num_lines(output))

    killing = threading.Thread(target=kill_in_the_middle)
    killing.start()
    done = CliRunner().invoke(app, command(output, "--ray", "--ray-workers", "2"))
    killing.join()
    assert done.exit_code == 0, done.output
    assert 0 < num_at_kill[0] < NUM_REQUESTS - 4, "it was in the middle"
    assert f"{NUM_REQUESTS} requests answered, 1 of them with an error" in done.stderr
    assert read(output) == undisturbed


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_is_gone_on_with(
    cluster: str, command: Callable[..., list[str]], tmp_path: Path, undisturbed: list[Any]
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = command(output, "--ray", "--ray-workers", "2", "--ray-address", cluster)
    process = subprocess.Popen(
        [sys.executable, "-m", "specengine", *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: num_lines(output) > 0 or process.poll() is not None, PATIENCE_SECONDS)
    process.kill()
    _, log = process.communicate()
    num_before = num_lines(output)
    assert 0 < num_before < NUM_REQUESTS, log
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"{num_before} of {NUM_REQUESTS} requests are answered; going on" in done.stderr
    assert read(output) == undisturbed


@pytest.mark.slow
def test_a_model_that_is_none_is_told_in_a_line(cluster: str, source: Path, tmp_path: Path) -> None:
    arguments = ["run-batch", str(source), str(tmp_path / "out.jsonl"), "--model", str(tmp_path), "--ray"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("specengine: ")
    assert "config.json: no such file" in done.stderr
    assert "Traceback" not in done.stderr


# A server


@pytest.fixture(scope="module")
def launch(cluster: str, chat_model: Path) -> Iterator[Callable[..., Served]]:
    """launch(*options): a server of two replicas on the cluster, ready, which is gone after these tests."""
    begun: list[Served] = []

    def begin(*options: str) -> Served:
        arguments = ("--model", str(chat_model), *ENGINE, "--ray-address", cluster, *options)
        begun.append(Served(*arguments))
        return begun[-1].ready()

    yield begin
    for served in begun:
        served.kill()


class Served:
    """`specengine serve --ray` as a process. log: what it has said so far"""

    def __init__(self, *arguments: str) -> None:
        self.log = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specengine", "serve", "--port", "0", "--ray", *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line

    def ready(self) -> Served:
        wait_until(lambda: "listening on" in self.log or self._process.poll() is not None, PATIENCE_SECONDS)
        if " ready: " not in self.log:
            assert [self.ask(path)[0] for path in ("/health", "/ready", "/v1/models")] == [200, 503, 503]
        wait_until(lambda: " ready: " in self.log or self._process.poll() is not None, PATIENCE_SECONDS)
        assert " ready: " in self.log, self.log
        return self

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(PATIENCE_SECONDS)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        (port,) = re.findall(r"listening on http://127\.0\.0\.1:(\d+)", self.log)
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE_SECONDS)
        try:
            data = None if body is None else json.dumps(body).encode()
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request("GET" if body is None else "POST", path, data, given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def complete(self, **body: Any) -> dict[str, Any]:
        status, content = self.ask("/v1/completions", body)
        assert status == 200, content
        return dict(json.loads(content))

    def by_replica(self, name: str) -> dict[str, float]:
        """A metric's samples."""
        found = re.findall(
            rf'^specengine:{name}\{{.*replica="(\w+)"}} (\S+)$',
            self.ask("/metrics")[1].decode(),
            re.MULTILINE,
        )
        return {replica: float(value) for replica, value in found}


@pytest.fixture(scope="module")
def served(launch: Callable[..., Served]) -> Served:
    return launch("--served-model-name", "tiny", "--ray-replicas", "2")


def sampled(place: int, **body: Any) -> dict[str, Any]:
    return {"prompt": "abcab" * (place + 1), "max_tokens": 40, "temperature": 0.8, "seed": place, **body}


def of_library(library: Engine, asked: dict[str, Any]) -> str:
    result = library.generate(
        asked["prompt"], max_new_tokens=asked["max_tokens"], temperature=0.8, seed=asked["seed"]
    )
    return result.text


@pytest.mark.slow
def test_a_seed_gives_one_text_on_every_replica_and_the_librarys(served: Served, library: Engine) -> None:
    requests = [sampled(place) for place in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda asked: served.complete(**asked), requests))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [of_library(library, asked) for asked in requests]
    written = served.by_replica("generation_tokens_total")
    assert len(written) == 2
    assert all(written.values()), "both have answered"
    assert sum(written.values()) == sum(answer["usage"]["completion_tokens"] for answer in answers)


@pytest.mark.slow
def test_prompts_that_begin_alike_go_where_their_prefix_is_cached(served: Served) -> None:
    before = served.by_replica("prompt_tokens_total")
    beginning = "a beginning that many share " * 12
    cached = [
        served.complete(prompt=beginning + str(place), max_tokens=2)["usage"]["prompt_tokens_details"]
        for place in range(6)
    ]
    after = served.by_replica("prompt_tokens_total")
    assert sum(after[name] > before[name] for name in after) == 1
    assert all(each["cached_tokens"] > 200 for each in cached[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", None),
        ("/version", None),
        ("/openapi.json", None),
        ("/", None),
        ("/page/page.js", None),
        ("/nowhere", None),
        ("/v1/completions", None),
        ("/health", {}),
        ("/v1/completions", {"prompt": "x", "n": 99}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": "x", "model": "another"}),
        ("/v1/completions", {"prompt": [1] * 5000}),
        ("/v1/completions", {"prompt": "x" * (3 << 20)}),
        ("/v1/completions", "no object"),
        ("/tokenize", {"prompt": "ab"}),
        ("/detokenize", {"tokens": [10**6]}),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each)[:40],
)
def test_every_route_and_every_error_is_a_servers(
    served: Served, server: Running, path: str, body: Any
) -> None:
    status, _, content = server.ask("GET" if body is None else "POST", path, body)
    created = rb'"created":\d+'
    found = served.ask(path, body)
    assert (found[0], re.sub(created, b"", found[1])) == (status, re.sub(created, b"", content))


@pytest.mark.slow
def test_a_client_that_leaves_is_not_worked_for(served: Served) -> None:
    (port,) = re.findall(r"listening on http://127\.0\.0\.1:(\d+)", served.log)
    for streams in (True, False):
        body = {"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": streams, "n": 2}
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            connection.sendall(request_bytes("/v1/completions", body))
            wait_until(lambda: sum(served.by_replica("num_requests_running").values()) > 0, PATIENCE_SECONDS)
        wait_until(lambda: not any(served.by_replica("num_requests_running").values()), PATIENCE_SECONDS)
        assert 'finished_reason="abort"' in served.ask("/metrics")[1].decode()


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced_and_its_requests_answered(
    served: Served, library: Engine
) -> None:
    requests = [sampled(place, max_tokens=1800, ignore_eos=True) for place in range(8)]
    before = set(served.by_replica("num_requests_running"))
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.complete, **asked) for asked in requests]
        wait_until(lambda: all(served.by_replica("num_requests_running").values()), PATIENCE_SECONDS)
        assert not any(answer.done() for answer in answers)
        kill_one("ServeReplica")
        texts = [answer.result()["choices"][0]["text"] for answer in answers]
    expected = [
        library.generate(
            asked["prompt"], max_new_tokens=1800, temperature=0.8, seed=asked["seed"], ignore_eos=True
        ).text
        for asked in requests
    ]
    assert texts == expected
    assert "a replica failed" in served.log

    def is_replaced() -> bool:
        now = set(served.by_replica("num_requests_running"))
        return len(now) == 2 and now != before

    wait_until(is_replaced, PATIENCE_SECONDS)
    served.complete(**sampled(1))


@pytest.mark.slow
def test_running_requests_finish_before_the_end(served: Served) -> None:
    """The last of these: SIGTERM."""
    body = {"prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.ask, "/v1/completions", body)
        wait_until(lambda: any(served.by_replica("num_requests_running").values()), PATIENCE_SECONDS)
        served.signal(signal.SIGTERM)
        wait_until(lambda: "shutting down: 1 requests" in served.log, PATIENCE_SECONDS)
        status, content = served.ask("/v1/completions", {"prompt": "x"})
        assert (status, b"shutting down" in content) == (503, True)
        assert (served.ask("/ready")[0], served.ask("/health")[0]) == (503, 200)
        status, content = answer.result()
    assert status == 200
    assert b'"finish_reason":"length"' in content
    assert content.endswith(b"data: [DONE]\n\n")
    assert served.wait() == 0
    assert "Traceback" not in served.log
    wait_until(lambda: not any("ServeReplica" in title for _, title in children()), PATIENCE_SECONDS)


@pytest.mark.slow
def test_a_signal_while_replicas_are_begun_leaves_none(cluster: str, chat_model: Path) -> None:
    served = Served("--model", str(chat_model), *ENGINE, "--ray-address", cluster)
    wait_until(lambda: "listening on" in served.log, PATIENCE_SECONDS)
    served.signal(signal.SIGTERM)
    assert served.wait() == 0
    assert "Started a local Ray instance" not in served.log
    assert "Traceback" not in served.log
    wait_until(lambda: not any("ServeReplica" in title for _, title in children()), PATIENCE_SECONDS)


def test_prompts_that_begin_alike_have_one_affinity() -> None:
    def of(**body: Any) -> str:
        return str(ray_serve.affinity(json.dumps(body).encode()))

    long = "x" * 300
    assert of(prompt=long + "a", seed=1) == of(max_tokens=3, prompt=long + "b")
    assert of(prompt=[7] * 200 + [1]) == of(prompt=[7] * 200 + [2])
    chats = [[{"role": "system", "content": long}, {"role": "user", "content": each}] for each in "ab"]
    assert of(messages=chats[0]) == of(messages=chats[1])
    assert len({of(prompt="a"), of(prompt="b"), of(prompt=long), of(messages=chats[0])}) == 4
    assert {ray_serve.affinity(body) for body in (b"", b"[1]", b"nonsense", b"[" * 100_000)} == {""}


def test_metrics_of_replicas_are_one_text_with_a_label() -> None:
    text = (
        b"# HELP specengine:asked_total times\n# TYPE specengine:asked_total counter\n"
        b'specengine:asked_total{model_name="a"} %d.0\n'
    )
    merged = ray_serve.merge_metrics([("one", text % 3), ("two", text % 4)]).decode()
    assert merged.splitlines() == [
        "# HELP specengine:asked_total times",
        "# TYPE specengine:asked_total counter",
        'specengine:asked_total{model_name="a",replica="one"} 3.0',
        'specengine:asked_total{model_name="a",replica="two"} 4.0',
    ]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_an_address_at_which_nothing_listens_is_an_error_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ray, "is_initialized", lambda: False
    )  # this process may be in the cluster of other tests
    with (
        pytest.raises(SpecEngineError, match=re.escape(f"no Ray cluster at {address}: ")),
        ray_cluster.joined(address),
    ):
        pass


# Who gets what


@pytest.mark.parametrize(
    ("nodes", "count", "on_gpu", "expected"),
    [
        ([{"CPU": 8}], None, True, (1, 8, 0)),
        ([{"CPU": 8}, {"CPU": 4}], None, True, (2, 4, 0)),
        ([{"CPU": 8}, {"CPU": 4}], 3, True, (3, 4, 0)),
        ([{"CPU": 8}, {"CPU": 4}], 4, False, (4, 2, 0)),
        ([{"CPU": 2}, {}], 2, True, (2, 1, 0)),
        ([{"CPU": 0}, {"CPU": 16}], None, True, (1, 16, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], None, True, (2, 1, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], None, False, (2, 8, 0)),
        ([{"CPU": 8, "GPU": 2}], 1, True, (1, 1, 1)),
    ],
    ids=str,
)
def test_engines_get_equal_shares_of_a_cluster(
    nodes: list[dict[str, float]], count: int | None, on_gpu: bool, expected: tuple[int, int, int]
) -> None:
    assert ray_cluster.divide(nodes, count, on_gpu=on_gpu) == expected


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"CPU": 2}], "3 engines want a CPU each; the cluster has 2"),
        ([], "3 engines want a CPU each; the cluster has 0"),
        ([{"CPU": 8, "GPU": 2}], "3 engines want a GPU each; the cluster has 2"),
    ],
    ids=str,
)
def test_more_engines_than_there_is_room_for_are_refused(nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(SpecEngineError, match=message):
        ray_cluster.divide(nodes, 3, on_gpu=True)
