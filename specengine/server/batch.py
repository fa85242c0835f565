"""Files of requests in OpenAI's batch format, answered in order.

A line of the input is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}, a line of the
output {"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": …}, "error": null}.

Lines are written in the input's order and each once, so that an output that was cut off anywhere is a beginning: who
runs again goes on behind it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from anyio.from_thread import start_blocking_portal
from pydantic import ValidationError

from specengine.errors import SpecEngineError
from specengine.json_file import shorten
from specengine.server.answers import Writer
from specengine.server.build import load
from specengine.server.endpoints import ENDPOINTS
from specengine.server.errors import ApiError, explain_invalid
from specengine.server.service import Service

_Json = dict[str, Any]
Answers = Callable[[Iterable[tuple[int, bytes]]], Iterator[_Json]]
_MAX_SEED = 2**63


class BatchError(SpecEngineError):
    """A file of requests, or of answers, that is none."""


def read_ids(path: Path) -> list[str]:
    """The `custom_id` of every line. Raises `BatchError` naming the first line that is no request."""
    ids: dict[str, int] = {}
    for number, line in read_lines(path):
        ids_before = len(ids)
        custom_id = _read_request(line, f"{path}, line {number}")["custom_id"]
        ids.setdefault(custom_id, number)
        if len(ids) == ids_before:
            raise BatchError(
                f"{path}, line {number}: {shorten(custom_id)} is line {ids[custom_id]}'s custom_id"
            )
    return list(ids)


def count_answered(output: IO[bytes], ids: list[str], path: Path) -> int:
    """How many of the requests have their line, from the first on; what is left of a line that was cut off is removed.

    Raises `BatchError` where the lines are not those of these requests.
    """
    count = end = 0
    for line in output:
        if not line.endswith(b"\n"):
            break
        if count == len(ids) or (_object_of(line) or {}).get("custom_id") != ids[count]:
            raise BatchError(
                f"{path}, line {count + 1}: not an answer to this input; remove it, or name another output"
            )
        count, end = count + 1, end + len(line)
    output.truncate(end)
    output.seek(end)
    return count


@contextmanager
def open_output(path: Path) -> Iterator[IO[bytes]]:
    """For reading and for appending, by one process at a time."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{path}: another process is writing it") from None
        yield output


@contextmanager
def answering(service: Service, *, seed: int) -> Iterator[Answers]:
    """Loads the service, on an event loop in a thread of its own, and gives what answers lines there: they are given
    with their numbers, and come as what is written for them, in their order, each as soon as its turn comes.

    seed: of it and its `custom_id` a request that names no seed gets one: run again, alone or elsewhere, it gives the
          same text

    Raises why the engine could not be made.
    """
    with start_blocking_portal() as portal:
        try:
            portal.call(load, service)
            # So many are begun ahead of the one whose turn it is: enough to keep every place taken.
            num_ahead = 2 * service.engine.config.max_batch_size

            def answers(requests: Iterable[tuple[int, bytes]]) -> Iterator[_Json]:
                begun: deque[Future[_Json]] = deque()
                for number, line in requests:
                    begun.append(portal.start_task_soon(_answer_line, service, line, f"batch-{number}", seed))
                    if len(begun) == num_ahead:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()

            yield answers
        finally:
            service.stop()


def write_answers(
    answers: Iterable[_Json],
    output: IO[bytes],
    *,
    num_before: int,
    num_requests: int,
    on_progress: Callable[[int, int], object],
) -> int:
    """Each in a line of its own, there as soon as it is known. Returns how many of them are errors.

    num_before: lines that are there already
    """
    num_failed = 0
    on_progress(num_before, num_requests)
    for num_done, answer in enumerate(answers, start=num_before + 1):
        num_failed += answer["response"]["status_code"] != 200
        output.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        output.flush()
        on_progress(num_done, num_requests)
    return num_failed


async def _answer_line(service: Service, line: bytes, name: str, seed: int) -> _Json:
    request = _read_request(line, name)
    try:
        status, body = 200, await answer(service, request["url"], _with_seed(request, seed))
    except ApiError as error:
        status, body = error.status, error.body
    response = {"status_code": status, "request_id": name, "body": body}
    return {"id": name, "custom_id": request["custom_id"], "response": response, "error": None}


async def answer(service: Service, url: str, body: _Json) -> _Json:
    """The whole answer to a request's body, once there is room for it. Raises `ApiError`."""
    endpoint = ENDPOINTS[url]
    try:
        parsed = endpoint.body.model_validate(body)
    except ValidationError as error:
        raise explain_invalid(error.errors()[0]) from None
    service.check_model(parsed.model)
    visit = await service.wait_for(endpoint.num_prompts(parsed), parsed.n, timeout=parsed.timeout)
    try:
        writer: Writer = await endpoint.begin(service, visit, parsed)
        return writer.whole(await visit.results())
    finally:
        visit.close()


def _with_seed(request: _Json, seed: int) -> Any:
    body = request["body"]
    if not isinstance(body, dict) or body.get("seed") is not None:
        return body
    digest = hashlib.sha256(f"{seed}\n{request['custom_id']}".encode()).digest()
    return {**body, "seed": int.from_bytes(digest[:8], "little") % _MAX_SEED}


def read_lines(path: Path, skip: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers, all but the first `skip` of them."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            yield number, line


def _read_request(line: bytes, where: str) -> _Json:
    request = _object_of(line)
    if request is None:
        text = line.decode(errors="replace").strip()
        raise BatchError(f"{where}: expected a JSON object, got {shorten(text)}")
    custom_id, method, url = (request.get(name) for name in ("custom_id", "method", "url"))
    if not isinstance(custom_id, str):
        raise BatchError(f"{where}: custom_id must be a string, got {shorten(custom_id)}")
    if method != "POST":
        raise BatchError(f"{where}: method must be 'POST', got {shorten(method)}")
    if url not in ENDPOINTS:
        raise BatchError(f"{where}: url must be one of {', '.join(ENDPOINTS)}, got {shorten(url)}")
    if not isinstance(request.get("body"), dict):
        raise BatchError(f"{where}: body must be an object, got {shorten(request.get('body'))}")
    return request


def _object_of(line: bytes) -> _Json | None:
    """None where it is no object."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
