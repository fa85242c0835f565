"""The command `specengine`: its commands, and how a process runs one of them."""

from __future__ import annotations

import io
import sys
import warnings
from importlib import import_module
from typing import Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED, EXIT_USAGE, complain, with_exit_codes

# Adding a command: a file of its name here with a function of its name in it, and a line. A command with commands of
# its own is a `typer.Typer` of its name.
COMMANDS = (
    "generate",
    "chat",
    "serve",
    "run-batch",
    "profile",
    "bench",
    "report",
    "verify",
    "tune",
    "models",
    "fetch",
    "collect-env",
)
# The base of typer's usage errors, whether the installed typer carries its own click or not.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="specengine",
    help="Exact speculative decoding: faster generation, the same bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _add(name: str) -> None:
    identifier = name.replace("-", "_")
    command = getattr(import_module(f"specengine.cli.{identifier}"), identifier)
    if not isinstance(command, typer.Typer):
        app.command(name)(with_exit_codes(command))
        return
    for each in command.registered_commands:
        assert each.callback is not None, "it decorates a function"
        each.callback = with_exit_codes(each.callback)
    app.add_typer(command, name=name)


for _name in COMMANDS:
    _add(_name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="specengine", standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            complain(error.format_message())
        code = EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    complain(f"warning: {message}")
