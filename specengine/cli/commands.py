"""The command `specengine`: text on stdout, diagnostics on stderr.

Exit codes: 0 success, 1 a model or the machine failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from specengine.config import (
    BACKEND_NAMES,
    DTYPE_NAMES,
    WEIGHT_DTYPE_NAMES,
    EngineConfig,
    SamplingParams,
)
from specengine.errors import SpecEngineError

if TYPE_CHECKING:
    from specengine.call import Call
    from specengine.engine import Engine
    from specengine.outputs import GenerationResult

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., Any])
# The base of typer's usage errors, whether the installed typer carries its own click or not.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="specengine",
    help="Exact speculative decoding: faster generation, the same bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Color(str, Enum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="specengine", standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _complain(error.format_message())
        code = EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _complain(message: str) -> None:
    sys.stderr.write(f"specengine: {message}\n")


def _with_exit_codes(command: Command) -> Command:
    """Turns what a user can cause into one line on stderr and an exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _end_interrupted_text()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has what it wanted; the interpreter must not find the closed pipe at its own exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (SpecEngineError, OSError, MemoryError) as error:
            _complain(str(error) or type(error).__name__)
            raise typer.Exit(EXIT_FAILURE) from None
        except ValueError as error:
            _complain(str(error))
            raise typer.Exit(EXIT_USAGE) from None

    return cast(Command, run)


def _end_interrupted_text() -> None:
    if sys.stdout.isatty():
        from specengine.cli.terminal import RESET

        sys.stdout.write(f"{RESET}\n")
    sys.stdout.flush()


# generate


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an integer.") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number.") from None


def _integer_or_auto(text: str) -> Any:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither an integer nor 'auto'.") from None


def _read_prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise ValueError(f"give the prompt once, as PROMPT or with --prompt; got {argument!r} and {option!r}")
    prompt = argument if option is None else option
    if prompt is None:
        raise ValueError(
            "a prompt is missing: give PROMPT, --prompt TEXT, or --prompt - to read it from stdin"
        )
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None


def _parse_logit_bias(entries: list[str]) -> dict[int, float]:
    try:
        pairs = [entry.split("=", 1) for entry in entries]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise ValueError(
            f"logit_bias must look like ID=BIAS, for example 50256=-100; got {entries}"
        ) from None


_int_option = functools.partial(typer.Option, parser=_integer, metavar="INT")
_float_option = functools.partial(typer.Option, parser=_number, metavar="NUMBER")


def _available(names: tuple[str, ...]) -> str:
    return ", ".join(names)


