"""The server, beside llama.cpp's on one GGUF file, and beside the library on the bundled pair; in turn, on one machine.

    specengine fetch smollm2
    make bench-serve
    make bench-serve BENCH_FLAGS="--repetitions 7 --results benchmarks/results/serve_epyc.jsonl"

Three questions, each answered by turns that follow each other, medians of which are compared:

* tokens a second that 1, 4 and 16 clients are sent, by `llama-server` and by `specengine serve`, plain and with drafts
  looked up in what was said (`suffix`);
* tokens a second of 32 requests at once, beside `Engine.generate` of the same prompts as one batch;
* milliseconds to the first token of one request, beside the library's.

All are sent the same token ids and generate as many tokens, greedily; caches of prompts are off. Time is the clients',
from the first request to the last answer, prompts included. Ours must be sent the same tokens with drafts as without,
and those of the library, or nothing is reported.

llama.cpp's server is built for this processor from the sources of llama-cpp-python (`generation/llama_builds.py`),
once, in minutes; `--llama-server` names another, and "none" leaves it out.

Exits with 1 if ours is slower than is promised: 0.9 of the library's throughput, 5 ms more to the first token.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - before specengine's extension, which needs its libraries
from bench_generate import Defaults, between, file_path, say
from generation import llama_builds
from generation.protocol import UnavailableError
from measure import ROOT, append_rows, machine_name

from specengine import Engine, SpecEngineError, bundled
from specengine.fetched import require_fetched
from specengine.models.checkpoints import open_checkpoint

OURS, LLAMA, LIBRARY = "ours", "llama.cpp", "library"
PROMPT_LENGTH, NEW_TOKENS, NUM_DRAFTS = 64, 64, 4
CLIENTS = (1, 4, 16)
NUM_TOGETHER = 32
LEAST_THROUGHPUT = 0.9  # of the library's
MOST_EXTRA_MS = 5.0  # to the first token
STARTUP_SECONDS = 300.0
MORE_IS_SAID = ("--verbosity", "4")
# The threads of whose turn it was go to sleep.
PAUSE_SECONDS = 0.05
LICENSE = ROOT / "LICENSE"
_Json = dict[str, Any]


class NotExactError(Exception):
    """Ours generated other tokens than it must."""


class Server:
    """A server's process, which has answered.

    about: what its rows say of it

    Raises `UnavailableError` where it ends, or does not answer in time.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.about: _Json = {}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends its servers
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STARTUP_SECONDS)
        connection.connect()
        return connection

    def _wait(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise UnavailableError(f"it ended with status {self._process.returncode}: {self.log[-300:]}")
            with suppress(OSError, UnavailableError):
                connection = self.connect()
                ask(connection, body_of([1, 2, 3], 1))
                connection.close()
                return
            time.sleep(0.1)
        raise UnavailableError(f"it did not answer in {STARTUP_SECONDS:.0f} s: {self.log[-300:]}")


def body_of(prompt: list[int], num_tokens: int, **more: Any) -> _Json:
    return {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **more}


def ask(connection: http.client.HTTPConnection, body: _Json) -> _Json:
    """The answer. Raises `UnavailableError` where it is an error."""
    post(connection, body)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise UnavailableError(f"status {response.status}: {content[:200]!r}")
    answer: _Json = json.loads(content)
    return answer


def post(connection: http.client.HTTPConnection, body: _Json) -> None:
    content = json.dumps(body).encode()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})


@dataclass
class Turn:
    """What one turn took and brought; token_ids: of each prompt, where the server tells"""

    seconds: float
    num_tokens: int
    token_ids: list[list[int]] = field(default_factory=list)


