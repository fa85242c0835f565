"""What `serve` and `run-batch` share: packages that an installation may lack, and the options of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from specengine.errors import SpecEngineError

UsesRay = Annotated[bool, typer.Option("--ray", help="engines on a Ray cluster (specengine[ray])")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="the cluster's; by default $RAY_ADDRESS, else one is begun on this machine (with --ray)",
        show_default=False,
    ),
]


@contextmanager
def needs(extra: str, *, what: str) -> Iterator[None]:
    """Says how to get what is missing in an installation without this extra, which `what` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SpecEngineError(f"{what} needs {package}: pip install 'specengine[{extra}]'") from None


def check_ray(uses_ray: bool, /, **given: object) -> None:
    """Raises `ValueError` for an option of Ray's that would be left unheeded."""
    for name, value in given.items():
        if value is not None and not uses_ray:
            raise ValueError(f"--{name.replace('_', '-')} is of no use without --ray")
