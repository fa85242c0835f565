"""Writes specengine/option_types.py: the options as editors and type checkers read them. `make format` runs it.

The options themselves are declared in specengine/config.py.
"""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from specengine.config import ChatOptions, EngineConfig, ModelOptions, SamplingParams, declaration
from specengine.names import ALIASES, DO_SAMPLE

TARGET = Path(__file__).resolve().parent.parent / "specengine" / "option_types.py"
HEAD = '''"""What editors and type checkers read of the options in config.py. Written by tools/option_types.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict
'''
TAIL = '''

class CallOptions(ModelNames, SamplingOptions, EngineOptions, total=False):
    """The options of a call that loads what it needs."""


class ChatSamplingOptions(SamplingOptions, ChatNames, total=False):
    """The options of a conversation."""


class ChatCallOptions(CallOptions, ChatNames, total=False):
    """The options of a conversation whose call loads what it needs."""
'''


def accepted(item: Field[Any]) -> str:
    return declaration(item).kind.accepts or str(item.type)


def described(name: str, kind: str, text: str) -> str:
    return f'    {name}: {kind}\n    """{text}."""'


def group(name: str, cls: type, title: str) -> str:
    options = {item.name: item for item in fields(cls)}
    lines = [f'\n\nclass {name}(TypedDict, total=False):\n    """{title}"""\n']
    lines += [
        described(item.name, accepted(item), f"{declaration(item).help}. Default: {item.default!r}")
        for item in options.values()
    ]
    lines += [
        described(alias, accepted(options[main]), f"the same as {main}")
        for alias, main in ALIASES.items()
        if main in options
    ]
    if "temperature" in options:
        lines.append(
            described(DO_SAMPLE, "bool | None", "True alone means temperature 1, False greedy decoding")
        )
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole file."""
    return "".join(
        [
            HEAD,
            group("ModelNames", ModelOptions, "What generates."),
            group("SamplingOptions", SamplingParams, "The fields of `SamplingParams`."),
            group("EngineOptions", EngineConfig, "The fields of `EngineConfig`."),
            group("ChatNames", ChatOptions, "The fields of `ChatOptions`."),
            TAIL,
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