# What commands that generate have in common.
_Model = Annotated[
    str | None, typer.Option(help="Target: a directory or a Hub name. [default: the bundled pair]")
]
_DraftModel = Annotated[str | None, typer.Option(help="Draft model: a directory or a Hub name.")]
_MaxNewTokens = Annotated[int, _int_option(help="Length limit.")]
_Temperature = Annotated[float, _float_option(help="0 is greedy.")]
_TopK = Annotated[int, _int_option(help="Keep the k most likely tokens; 0 = all.")]
_TopP = Annotated[float, _float_option(help="Keep this much probability.")]
_Seed = Annotated[int | None, _int_option(help="Same seed, same text.")]
_IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")]
_NumSpeculativeTokens = Annotated[
    Any,
    typer.Option(
        "--num-speculative-tokens",
        "-k",
        parser=_integer_or_auto,
        metavar="INT|auto",
        help="Draft tokens a round.",
    ),
]
_Acceptance = Annotated[str, typer.Option(help="auto, coupled or rejection.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
_Dtype = Annotated[str, typer.Option(help=_available(DTYPE_NAMES))]
_WeightDtype = Annotated[str, typer.Option(help=f"The target's weights. {_available(WEIGHT_DTYPE_NAMES)}")]
_DraftWeightDtype = Annotated[str, typer.Option(help="The draft's.")]
_Backend = Annotated[str, typer.Option(help=_available(BACKEND_NAMES))]
_NumThreads = Annotated[int | None, _int_option(help="CPU threads. [default: what the system allows]")]
_MaxSeqLen = Annotated[int | None, _int_option(help="Longest sequence. [default: the context]")]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
_Tokenizer = Annotated[
    str | None, typer.Option(help="Instead of the target's: a directory, a tokenizer.json or a Hub name.")
]
_AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read pytorch_model.bin; no code in it runs.")
]


@app.command()
@_with_exit_codes
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads it from stdin.")] = None,
    prompt_option: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="The same; a final newline of stdin is dropped."),
    ] = None,
    model: _Model = None,
    draft_model: _DraftModel = None,
    max_new_tokens: _MaxNewTokens = SamplingParams.max_new_tokens,
    min_new_tokens: Annotated[int, _int_option(help="No end before this.")] = SamplingParams.min_new_tokens,
    temperature: _Temperature = SamplingParams.temperature,
    top_k: _TopK = SamplingParams.top_k,
    top_p: _TopP = SamplingParams.top_p,
    min_p: Annotated[
        float, _float_option(help="Keep tokens at least this likely, relative to the best.")
    ] = SamplingParams.min_p,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit. Repeatable.")
    ] = None,
    seed: _Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    stop_token_ids: Annotated[
        list[int] | None, _int_option("--stop-token-id", help="End at this token. Repeatable.")
    ] = None,
    include_stop_str_in_output: Annotated[
        bool, typer.Option("--include-stop", help="Keep the stop text in the output.")
    ] = False,
    ignore_eos: _IgnoreEos = False,
    logprobs: Annotated[
        int | None, _int_option(help="With --json: log-probabilities, and the top N.")
    ] = None,
    prompt_logprobs: Annotated[int | None, _int_option(help="The same for the prompt's tokens.")] = None,
    n: Annotated[int, _int_option("--n", "-n", help="Independent samples.")] = SamplingParams.n,
    num_speculative_tokens: _NumSpeculativeTokens = "auto",
    acceptance: _Acceptance = SamplingParams.acceptance,
    device: _Device = EngineConfig.device,
    dtype: _Dtype = EngineConfig.dtype,
    weight_dtype: _WeightDtype = EngineConfig.weight_dtype,
    draft_weight_dtype: _DraftWeightDtype = EngineConfig.draft_weight_dtype,
    backend: _Backend = EngineConfig.backend,
    num_threads: _NumThreads = None,
    max_seq_len: _MaxSeqLen = None,
    revision: _Revision = None,
    tokenizer: _Tokenizer = None,
    allow_pickle: _AllowPickle = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show text as it comes.")] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="A table of what speculation did, on stderr.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    color: Annotated[Color, typer.Option(help="Colour tokens by who wrote them.")] = Color.AUTO,
) -> None:
    """Continue a prompt. The text on stdout is the continuation and a newline."""
    options = {name: value for name, value in locals().items() if value is not None}
    options["logit_bias"] = _parse_logit_bias(logit_bias or [])
    text = _read_prompt(prompt, prompt_option)

    from specengine.call import prepare_call

    call = prepare_call(text, options)
    if as_json:
        result = _run(call, _write_json)
    elif stream and n == 1:
        result = _run(call, functools.partial(_stream_text, color=color.value))
    else:
        result = _run(call, _generate_silently)
        _write_samples(result)
    if stats:
        from specengine.cli.terminal import metrics_table, stderr_console

        stderr_console().print(metrics_table(result.metrics))


def _run(call: Call, action: Callable[[Call, Engine], GenerationResult]) -> GenerationResult:
    from specengine.api import lease_engine

    with lease_engine(call) as engine:
        return action(call, engine)


def _write_json(call: Call, engine: Engine) -> GenerationResult:
    result = _generate_silently(call, engine)
    _print_json({"text": result.text, **result.to_dict(), **_origin(engine)})
    return result


def _origin(engine: Engine) -> dict[str, Any]:
    return {
        "model": engine.target_name,
        "draft_model": engine.draft_name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "backend": engine.backend_name,
    }


def _generate_silently(call: Call, engine: Engine) -> GenerationResult:
    return cast("GenerationResult", engine.generate(call.prompt, call.params, progress=call.progress))