def ask_together(server: Server, bodies: list[_Json]) -> Turn:
    """All at once, each from a client that is connected already."""
    connections = [server.connect() for _ in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        began = time.perf_counter()
        answers = list(pool.map(ask, connections, bodies))
        seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    num_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert num_tokens == sum(body["max_tokens"] for body in bodies), "every answer has its length"
    ids = [answer["choices"][0]["token_ids"] for answer in answers if "token_ids" in answer["choices"][0]]
    return Turn(seconds, num_tokens, ids)


def first_token_of(server: Server, body: _Json) -> float:
    """Seconds from the request to the first event of its stream, from a client that is connected already."""
    connection = server.connect()
    began = time.perf_counter()
    post(connection, {**body, "stream": True})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    line = response.readline()
    seconds = time.perf_counter() - began
    assert line.startswith(b"data: {"), line
    response.read()
    connection.close()
    return seconds


class Prompts:
    """Token ids of a text, each prompt from a place of its own."""

    def __init__(self, ids: list[int], length: int) -> None:
        self._ids, self._length, self._place = ids, length, 0

    def take(self, count: int) -> list[list[int]]:
        num_places = len(self._ids) - self._length
        places = [(self._place + i) % num_places for i in range(count)]
        self._place += count
        return [self._ids[place : place + self._length] for place in places]


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # closes the servers
    given = parse(arguments)
    print(f"{machine_name(given.threads)}; medians of {given.repetitions} in turn", flush=True)
    faults: list[str] = []
    try:
        for row in (row for part in given.parts for row in PARTS[part](given)):
            if given.results is not None:
                append_rows([row], given.results)
            print(line_of(row), flush=True)
            fault = fault_of(row)
            faults += [fault] if fault and not given.quick else []
    except (NotExactError, UnavailableError, SpecEngineError) as error:
        print(f"bench_serve.py: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"FAULT: {fault}")
    return int(bool(faults))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The server, beside llama.cpp's and beside the library, in turn.",
        formatter_class=Defaults,
    )
    add = parser.add_argument
    add("--gguf", type=Path, metavar="FILE", help="what both serve; default: SmolLM2, as it was fetched")
    add(
        "--llama-server",
        type=Path,
        metavar="FILE",
        help='llama.cpp\'s server, or "none"; default: it is built',
    )
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="beside whom")
    add("--repetitions", type=between(1, 1000), default=5, metavar="N", help="turns of each")
    add("--threads", type=between(1, 1024), default=len(os.sched_getaffinity(0)), metavar="N", help="of each")
    add("--quick", action="store_true", help="few tokens, and no promise is checked: does it run")
    add("--results", type=file_path, metavar="PATH", help="append the rows to this file, as JSON lines")
    given = parser.parse_args(arguments)
    if given.gguf is None:
        given.gguf = require_fetched("smollm2")
    given.num_tokens = 6 if given.quick else NEW_TOKENS
    return given


# Beside llama.cpp's server


def compare_servers(given: argparse.Namespace) -> Iterator[_Json]:
    path = given.gguf.resolve()
    tokenizer = open_checkpoint(path).tokenizer
    assert tokenizer is not None, "a GGUF file that can be loaded has a tokenizer"
    prompts = Prompts(tokenizer.encode(LICENSE.read_text(encoding="utf-8")), PROMPT_LENGTH)
    with ExitStack() as stack:
        ours = Server(OURS, our_command(given, "--model", str(path), "--draft-model", "suffix"))
        stack.callback(ours.close)
        llama, reason = start_llama(path, given)
        if llama is None:
            yield {"kind": "clients", "server": LLAMA, "model": path.name, "reason": reason}
        else:
            stack.callback(llama.close)
        for num_clients in CLIENTS:
            say(f"{path.name}: {num_clients} clients")
            for row in compare_clients(ours, llama, prompts, num_clients, given):
                yield {"model": path.name, **row}


def our_command(given: argparse.Namespace, *arguments: str) -> list[str]:
    own = ["--num-threads", str(given.threads), "--max-num-seqs", str(NUM_TOGETHER)]
    command = [sys.executable, "-m", "specengine", "serve", *own, "--no-enable-prefix-cache"]
    return [*command, *arguments]


