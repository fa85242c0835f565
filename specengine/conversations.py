"""Conversations: messages checked, written out by a model's own template, and sampled as its makers advise.

A template is a program in Jinja's language that comes with a model. It runs in Jinja's immutable sandbox, in a process
of its own (`specengine.template_worker`), which is ended when it takes too long or too much memory.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from specengine.config import ChatOptions, SamplingParams, declaration
from specengine.errors import ChatTemplateError, ModelLoadError
from specengine.json_file import shorten
from specengine.kinds import check_text
from specengine.prompt import Rendered

MAX_TEMPLATE_LENGTH = 1 << 20  # characters
MAX_CONVERSATION_LENGTH = 16 << 20  # characters as JSON
# The worker counts its own processor time. This is for a machine that gives it none.
_PATIENCE_SECONDS = 30.0
_GRACE_SECONDS = 0.5
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_ALWAYS = ("repetition_penalty", "max_new_tokens")

Message = Mapping[str, Any]
Conversation = Sequence[Message]


# Messages


def check_conversations(messages: object) -> tuple[list[list[dict[str, Any]]], bool]:
    """The conversations as lists of dicts, and whether a single one was given.

    A conversation is a list of messages, each a mapping with the texts "role" and "content"; what else a message holds
    is for the template, and must be JSON. Several conversations are a list of these.

    Raises `TypeError` and `ValueError` that name the place.
    """
    if not _is_list(messages) or not messages:
        _refuse("messages", messages, "a list of messages, or a list of such lists")
    assert isinstance(messages, Sequence)
    if isinstance(messages[0], Mapping):
        return [_check_conversation("messages", messages)], True
    return [_check_conversation(f"messages[{i}]", each) for i, each in enumerate(messages)], False


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _refuse(name: str, value: object, expected: str) -> None:
    kind = ValueError if _is_list(value) else TypeError
    raise kind(f"{name} must be {expected}, got {shorten(value)}")


def _check_conversation(name: str, conversation: object) -> list[dict[str, Any]]:
    if not _is_list(conversation) or not conversation:
        _refuse(name, conversation, "a list of messages")
    assert isinstance(conversation, Sequence)
    checked = [_check_message(f"{name}[{place}]", message) for place, message in enumerate(conversation)]
    try:
        length = len(json.dumps(checked, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold what JSON can: {error}") from None
    if length > MAX_CONVERSATION_LENGTH:
        raise ValueError(f"{name} must be below {MAX_CONVERSATION_LENGTH} characters as JSON, got {length}")
    return checked


def _check_message(name: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f'{name} must be a mapping with "role" and "content", got {shorten(message)}')
    for key in message:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have texts as keys, got {shorten(key)}")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{name} has no {key!r}, got {shorten(dict(message))}")
        if not isinstance(message[key], str):
            raise TypeError(f"{name}[{key!r}] must be a string, got {shorten(message[key])}")
        check_text(f"{name}[{key!r}]", message[key])
    if not message["role"]:
        raise ValueError(f"{name}['role'] must not be empty, got ''")
    return dict(message)


# Templates


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it is told besides the messages.

    source:         in Jinja's language
    where:          whose it is, for messages
    special_tokens: texts by role: bos_token, eos_token and so on
    """

    source: str
    where: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Conversation, *, add_generation_prompt: bool = True) -> Rendered:
        """The conversation as the model reads it, up to where its answer begins.

        What stands in a message is written as it is: a special token spelled out in it becomes that token, as in
        transformers.

        Raises `ChatTemplateError` where the template refuses the messages, is malformed, or uses up too much.
        """
        return Rendered(
            self._ask(
                {
                    "messages": list(messages),
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self.special_tokens,
                }
            )
        )

    def check_syntax(self) -> None:
        """Raises `ChatTemplateError` for what is no template."""
        self._ask(None)

    def _ask(self, values: dict[str, Any] | None) -> str:
        if len(self.source) > MAX_TEMPLATE_LENGTH:
            problem = f"has {len(self.source)} characters, more than {MAX_TEMPLATE_LENGTH}"
            raise ChatTemplateError(f"{self.where}: the chat template {problem}")
        request = json.dumps({"source": self.source, "values": values})
        reply = _worker.ask(request.encode() + b"\n")
        if "error" in reply:
            raise ChatTemplateError(f"{self.where}: the chat template {reply['error']}")
        return reply["text"]


