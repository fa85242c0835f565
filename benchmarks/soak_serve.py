"""A server under twice the load that it can take, for as long as one likes: nothing may break, leak or change.

    python benchmarks/soak_serve.py                                      # 100 clients, ten minutes, the bundled pair
    python benchmarks/soak_serve.py --seconds 60 --clients 40 --results benchmarks/results/serve_epyc.jsonl

`specengine serve` runs as a process of its own with room for half of the clients; each client asks again and again,
waits when it is told to (429), leaves early now and then in the middle of a stream, and now and then sends what is no
request. Before that, first tokens are timed with and without a thousand connections that say nothing.

At the end: no answer was 5xx, every request that was taken was finished or left by its client, the server
holds as many files and blocks as at the start, its memory stopped growing, a sample of the texts is the library's, and
of a hundred first tokens the slowest but one was not half as slow again beside idle connections.

Exits with 1 if any of that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from measure import append_rows

from specengine import Engine, bundled

# Shares of what clients do.
LEAVING, MALFORMED, STREAMED = 0.10, 0.05, 0.5
# Every so many texts are kept, to be compared.
SAMPLED = 20
MALFORMED_BODIES: tuple[Any, ...] = (
    {"prompt": "x", "n": 10**6},
    {"prompt": []},
    {"prompt": [-1]},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "nonsense": 1},
    {"prompt": "x" * 100_000},
    ["no", "object"],
    {"prompt": "x", "logit_bias": {"a": 1}},
)
STARTUP_SECONDS = 120.0
MOST_SLOPE = 1.0  # MiB for each 10,000 requests
# Connections that say nothing, how often first tokens are timed with and without them in turn, and how many each time.
NUM_IDLE, NUM_TURNS, NUM_TIMED = 1000, 4, 50
MOST_IDLE_COST = 1.5  # 99th percentile of first tokens, beside them and alone


@dataclass
class Tally:
    """What clients saw. samples: (body, text)"""

    statuses: Counter[int] = field(default_factory=Counter)
    finished: int = 0
    left: int = 0
    unfinished: list[str] = field(default_factory=list)
    num_tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    samples: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return self.statuses.total()


class Server:
    """The process."""

    def __init__(self, given: argparse.Namespace) -> None:
        room = max(2, given.clients // 2)
        running = min(given.max_num_seqs, room - 1)
        command = [sys.executable, "-m", "specengine", "serve", "--port", "0", "--max-num-seqs", str(running)]
        command += ["--max-queued-requests", str(room - running), "--num-blocks", str(given.num_blocks)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = None
        while found is None:
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit("the server ended before it listened")
            found = re.search(r"listening on (http://\S+)", line)
        self.url = found[1]
        # What it says is read and forgotten: a full pipe would stop it.
        self._reader = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    @property
    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.wait(10)
        return status


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


def build_body(random_: random.Random) -> dict[str, Any]:
    words = ["def", "class", "import", "for", "return", "self", "x", "data", "if", "not"]
    return {
        "prompt": " ".join(random_.choices(words, k=random_.randint(1, 30))),
        "max_tokens": random_.randint(1, 48),
        "temperature": random_.choice([0, 0, 0.8]),
        "seed": random_.randrange(2**31),
        "num_speculative_tokens": random_.choice([0, 2, 4, "auto"]),
    }


async def ask_forever(client: httpx.AsyncClient, tally: Tally, seed: int, deadline: float) -> None:
    """One client."""
    random_ = random.Random(seed)
    while time.monotonic() < deadline:
        kind = random_.random()
        try:
            if kind < MALFORMED:
                answer = await client.post("/v1/completions", json=random_.choice(MALFORMED_BODIES))
                tally.statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(wait_of(answer, random_))
                elif not 400 <= answer.status_code < 500:
                    tally.unfinished.append(f"malformed, answered with {answer.status_code}")
                continue
            body = build_body(random_)
            leaves = kind < MALFORMED + LEAVING
            if leaves or random_.random() < STREAMED:
                await stream(client, tally, body, random_, leaves=leaves)
            else:
                answer = await client.post("/v1/completions", json=body)
                tally.statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(wait_of(answer, random_))
                elif answer.status_code == 200:
                    note(tally, body, answer.json()["choices"][0]["text"], answer.json()["usage"])
                else:
                    tally.unfinished.append(answer.text[:200])
        except httpx.HTTPError as error:
            tally.unfinished.append(f"{type(error).__name__}: {error}")


async def stream(
    client: httpx.AsyncClient, tally: Tally, body: dict[str, Any], random_: random.Random, *, leaves: bool
) -> None:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began, num_events, text, usage = time.monotonic(), 0, "", None
    leaves_after = random_.randint(0, 4)
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        tally.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            await answer.aread()
            await asyncio.sleep(wait_of(answer, random_))
            return
        if answer.status_code != 200:
            tally.unfinished.append((await answer.aread())[:200].decode())
            return
        async for line in answer.aiter_lines():
            if leaves and num_events >= leaves_after:
                tally.left += 1
                return
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                break
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                tally.unfinished.append(str(event["error"]))
                return
            if num_events == 0:
                tally.first_token.append(time.monotonic() - began)
            num_events += 1
            usage = event.get("usage") or usage
            text += "".join(choice["text"] for choice in event["choices"])
        else:
            tally.unfinished.append("a stream without an end")
            return
    note(tally, body, text, usage or {"completion_tokens": 0})


def wait_of(answer: httpx.Response, random_: random.Random) -> float:
    """What Retry-After says, at most a second: clients here are impatient."""
    return random_.uniform(0.5, 1.0) * min(1.0, float(answer.headers["Retry-After"]))


def note(tally: Tally, body: dict[str, Any], text: str, usage: dict[str, Any]) -> None:
    tally.finished += 1
    tally.num_tokens += usage["completion_tokens"]
    if tally.finished % SAMPLED == 0:
        tally.samples.append((body, text))


async def soak(server: Server, given: argparse.Namespace) -> tuple[Tally, dict[str, Any]]:
    """What clients saw, and what the server holds before and after."""
    limits = httpx.Limits(max_connections=given.clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=300.0, limits=limits) as client:

        async def is_ready() -> bool:
            return (await client.get("/ready")).status_code == 200

        if not await until(is_ready, STARTUP_SECONDS):
            raise SystemExit("the server was not ready in time")
        # Each way once, so that what is made on first use is there.
        for k in (0, 4):
            await client.post("/v1/completions", json={"prompt": "x", "num_speculative_tokens": k})
        idle = await time_beside_idle(server, client)
        held = {
            "first_token_p99_ms": idle,
            "files": server.num_files,
            "blocks": await read_metric(client, "kv_cache_usage_perc"),
        }
        tally = Tally()
        deadline = time.monotonic() + given.seconds

        async def watch() -> None:
            while time.monotonic() < deadline:
                tally.memory.append((tally.num_requests, server.resident_mib))
                left = max(0.0, deadline - time.monotonic())
                print(
                    f"\r{left:5.0f} s left, {tally.num_requests} requests, {tally.finished} finished, "
                    f"{tally.memory[-1][1]:.0f} MiB",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                await asyncio.sleep(min(2.0, given.seconds / 20))

        clients = (ask_forever(client, tally, seed, deadline) for seed in range(given.clients))
        await asyncio.gather(watch(), *clients)
        print(file=sys.stderr)

        async def is_idle() -> bool:
            names = ("num_requests_running", "num_requests_waiting")
            return not any([await read_metric(client, name) for name in names])

        held["is_idle"] = await until(is_idle, 10.0)
        held["blocks_after"] = await read_metric(client, "kv_cache_usage_perc")
    await asyncio.sleep(1.0)  # connections that were closed
    held["files_after"] = server.num_files
    return tally, held


async def time_beside_idle(server: Server, client: httpx.AsyncClient) -> dict[str, float]:
    """Milliseconds, 99th percentiles of first tokens: alone, and beside connections that say little or nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    took: dict[str, list[float]] = {"alone": [], "beside": []}

    async def time_first_tokens(times: list[float]) -> None:
        for _ in range(NUM_TIMED):
            began = time.monotonic()
            (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).raise_for_status()
            times.append(time.monotonic() - began)

    async def speak_slowly(writer: asyncio.StreamWriter) -> None:
        for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"x" * 60:
            writer.write(bytes([byte]))
            await asyncio.sleep(1.0)

    for _ in range(NUM_TURNS):
        await time_first_tokens(took["alone"])
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(NUM_IDLE)]
        speaking = asyncio.create_task(speak_slowly(idle[0][1]))
        await time_first_tokens(took["beside"])
        speaking.cancel()
        for _, writer in idle:
            writer.close()
    await asyncio.sleep(1.0)  # connections that were closed
    return {name: round(1e3 * statistics.quantiles(times, n=100)[98], 1) for name, times in took.items()}


