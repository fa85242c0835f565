"""The command `specengine`."""

from specengine.cli.entry import app, main

__all__ = ["app", "main"]