def read_template_option(value: str) -> str:
    """The template that an option gives: itself, or the file that holds it. Every template has a brace."""
    if "{" in value:
        return value
    try:
        with Path(value).expanduser().open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_LENGTH + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: {value} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"chat_template: {value}: {error.strerror}") from None


def given_template(options: ChatOptions) -> ChatTemplate | None:
    """The template of the option, checked; None where it leaves the model its own."""
    if options.chat_template is None:
        return None
    template = ChatTemplate(read_template_option(options.chat_template), "chat_template")
    template.check_syntax()
    return template


class _Worker:
    """The process that renders, started when it is first needed and again after it was ended. One at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        """Its reply, or as an "error" what it died of."""
        with self._lock:
            process = self._process or self._start()
            try:
                line = _exchange(process, request)
            except BaseException:  # a reply that nobody read would be taken for the next one's
                self._end()
                raise
            if line is not None and line.endswith(b"\n") and b'"memory"' not in line[:10]:
                reply: dict[str, str] = json.loads(line)
                return reply
            code = self._end()
            if line is None:
                return {"error": "takes too long"}
            if line.endswith(b"\n"):
                return {"error": "takes too much memory"}
            if code == -signal.SIGPROF:  # its own timer's
                return {"error": "takes too long"}
            return {"error": f"could not be rendered: its process ended (exit code {code})"}

    def forget(self) -> None:
        """For a forked process: the worker is its parent's."""
        self.__init__()  # type: ignore[misc]

    def _start(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise ChatTemplateError("chat templates run in a Python process, and sys.executable names none")
        code = "import sys; sys.path[:] = sys.argv[1:]; from specengine.template_worker import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process
        )
        return self._process

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None, "it was started"
        assert process.stdin is not None, "it is a pipe"
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # whose pipe is closed is gone in a moment
            process.wait(_GRACE_SECONDS)
        process.kill()
        assert process.stdout is not None, "it is a pipe"
        process.stdout.close()
        return process.wait()


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes | None:
    """The line that answers; not a whole one where the process ended, None where time was over."""
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    pieces = [b""]
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while not pieces[-1].endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            return None
        piece = os.read(process.stdout.fileno(), 1 << 20)
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces)


_worker = _Worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)


# Sampling


def advised_sampling(
    generation: Mapping[str, Any], given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """What a model's `generation_config.json` says of the sampling options that a caller left open.

    As transformers reads it: `temperature`, `top_k`, `top_p` and `min_p` count only with `do_sample: true`, where the
    temperature is 1 unless the file has another. What would change nothing is left out.

    generation: the file's content, unchecked
    given:      the options that the caller gave; a temperature of 0 among them turns the filters off

    Raises `ModelLoadError` for a value that cannot be.
    """
    is_sampled = generation.get("do_sample") is True
    names = (*(_SAMPLED if is_sampled else ()), *_ALWAYS)
    values = {name: generation[name] for name in names if generation.get(name) is not None}
    if is_sampled:
        values.setdefault("temperature", 1.0)
    options = {item.name: item for item in fields(SamplingParams)}
    advised = {}
    for name, value in values.items():
        try:
            checked = declaration(options[name]).kind.check(name, value)
        except (TypeError, ValueError) as error:
            raise ModelLoadError(
                f"{where}: generation_config.json: {error}; generation_config=False (--no-generation-config) "
                "leaves the file aside"
            ) from None
        if name not in given and checked != options[name].default:
            advised[name] = checked
    if {**advised, **given}.get("temperature", 0.0) == 0.0:
        advised = {name: value for name, value in advised.items() if name not in _SAMPLED}
    return advised
