"""How this project's docstrings become Markdown: an extension of griffe, which reads them for the site.

A docstring here lists names, each followed by a colon, with further lines indented:

    model:  a directory
    seed:   same seed, same text
            by default one is drawn

which Markdown would run together. It becomes a list of definitions; everything else is Markdown already.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ENTRY = re.compile(r"^((?:\w+)(?:, \w+)*)(?::\s+|:$|\s{2,})(.*)$")


class HouseStyle(Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring with its lists of names as definition lists."""
    result: list[str] = []
    paragraphs = re.split(r"\n{2,}", text)
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        is_list = bool(lines) and all(ENTRY.match(line) or line.startswith(" ") for line in lines)
        result.append(_definitions(lines) if is_list and ENTRY.match(lines[0]) else _guarded(paragraph))
    return "\n\n".join(result)


def _definitions(lines: list[str]) -> str:
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        found = ENTRY.match(line)
        if found:
            entries.append((found[1], [found[2] or ""]))
        else:
            entries[-1][1].append(line.strip())
    return "\n\n".join(
        f"`{name}`\n:   {_guarded(' '.join(part for part in parts if part))}" for name, parts in entries
    )


def _guarded(text: str) -> str:
    """Brackets, stars and lines are meant as they stand; code (indented or in backticks) is left alone."""
    if text.startswith("    "):
        return text
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if index % 2 else re.sub(r"([*\[\]<])", r"\\\1", piece) for index, piece in enumerate(pieces)
    )
