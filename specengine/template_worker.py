"""The process in which chat templates run: a program that somebody else wrote, stopped from outside.

`specengine.conversations` starts it and speaks to it in lines of JSON. What a template may use up, the operating system
counts: processor time by a timer whose signal ends the process, even inside a single call into C, and memory by a limit
on the address space. What a template may reach is decided by Jinja's immutable sandbox: nothing of Python's
insides, and nothing that changes a value it was given.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CPU_SECONDS = 1.0
MAX_ADDRESS_SPACE = 512 << 20  # of the whole process; Python and Jinja take a tenth of it
MAX_RENDERED_LENGTH = 16 << 20  # characters


class _Generation(Extension):
    """`{% generation %}` marks for training what the assistant says; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set inside does not leave it.
        return nodes.CallBlock(self.call_method("_call"), [], [], body).set_lineno(line)

    def _call(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own makes its text safe for HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _build_environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders its templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_environment = _build_environment()


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _environment.from_string(source)


def _render(source: str, values: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in _compile(source).generate(**values):
        length += len(piece)
        if length > MAX_RENDERED_LENGTH:
            raise ValueError(f"writes more than {MAX_RENDERED_LENGTH} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(line: bytes) -> dict[str, str]:
    """The rendered text, or what is wrong. values: null only checks the template's syntax."""
    request = json.loads(line)
    try:
        if request["values"] is None:
            _compile(request["source"])
            return {"text": ""}
        return {"text": _render(request["source"], request["values"])}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is no valid template (line {error.lineno}: {error.message})"}
    except SecurityError as error:
        return {"error": f"does what is not allowed ({error})"}
    except jinja2.TemplateError as error:
        return {"error": f"refuses: {error}" if type(error) is jinja2.TemplateError else f"failed: {error}"}
    except MemoryError:
        raise
    except RecursionError:
        return {"error": "calls itself too deeply, or is nested too deeply"}
    except Exception as error:  # whatever a program may raise
        return {"error": f"failed: {type(error).__name__}: {error}"[:500]}


def serve() -> None:
    """Answers line by line until stdin ends. Out of time it dies of SIGPROF; out of memory it says so, and ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
        try:
            reply = json.dumps(_answer(line)).encode()
        except MemoryError:
            reply = b'{"memory": ""}'
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
        if reply == b'{"memory": ""}':
            return