def _stream_text(call: Call, engine: Engine, *, color: str) -> GenerationResult:
    from specengine.api import stream_events
    from specengine.cli.terminal import TokenPainter, legend, paint, wants_color

    is_colored = wants_color(color, sys.stdout)
    if is_colored and engine.has_drafter and wants_color(color, sys.stderr):
        sys.stderr.write(f"{legend()}\n")
        sys.stderr.flush()
    prompt = call.prompts[0]
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) and engine.tokenizer else []
    painter = TokenPainter(engine.tokenizer, ids)
    result = None
    with closing(stream_events(call, engine)) as events:
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


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity: a log-probability of -inf becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# profile


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


@app.command()
@_with_exit_codes
def profile(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue; - reads it from stdin.")
    ] = "def binary_search(items, x):",
    model: _Model = None,
    draft_model: _DraftModel = None,
    max_new_tokens: _MaxNewTokens = 64,
    temperature: _Temperature = SamplingParams.temperature,
    top_k: _TopK = SamplingParams.top_k,
    top_p: _TopP = SamplingParams.top_p,
    seed: _Seed = None,
    ignore_eos: _IgnoreEos = False,
    num_speculative_tokens: _NumSpeculativeTokens = "auto",
    acceptance: _Acceptance = SamplingParams.acceptance,
    device: _Device = EngineConfig.device,
    dtype: _Dtype = EngineConfig.dtype,
    weight_dtype: _WeightDtype = EngineConfig.weight_dtype,
    draft_weight_dtype: _DraftWeightDtype = EngineConfig.draft_weight_dtype,
    backend: _Backend = EngineConfig.backend,
    num_threads: _NumThreads = None,
    max_seq_len: _MaxSeqLen = None,
    revision: _Revision = None,
    tokenizer: _Tokenizer = None,
    allow_pickle: _AllowPickle = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Replay rounds as CUDA graphs: one part, as in real use.")
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The trace: .json, or .json.gz to zip it.")
    ] = Path("specengine-trace.json"),
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="Without: to run under nsys or ncu.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
) -> None:
    """Show where the time of decoding goes, and write a trace for Perfetto or chrome://tracing."""
    options = {name: value for name, value in locals().items() if value is not None}
    options.update(cuda_graphs=graphs, enable_prefix_cache=False)
    text = _read_prompt(prompt, None)

    from specengine.call import prepare_call

    call = prepare_call(text, options)
    if trace:
        _check_writable(out)

    from specengine.api import lease_engine
    from specengine.measure.profile import print_profile, profile_call

    with lease_engine(call) as engine:
        result = profile_call(call, engine, trace_path=out if trace else None)
        origin = _origin(engine)
    if as_json:
        _print_json({**result.to_dict(), "trace": str(out) if trace else None, **origin})
        return
    print_profile(result)
    if trace:
        sys.stderr.write(f"specengine: trace written to {out}; open it in https://ui.perfetto.dev\n")


# models


@app.command()
@_with_exit_codes
def models(
    model: Annotated[str | None, typer.Option(help="Describe this directory or Hub name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the bundled pair and the architectures, or describe a model without loading it."""
    from specengine import bundled
    from specengine.models.describe import describe_model, supported_architectures

    if model is not None:
        _write_sections({model: describe_model(model)}, as_json=as_json)
        return
    sections = {
        "bundled target": describe_model(bundled.target_path()),
        "bundled draft": describe_model(bundled.draft_path()),
        "supported": {"architectures": ", ".join(supported_architectures())},
    }
    _write_sections(sections, as_json=as_json)


@app.command("collect-env")
@_with_exit_codes
def collect_env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Versions, processor, threads and build, for a bug report."""
    from specengine.measure.environment import collect_environment

    _write_sections(collect_environment(), as_json=as_json)


def _write_sections(sections: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print_json(sections)
        return
    width = max(len(name) for fields in sections.values() for name in fields)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in fields.items())])
        for title, fields in sections.items()
    ]
    sys.stdout.write("\n\n".join(blocks) + "\n")
