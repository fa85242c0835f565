"""`specengine report`: one page of figures, from measurements or from a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specengine.cli import tables
from specengine.cli.exits import complain
from specengine.cli.measuring import (
    Measurements,
    NumPrompts,
    Out,
    Prompts,
    all_options_but,
    check_out,
    collect,
    prepare_drafted_call,
    read_list,
)
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import (
    MAX_NUM_SPECULATIVE_TOKENS,
    EngineConfig,
    ModelOptions,
    SamplingParams,
)
from specengine.kinds import Integer

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.records import Record

_TITLES = ("temperature, k", "ms", "speed-up (95 %)", "tokens a round", "accepted")


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=all_options_but("num_speculative_tokens", "temperature", "n", "return_rounds"),
    defaults={"max_new_tokens": 48, "enable_prefix_cache": False},
)
def report(
    options: dict[str, Any],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="rows of bench --out or report --out; without any it measures"),
    ] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="the page; never overwritten")] = Path(
        "specengine-report.html"
    ),
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="every figure as PNG and SVG, too")
    ] = None,
    lookaheads: Annotated[
        str, typer.Option("--num-speculative-tokens", "-k", metavar="LIST", help="draft tokens a round")
    ] = "1,2,3,4,6,8",
    temperatures: Annotated[str, typer.Option("--temperature", metavar="LIST", help="with commas")] = (
        "0,0.5,0.8,1,1.2"
    ),
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    repeats: Annotated[int, typer.Option(metavar="INT", min=1, help="times that each is measured")] = 3,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write one page of figures that explain how fast a pair is, and why: acceptance, speed-up, theory, tokens.

    From files it shows what they hold. Without files it measures plain and speculative decoding over k and temperature,
    and follows generations token by token.
    """
    _check_new(html, "--html")
    kept = None
    if files:
        if out is not None:
            raise ValueError("--out is for what is measured: with files nothing is")
        records = _read(files)
    else:
        kept = _measure(options, lookaheads, temperatures, prompts, num_prompts, repeats, out)
        records = kept.records

    from specengine.measure.findings import find
    from specengine.measure.report import write_page
    from specengine.measure.report_page import build_page, save_figures

    found = find(records)
    if found:
        environment = records[-1].environment
        if figures is not None:
            try:
                save_figures(found, figures)
            except FileExistsError as error:
                raise ValueError(f"--figures: {error}") from None
        write_page(html, build_page(found, environment))
        complain(f"the page is {html}" + ("" if figures is None else f", figures are in {figures}"))
    if as_json:
        print_json(
            {
                "is_complete": kept is None or kept.is_complete,
                "page": str(html) if found else None,
                "findings": [each.to_dict() for each in found],
            }
        )
    if kept is not None:
        kept.finish()
    if not found:
        raise ValueError("there is nothing to show: the files hold no rows of bench latency, sweep or report")


def _read(files: Sequence[Path]) -> list[Record]:
    from specengine.measure.records import read_records

    try:
        return [record for path in files for record in read_records(path)]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def _measure(
    options: dict[str, Any],
    lookaheads: str,
    temperatures: str,
    prompts: Path | None,
    num_prompts: int | None,
    repeats: int,
    out: Path | None,
) -> Measurements:
    ks = read_list("num_speculative_tokens", lookaheads, Integer(1, MAX_NUM_SPECULATIVE_TOKENS))
    heats = read_list("temperature", temperatures)
    call = prepare_drafted_call("report", options, ks[0], prompts, num_prompts)

    from specengine.measure.report_run import count_report_records, measure_report

    check_out(out)
    return collect(
        measure_report(call, ks, heats, repeats=repeats),
        total=count_report_records(call, ks, heats, repeats=repeats),
        out=out,
        draw=_draw,
    )


def _check_new(path: Path, option: str) -> None:
    """Before anything is measured."""
    if path.exists():
        raise ValueError(f"{option} {str(path)!r} is there already, and nothing is overwritten: name another")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {str(path)!r} cannot be written: there is no such directory")


def _draw(records: Sequence[Record]) -> Table:
    """The grid so far."""
    from specengine.measure.findings import find

    rows = [row for each in find(records) for row in each.rows]
    cells = [
        [
            f"{row.temperature:g}, " + ("plain" if row.k == 0 else str(row.k)),
            tables.milliseconds(row.summary.seconds),
            tables.speedup(row.summary.speedup),
            f"{row.summary.mean_acceptance_length:.2f}",
            tables.acceptance(row.summary, is_plain=row.k == 0),
        ]
        for row in rows
    ]
    return tables.build_table(_TITLES, cells)
