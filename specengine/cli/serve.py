"""`specengine serve`: OpenAI's interface over HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED
from specengine.cli.options import takes
from specengine.config import EngineConfig, ModelOptions, field_names
from specengine.errors import SpecEngineError
from specengine.server.options import ServerOptions

_KEY_VARIABLE = "SPECENGINE_API_KEY"


@contextmanager
def needs_serving() -> Iterator[None]:
    """Says how to get what is missing in an installation without the extra `serve`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SpecEngineError(f"serving needs {error.name}: pip install 'specengine[serve]'") from None


@takes(ServerOptions, ModelOptions, EngineConfig)
def serve(options: dict[str, Any]) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It listens at once, and is ready when the model is loaded. SIGTERM and Ctrl-C let running requests finish; a second
    time ends them. Everything that it says goes to stderr.
    """
    given = {name: options.pop(name) for name in field_names(ServerOptions) if name in options}
    given.setdefault("api_key", os.environ.get(_KEY_VARIABLE) or None)
    server_options = ServerOptions(**given)

    from specengine.call import prepare_engine

    call = prepare_engine(options)
    with needs_serving():
        from specengine.server.run import configure_logging
        from specengine.server.run import serve as run
        from specengine.server.service import Service
    from specengine.engine import Engine

    def build() -> Engine:
        return Engine(call.model, call.draft_model, config=call.config, progress=False)

    configure_logging()
    name = options.get("model")
    service = Service(build, server_options, model_name="specengine" if name is None else str(name))
    if run(service):
        raise typer.Exit(EXIT_INTERRUPTED)
