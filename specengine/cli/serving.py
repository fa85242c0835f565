"""What `serve` and `run-batch` share: packages that an installation may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from specengine.errors import SpecEngineError


@contextmanager
def needs(extra: str, *, what: str) -> Iterator[None]:
    """Says how to get what is missing in an installation without this extra, which `what` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SpecEngineError(f"{what} needs {package}: pip install 'specengine[{extra}]'") from None