async def read_metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"specengine:{name}{{"))


def slope_mib(memory: list[tuple[int, float]]) -> float:
    """MiB for each 10,000 requests, of the last two thirds: caches fill in the first."""
    rest = memory[len(memory) // 3 :]
    if len({count for count, _ in rest}) < 2:
        return 0.0
    return 1e4 * statistics.linear_regression(*zip(*rest, strict=True)).slope


def count_wrong_texts(samples: list[tuple[dict[str, Any], str]]) -> int:
    with Engine(bundled.target_path(), bundled.draft_path()) as engine:
        wrong = 0
        for body, text in samples:
            options = {key: value for key, value in body.items() if key not in ("prompt", "max_tokens")}
            result = engine.generate(body["prompt"], max_new_tokens=body["max_tokens"], **options)
            wrong += result.text != text
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--max-num-seqs", type=int, default=16, help="sequences that run at the same time")
    parser.add_argument(
        "--num-blocks",
        type=int,
        default=512,
        help="KV blocks: the memory of each is the process's from its first use on, so that few are full soon",
    )
    parser.add_argument("--results", type=Path, help="append a row to this file")
    given = parser.parse_args()
    if given.clients < 4 or given.seconds <= 0 or given.max_num_seqs < 1:
        parser.error("at least 4 clients, 1 sequence, and some seconds")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    server = Server(given)
    try:
        tally, held = asyncio.run(soak(server, given))
        exit_status = server.end()
    finally:
        server.process.kill()
    num_wrong = count_wrong_texts(tally.samples)
    slope = slope_mib(tally.memory)
    row = {
        "kind": "soak",
        "seconds": given.seconds,
        "clients": given.clients,
        "num_requests": tally.num_requests,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "finished": tally.finished,
        "left_early": tally.left,
        "tokens_per_second": round(tally.num_tokens / given.seconds, 1),
        "first_token_median_ms": round(1e3 * statistics.median(tally.first_token or [0.0]), 1),
        "mib_per_10000_requests": round(slope, 2),
        "resident_mib": [round(tally.memory[0][1]), round(tally.memory[-1][1])],
        **held,
        "num_compared": len(tally.samples),
        "num_wrong_texts": num_wrong,
        "unfinished": len(tally.unfinished),
        "exit_status": exit_status,
    }
    for name, value in row.items():
        print(f"{name:24} {value}")
    faults = [
        *(f"status {status}" for status in tally.statuses if status >= 500),
        *tally.unfinished[:10],
        *([] if held["files_after"] <= held["files"] else ["files are left open"]),
        *([] if held["is_idle"] and held["blocks_after"] == held["blocks"] else ["blocks are left"]),
        *([] if slope <= MOST_SLOPE else ["memory grows"]),
        *(
            []
            if held["first_token_p99_ms"]["beside"] <= MOST_IDLE_COST * held["first_token_p99_ms"]["alone"]
            else ["idle connections slow others"]
        ),
        *([] if num_wrong == 0 and tally.samples else ["texts are not the library's"]),
        *([] if exit_status == 0 else [f"the server ended with {exit_status}"]),
    ]
    for fault in faults:
        print(f"FAULT: {fault}")
    if given.results is not None:
        append_rows([row], given.results)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
