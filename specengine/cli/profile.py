"""`specengine profile`: where the time of decoding goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from specengine.cli.options import AsJson, takes
from specengine.cli.output import origin, print_json
from specengine.cli.prompt import read_prompt
from specengine.config import EngineConfig, ModelOptions, SamplingParams


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    defaults={"max_new_tokens": 64, "cuda_graphs": False, "enable_prefix_cache": False},
)
def profile(
    options: dict[str, Any],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="text to continue; - reads it from stdin")
    ] = "def binary_search(items, x):",
    out: Annotated[Path, typer.Option(metavar="FILE", help="the trace: .json, or .json.gz to zip it")] = Path(
        "specengine-trace.json"
    ),
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="without: to run under nsys or ncu")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show where the time of decoding goes, and write a trace for Perfetto or chrome://tracing.

    Draft, verify and commit are parts of their own where rounds run from Python; with --cuda-graphs a round is one
    part, as in real use.
    """
    text = read_prompt(prompt)

    from specengine.call import prepare_call

    call = prepare_call(text, options)
    if trace:
        _check_writable(out)

    from specengine.api import lease_engine
    from specengine.measure.profile import print_profile, profile_call

    with lease_engine(call) as engine:
        result = profile_call(call, engine, trace_path=out if trace else None)
        source = origin(engine)
    if as_json:
        print_json({**result.to_dict(), "trace": str(out) if trace else None, **source})
        return
    print_profile(result)
    if trace:
        sys.stderr.write(f"specengine: trace written to {out}; open it in https://ui.perfetto.dev\n")


def _check_writable(path: Path) -> None:
    """Raises `ValueError` for a path that no file can be written to; leaves everything as it was."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"--out {str(path)!r} cannot be written: {error.strerror or error}") from None