def start_llama(path: Path, given: argparse.Namespace) -> tuple[Server | None, str | None]:
    """llama.cpp's server in the first build that answers, or why there is none."""
    if given.llama_server == Path("none"):
        return None, "left out"
    length = PROMPT_LENGTH + given.num_tokens
    # A place for each client, each with room for its sequence.
    places = ["--parallel", str(max(CLIENTS)), "--ctx-size", str(max(CLIENTS) * -(-length // 64) * 64)]
    arguments = ["-m", str(path), "--threads", str(given.threads), "--host", "127.0.0.1", *places]
    if given.llama_server is not None:
        return started(given.llama_server, arguments, "given"), None
    failures: list[str] = []
    for build in llama_builds.ladder():
        title = f"{build.name} build"
        try:
            server = started(llama_builds.find_or_make_server(build, say), arguments, build.name)
        except UnavailableError as error:
            failures.append(f"{title}: {error}")
            say(f"  {LLAMA}, {failures[-1]}")
        else:
            return server, None
    return None, "; ".join(failures)


def started(program: Path, arguments: list[str], build: str) -> Server:
    """llama.cpp's server. (Another one, which says more, has told before what it uses of the processor.)"""
    with closing(Server(LLAMA, [str(program), *arguments, *MORE_IS_SAID])) as talkative:
        found = re.search(r"CPU : (.*)", talkative.log)
    server = Server(LLAMA, [str(program), *arguments])
    used = re.findall(r"(\w+) = 1", found[1]) if found else []
    server.about = {"build": build, "version": llama_builds.read_version(), "instruction_set": " ".join(used)}
    return server


def compare_clients(
    ours: Server, llama: Server | None, prompts: Prompts, num_clients: int, given: argparse.Namespace
) -> list[_Json]:
    asked: dict[tuple[str, str], Callable[[list[list[int]]], Turn]] = {
        (OURS, "plain"): lambda each: ask_together(ours, our_bodies(each, given.num_tokens, 0)),
        (OURS, "speculative"): lambda each: ask_together(ours, our_bodies(each, given.num_tokens, "auto")),
    }
    if llama is not None:
        # It ignores what it does not know, and would reuse what it has seen.
        more = {"cache_prompt": False}
        asked[LLAMA, "plain"] = lambda each: ask_together(
            llama, [body_of(prompt, given.num_tokens, **more) for prompt in each]
        )
    turns = take_turns(asked, prompts, num_clients, given.repetitions)
    check_same(turns[OURS, "plain"], turns[OURS, "speculative"], "with drafts")
    speeds = {
        key: statistics.median(turn.num_tokens / turn.seconds for turn in each) for key, each in turns.items()
    }
    rows = []
    for (name, mode), speed in speeds.items():
        row = {"kind": "clients", "server": name, "mode": mode, "clients": num_clients}
        row |= {"tokens_per_second": round(speed, 1), **sizes(given)}
        row |= llama.about if llama is not None and name == LLAMA else {}
        if llama is not None and name == OURS:
            row["ratio_to_llama"] = round(speed / speeds[LLAMA, "plain"], 3)
        rows.append(row)
    return rows


def our_bodies(prompts: list[list[int]], num_tokens: int, drafts: int | str) -> list[_Json]:
    own = {"num_speculative_tokens": drafts, "return_token_ids": True}
    return [body_of(prompt, num_tokens, **own) for prompt in prompts]


def take_turns(
    asked: dict[Any, Callable[[list[list[int]]], Turn]], prompts: Prompts, count: int, repetitions: int
) -> dict[Any, list[Turn]]:
    """The turns of each. In one repetition all have the same prompts; the first warms up and does not count."""
    turns: dict[Any, list[Turn]] = {key: [] for key in asked}
    for repetition in range(repetitions + 1):
        each = prompts.take(count)
        for key, function in asked.items():
            time.sleep(PAUSE_SECONDS)
            turn = function(each)
            if repetition:
                turns[key].append(turn)
    return turns


def check_same(expected: list[Turn], found: list[Turn], what: str) -> None:
    if [turn.token_ids for turn in expected] != [turn.token_ids for turn in found]:
        raise NotExactError(f"{what} the server's tokens are others")


def sizes(given: argparse.Namespace) -> _Json:
    return {
        "prompt_tokens": PROMPT_LENGTH,
        "max_new_tokens": given.num_tokens,
        "repetitions": given.repetitions,
        "num_threads": given.threads,
    }


# Beside the library


def compare_with_library(given: argparse.Namespace) -> Iterator[_Json]:
    options = {"max_batch_size": NUM_TOGETHER, "num_threads": given.threads, "enable_prefix_cache": False}
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(bundled.target_path(), bundled.draft_path(), **options))
        server = Server(OURS, our_command(given))
        stack.callback(server.close)
        tokenizer = engine.tokenizer
        assert tokenizer is not None, "the bundled pair has one"
        prompts = Prompts(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")), PROMPT_LENGTH)
        say("the bundled pair: throughput")
        for mode in ("plain", "speculative"):
            yield compare_throughput(engine, server, prompts, mode, given)
        say("the bundled pair: the first token")
        yield compare_first_token(engine, server, prompts, given)


# By the name of whom ours is beside.
PARTS: dict[str, Callable[[argparse.Namespace], Iterator[_Json]]] = {
    "server": compare_servers,
    "library": compare_with_library,
}


def compare_throughput(
    engine: Engine, server: Server, prompts: Prompts, mode: str, given: argparse.Namespace
) -> _Json:
    drafts = {"plain": 0, "speculative": NUM_DRAFTS}[mode]

    def generate(each: list[list[int]]) -> Turn:
        began = time.perf_counter()
        results = engine.generate(
            each, max_new_tokens=given.num_tokens, ignore_eos=True, num_speculative_tokens=drafts
        )
        seconds = time.perf_counter() - began
        ids = [result.token_ids for result in results]
        return Turn(seconds, sum(map(len, ids)), ids)

    asked = {
        LIBRARY: generate,
        OURS: lambda each: ask_together(server, our_bodies(each, given.num_tokens, drafts)),
    }
    turns = take_turns(asked, prompts, NUM_TOGETHER, given.repetitions)
    check_same(turns[LIBRARY], turns[OURS], "beside the library's")
    library, ours = (
        statistics.median(turn.num_tokens / turn.seconds for turn in turns[name]) for name in (LIBRARY, OURS)
    )
    # Of pairs of turns that follow each other: what the machine does meanwhile is in both.
    ratios = [one.seconds / other.seconds for one, other in zip(turns[LIBRARY], turns[OURS], strict=True)]
    return {
        "kind": "throughput",
        "model": "bundled pair",
        "server": OURS,
        "mode": mode,
        "num_speculative_tokens": drafts,
        "clients": NUM_TOGETHER,
        "tokens_per_second": round(ours, 1),
        "library_tokens_per_second": round(library, 1),
        "ratio_to_library": round(statistics.median(ratios), 3),
        **sizes(given),
    }


def compare_first_token(engine: Engine, server: Server, prompts: Prompts, given: argparse.Namespace) -> _Json:
    def stream(each: list[list[int]]) -> Turn:
        began = time.perf_counter()
        events = iter(engine.stream(each[0], max_new_tokens=2, ignore_eos=True, num_speculative_tokens=0))
        next(events)
        seconds = time.perf_counter() - began
        for _ in events:
            pass
        return Turn(seconds, 1)

    asked = {
        LIBRARY: stream,
        OURS: lambda each: Turn(first_token_of(server, body_of(each[0], 2, num_speculative_tokens=0)), 1),
    }
    # Each takes milliseconds.
    turns = take_turns(asked, prompts, 1, given.repetitions if given.quick else 10 * given.repetitions)
    library, ours = (
        1e3 * statistics.median(turn.seconds for turn in turns[name]) for name in (LIBRARY, OURS)
    )
    return {
        "kind": "first token",
        "model": "bundled pair",
        "server": OURS,
        "clients": 1,
        "first_token_ms": round(ours, 2),
        "library_first_token_ms": round(library, 2),
        "extra_ms": round(ours - library, 2),
        **sizes(given),
    }


# What is said


def line_of(row: _Json) -> str:
    head = f"{row['model']}, {row['kind']}"
    if "reason" in row:
        return f"{head}: {row['server']}: {row['reason']}"
    if row["kind"] == "first token":
        return (
            f"{head}: {row['first_token_ms']} ms, the library's {row['library_first_token_ms']} "
            f"({row['extra_ms']:+} ms)"
        )
    line = f"{head}: {row['server']} {row['mode']}, {row['clients']} clients: {row['tokens_per_second']} tokens/s"
    for name, other in (("ratio_to_llama", "llama.cpp's"), ("ratio_to_library", "the library's")):
        line += f", {row[name]} of {other}" if name in row else ""
    return line


def fault_of(row: _Json) -> str | None:
    """Where ours is slower than is promised."""
    if row.get("ratio_to_library", 1.0) < LEAST_THROUGHPUT:
        return f"{row['mode']}: {row['ratio_to_library']} of the library's throughput, not {LEAST_THROUGHPUT}"
    if row.get("extra_ms", 0.0) > MOST_EXTRA_MS:
        return f"the first token comes {row['extra_ms']} ms after the library's, not {MOST_EXTRA_MS}"
    return None


if __name__ == "__main__":
    sys.exit(main())
