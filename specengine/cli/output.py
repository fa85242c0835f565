"""What commands write on stdout: JSON, and sections of names and values."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specengine.engine import Engine


def print_json(value: dict[str, Any]) -> None:
    """One line of JSON. In ASCII, so that it is JSON whatever the terminal's or the pipe's encoding is."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity: a log-probability of -inf becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_sections(sections: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Titles with names and values below them."""
    if as_json:
        print_json(sections)
        return
    width = max(len(name) for fields in sections.values() for name in fields)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in fields.items())])
        for title, fields in sections.items()
    ]
    sys.stdout.write("\n\n".join(blocks) + "\n")


def origin(engine: Engine) -> dict[str, Any]:
    """What a result came from."""
    return {
        "model": engine.target_name,
        "draft_model": engine.draft_name,
        "device": str(engine.device),
        "dtype": engine.weight_dtype,
        "backend": engine.backend_name,
    }
