"""The command `specengine`."""

from specengine.cli.commands import app, main

__all__ = ["app", "main"]
