"""`specengine generate`: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from specengine.cli.exits import EXIT_FAILURE, complain
from specengine.cli.options import AsJson, takes
from specengine.cli.output import origin, print_json
from specengine.cli.prompt import read_prompt
from specengine.config import EngineConfig, ModelOptions, SamplingParams

if TYPE_CHECKING:
    from specengine.call import Call
    from specengine.engine import Engine
    from specengine.outputs import GenerationResult


class Color(str, Enum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@takes(ModelOptions, SamplingParams, EngineConfig)
def generate(
    options: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="text to continue; - reads it from stdin")
    ] = None,
    prompt_option: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="the same; of stdin a byte order mark and the final newline are dropped, CRLF becomes a newline",
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="show text as it comes")] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="a table of what speculation did, on stderr")
    ] = False,
    as_json: AsJson = False,
    color: Annotated[Color, typer.Option(help="colour tokens by who wrote them")] = Color.AUTO,
) -> None:
    """Continue a prompt. The text on stdout is the continuation and a newline.

    In --stop and --bad-word, \\n, \\t, \\r, \\xNN, \\uNNNN and \\UNNNNNNNN stand for characters, and a backslash is
    written twice; a prompt is taken as it is.
    """
    text = read_prompt(prompt, prompt_option)

    from specengine.call import prepare_call

    call = prepare_call(text, options)
    if as_json:
        result = _run(call, _write_json)
    elif stream and call.params.n == 1:
        result = _run(call, partial(_stream_text, color=color.value))
    else:
        result = _run(call, _generate_silently)
        _write_samples(result)
    if stats:
        from specengine.cli.terminal import metrics_table, stderr_console

        stderr_console().print(metrics_table(result.metrics))
    _fail_for_errors(result)


def _run(call: Call, action: Callable[[Call, Engine], GenerationResult]) -> GenerationResult:
    from specengine.api import lease_engine

    with lease_engine(call) as engine:
        return action(call, engine)


def _write_json(call: Call, engine: Engine) -> GenerationResult:
    result = _generate_silently(call, engine)
    print_json({"text": result.text, **result.to_dict(), **origin(engine)})
    return result


def _generate_silently(call: Call, engine: Engine) -> GenerationResult:
    return cast("GenerationResult", engine.generate(call.prompt, call.params, progress=call.progress))


def _stream_text(call: Call, engine: Engine, *, color: str) -> GenerationResult:
    from specengine.api import stream_events
    from specengine.cli.terminal import legend, paint, wants_color
    from specengine.runtime.sequence import SMOOTH_STREAM_INTERVAL
    from specengine.runtime.text import TokenPainter

    is_colored = wants_color(color, sys.stdout)
    if is_colored and engine.has_drafter and wants_color(color, sys.stderr):
        sys.stderr.write(f"{legend()}\n")
        sys.stderr.flush()
    prompt = call.prompts[0]
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) and engine.tokenizer else []
    painter = TokenPainter(engine.tokenizer, ids)
    result = None
    # Nobody sees a few milliseconds.
    with closing(stream_events(call, engine, stream_interval=SMOOTH_STREAM_INTERVAL)) as events:
        for event in events:
            for piece, source in painter.split(event):
                sys.stdout.write(paint(piece, source) if is_colored else piece)
            sys.stdout.flush()
            result = event.result or result
    assert result is not None, "the last event carries the result"
    sys.stdout.write("\n")
    return result


def _write_samples(result: GenerationResult) -> None:
    """One sample after the other; with more than one, each under a heading on stderr."""
    for output in result.outputs:
        if len(result.outputs) > 1:
            sys.stdout.flush()
            sys.stderr.write(f"--- sample {output.index}\n")
            sys.stderr.flush()
        sys.stdout.write(f"{output.text}\n")


def _fail_for_errors(result: GenerationResult) -> None:
    """Whatever was written: a sample that ended with an error is a failure, and its reason is said."""
    failed = [output for output in result.outputs if output.finish_reason == "error"]
    if not failed:
        return
    sys.stdout.flush()
    which = ", ".join(str(output.index) for output in failed)
    complain(
        f"{failed[0].error}"
        + (f" (sample {which} of {len(result.outputs)})" if len(result.outputs) > 1 else "")
    )
    raise typer.Exit(EXIT_FAILURE)
