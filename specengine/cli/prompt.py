"""The prompt of a command: an argument, or a text on stdin."""

from __future__ import annotations

import sys


def read_prompt(argument: str | None, option: str | None = None) -> str:
    """The one that was given, as it is; `-` means stdin, read as a text file is."""
    if argument is not None and option is not None:
        raise ValueError(f"give the prompt once, as PROMPT or with --prompt; got {argument!r} and {option!r}")
    prompt = argument if option is None else option
    if prompt is None:
        raise ValueError(
            "a prompt is missing: give PROMPT, --prompt TEXT, or --prompt - to read it from stdin"
        )
    return _read_stdin() if prompt == "-" else prompt


def _read_stdin() -> str:
    """A text file's text: without a byte order mark, lines ended by a newline, without the last line's."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")
