"""How a command ends: exit codes, and one line on stderr for what went wrong.

0 success, 1 a model or the machine failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import typer

from specengine.errors import SpecEngineError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., Any])


def complain(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"specengine: {message}\n")


def with_exit_codes(command: Command) -> Command:
    """Turns what a user can cause into one line on stderr and an exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _end_interrupted_text()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has what it wanted; the interpreter must not find the closed pipe at its own exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (SpecEngineError, OSError, MemoryError) as error:
            _fail(error, EXIT_FAILURE)
        except ValueError as error:
            _fail(error, EXIT_USAGE)

    return cast(Command, run)


def _fail(error: BaseException, code: int) -> None:
    sys.stdout.flush()
    complain(str(error) or type(error).__name__)
    raise typer.Exit(code) from None


def _end_interrupted_text() -> None:
    if sys.stdout.isatty():
        from specengine.cli.terminal import RESET

        sys.stdout.write(f"{RESET}\n")
    sys.stdout.flush()
