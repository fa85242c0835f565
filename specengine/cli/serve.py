"""`specengine serve`: OpenAI's interface over HTTP."""

from __future__ import annotations

import os
from typing import Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED
from specengine.cli.options import takes
from specengine.cli.serving import needs
from specengine.config import EngineConfig, ModelOptions, field_names
from specengine.server.options import ServerOptions

_KEY_VARIABLE = "SPECENGINE_API_KEY"


@takes(ServerOptions, ModelOptions, EngineConfig)
def serve(options: dict[str, Any]) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It listens at once, and is ready when the model is loaded. SIGTERM and Ctrl-C let running requests finish; a second
    time ends them. Everything that it says goes to stderr.
    """
    given = {name: options.pop(name) for name in field_names(ServerOptions) if name in options}
    given.setdefault("api_key", os.environ.get(_KEY_VARIABLE) or None)
    server_options = ServerOptions(**given)

    with needs("serve", what="serving"):
        from specengine.server.build import build_service
        from specengine.server.run import configure_logging
        from specengine.server.run import serve as run

    service = build_service(options, server_options)
    configure_logging()
    if run(service):
        raise typer.Exit(EXIT_INTERRUPTED)
