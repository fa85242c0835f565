"""What the site says that is taken from the code when it is built, so that it is never out of date.

In a page of docs/, a line `<!-- commands -->` becomes every command and option of the command line, a line
`<!-- options: SamplingParams -->` the fields of that class, and a line `<!-- example: quickstart -->` that program of
examples/. A picture of docs/figures/ becomes two, for light and dark.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INSERTED = re.compile(r"^<!-- (commands|options|example)(?:: (\w+))? -->$", re.MULTILINE)
DRAWN = re.compile(r"!\[([^\]]*)\]\(figures/([\w-]+)\.svg\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    makers = {"commands": commands, "options": options, "example": example}
    markdown = INSERTED.sub(lambda found: makers[found[1]](*filter(None, [found[2]])), markdown)
    return DRAWN.sub(lambda found: _light_and_dark(found[1], found[2]), markdown)


def _light_and_dark(text: str, name: str) -> str:
    return "\n".join(
        f"![{text}](figures/{name}{ending}.svg#only-{style}){{ .drawn }}"
        for style, ending in (("light", ""), ("dark", "-dark"))
    )


def example(name: str) -> str:
    """A program of examples/, as Markdown."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    return f'```py title="examples/{name}.py"\n{text}```'


# The command line


def commands() -> str:
    """Every command, its arguments and its options, as Markdown."""
    import typer

    from specengine.cli.entry import app

    root = typer.main.get_command(app)
    return "\n\n".join(_command(root, name, command) for name, command in walk(root))


def walk(command: Any, before: str = "specengine") -> Iterator[tuple[str, Any]]:
    """Commands that run something, and their full names."""
    for name, each in command.commands.items():
        if hasattr(each, "commands"):
            yield from walk(each, f"{before} {name}")
        else:
            yield f"{before} {name}", each


def _command(root: Any, name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    own = [parameter for parameter in command.params if parameter.name not in library_names()]
    taken = [parameter for parameter in command.params if parameter.name in library_names()]
    parts = [
        f"### {name.removeprefix('specengine ')}",
        f"```text\n{usage}\n```",
        _escaped(command.help or ""),
        _definitions(own, context),
    ]
    if taken:
        title = f"And {len(taken)} of the library's options"
        parts.append(f'??? abstract "{title}"\n\n' + textwrap.indent(_definitions(taken, context), "    "))
    return "\n\n".join(part for part in parts if part)


def library_names() -> set[str]:
    """Options that come from the library's own declaration."""
    from specengine.config import ChatOptions, EngineConfig, ModelOptions, SamplingParams

    groups = (ModelOptions, SamplingParams, ChatOptions, EngineConfig)
    return {item.name for group in groups for item in fields(group)}


def _definitions(parameters: list[Any], context: Any) -> str:
    return "\n\n".join(_definition(parameter, context) for parameter in parameters)


def _definition(parameter: Any, context: Any) -> str:
    record = parameter.get_help_record(context)
    names, text = record or (parameter.human_readable_name, "")
    names = re.sub(r" <[\w\[\]]+>$", "", names)  # an argument's Python type says nothing to a reader
    return f"`{names}`\n:   {_escaped(' '.join(text.split())) or 'given without a name'}"


# Options of the library


def options(name: str) -> str:
    """The fields of a class of options, as Markdown."""
    from specengine import config

    group = getattr(config, name)
    return "\n\n".join(_option(item, config.declaration(item)) for item in fields(group))


def _option(item: Any, about: Any) -> str:
    range_ = f" ({about.kind.range})" if about.kind.range else ""
    text = "; ".join(part for part in (about.help, about.details) if part)
    also = f" Also understood: {', '.join(f'`{alias}`' for alias in about.aliases)}." if about.aliases else ""
    return f"`{item.name}={item.default!r}`\n:   {_escaped(text)}{range_}.{also}"


def _escaped(text: str) -> str:
    """Text that stands in backticks stays code, the rest is shown as it is."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if index % 2 else re.sub(r"([*_\[\]\\])", r"\\\1", html.escape(piece, quote=False))
        for index, piece in enumerate(pieces)
    )
