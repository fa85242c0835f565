"""`specengine run-batch`: a file of requests in OpenAI's batch format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specengine.cli.exits import complain
from specengine.cli.options import takes
from specengine.cli.serving import RayAddress, UsesRay, check_ray, needs
from specengine.config import EngineConfig, ModelOptions
from specengine.progress import progress_bar
from specengine.server.options import ServerOptions

_MAX_SECONDS = 86400.0  # a line may wait and run that long


@takes(ModelOptions, EngineConfig)
def run_batch(
    options: dict[str, Any],
    requests: Annotated[Path, typer.Argument(metavar="IN", help="requests, one JSON object a line")],
    answers: Annotated[Path, typer.Argument(metavar="OUT", help="answers, in the same order")],
    seed: Annotated[
        int, typer.Option(help="what the seeds of requests that name none are made of, with their custom_id")
    ] = 0,
    ray: UsesRay = False,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="engines; by default one for each GPU, else for each machine (with --ray)"),
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Answers are written in order, each once. Run again, whatever ended the last run, it goes on where OUT ends. A
    request that cannot be answered has an error as its answer.

    With --ray the engines are actors of a Ray cluster, which may be many machines. Texts are the same.
    """
    check_ray(ray, ray_workers=ray_workers, ray_address=ray_address)
    with needs("serve", what="serving"):
        from specengine.server.batch import (
            answering,
            count_answered,
            open_output,
            read_ids,
            read_lines,
            write_answers,
        )
        from specengine.server.build import build_service

    server_options = ServerOptions(request_timeout=_MAX_SECONDS)
    if ray:
        with needs("ray", what="--ray"):
            from specengine.server.ray_batch import answering_on_ray

        begun = answering_on_ray(
            options, server_options, seed=seed, num_workers=ray_workers, address=ray_address
        )
    else:
        begun = answering(build_service(options, server_options), seed=seed)
    ids = read_ids(requests)
    with open_output(answers) as output:
        num_before = count_answered(output, ids, answers)
        if num_before == len(ids):
            complain(f"{answers}: all {len(ids)} requests are answered")
            return
        if num_before:
            complain(f"{answers}: {num_before} of {len(ids)} requests are answered; going on")
        lines = read_lines(requests, skip=num_before)
        with (
            begun as answer,
            progress_bar("answering", "requests", enabled=None) as update,
        ):
            num_failed = write_answers(
                answer(lines),
                output,
                on_progress=update,
                num_before=num_before,
                num_requests=len(ids),
            )
    failed = f", {num_failed} of them with an error" if num_failed else ""
    complain(f"{answers}: {len(ids) - num_before} requests answered{failed}")
