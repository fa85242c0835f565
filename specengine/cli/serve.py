"""`specengine serve`: OpenAI's interface over HTTP."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED
from specengine.cli.options import takes
from specengine.cli.serving import RayAddress, UsesRay, check_ray, needs
from specengine.config import EngineConfig, ModelOptions, field_names
from specengine.server.options import ServerOptions

_KEY_VARIABLE = "SPECENGINE_API_KEY"


@takes(ServerOptions, ModelOptions, EngineConfig)
def serve(
    options: dict[str, Any],
    ray: UsesRay = False,
    ray_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="engines; by default one for each GPU, else for each machine (with --ray)"),
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It listens at once, and is ready when the model is loaded. SIGTERM and Ctrl-C let running requests finish; a second
    time ends them. Everything that it says goes to stderr.

    With --ray replicas on a Ray cluster answer, which may be many machines; this process listens for them.
    """
    check_ray(ray, ray_replicas=ray_replicas, ray_address=ray_address)
    given = {name: options.pop(name) for name in field_names(ServerOptions) if name in options}
    given.setdefault("api_key", os.environ.get(_KEY_VARIABLE) or None)
    server_options = ServerOptions(**given)

    with needs("serve", what="serving"):
        from specengine.server.build import build_service
        from specengine.server.run import configure_logging
        from specengine.server.run import serve as run

    if not ray:
        service = build_service(options, server_options)
        configure_logging()
        was_forced = run(service)
    else:
        with needs("ray", what="--ray"):
            from specengine.server.ray_cluster import joined
            from specengine.server.ray_serve import Replicas, build_front

        replicas = Replicas(options, server_options, num_replicas=ray_replicas)
        configure_logging()
        with joined(ray_address):
            was_forced = run(replicas, build_front(replicas))
    if was_forced:
        raise typer.Exit(EXIT_INTERRUPTED)
