"""`specengine verify`: whether speculation loses nothing with a pair, its drafters and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specengine.cli import tables
from specengine.cli.exits import EXIT_FAILURE
from specengine.cli.measuring import (
    Lookaheads,
    NumPrompts,
    Out,
    Prompts,
    all_options_but,
    check_out,
    collect,
    read_lookaheads,
)
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import EngineConfig, ModelOptions, SamplingParams

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.records import Record

# What the command decides itself.
_OWN = ("num_speculative_tokens", "n", "logprobs", "prompt_logprobs", "return_rounds", "forced_acceptance")


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=all_options_but(*_OWN),
    defaults={"max_new_tokens": 32, "temperature": 0.8},
)
def verify(
    options: dict[str, Any],
    lookaheads: Lookaheads = "1,4,8",
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    num_samples: Annotated[
        int, typer.Option(metavar="INT", min=100, help="texts drawn for each drafter and random mode")
    ] = 3000,
    num_positions: Annotated[
        int, typer.Option(metavar="INT", min=2, max=64, help="tokens of each of these texts")
    ] = 4,
    model_free: Annotated[
        bool,
        typer.Option(
            "--model-free/--no-model-free",
            help="besides the draft model: every drafter that needs none of its own (ngram, suffix, self)",
        ),
    ] = True,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="write a page of the results to a new file")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Check that speculation loses nothing: with your pair, its drafters and your parameters.

    Greedy and coupled text must be plain decoding's, bit for bit; the samples of rejection and block mode must follow
    the target's own distribution. --acceptance names one mode to check instead, also a lossy one. Exit code 0: every
    check passed, and would not have if something were wrong; 1: not so.
    """
    ks = read_lookaheads(lookaheads)

    from specengine.call import prepare_call
    from specengine.measure.bench_prompts import read_prompts

    texts = read_prompts(prompts, num_prompts)
    call = prepare_call(texts, options)
    if page is not None and page.exists():
        raise ValueError(f"--html {str(page)!r} exists: nothing is overwritten")

    from specengine.measure import verify_page
    from specengine.measure.report import write_page
    from specengine.measure.verify import make_plan
    from specengine.measure.verify import verify as run_checks

    plan = make_plan(
        call, ks=ks, num_samples=num_samples, num_positions=num_positions, with_model_free=model_free
    )
    check_out(out)
    kept = collect(run_checks(call, plan), total=plan.num_checks, out=out, draw=_draw)
    if page is not None and kept.records:
        write_page(page, verify_page.page(kept.records, plan.num_checks))
    if as_json:
        print_json(
            kept.to_json(
                is_lossless=kept.is_complete and verify_page.is_lossless(kept.records),
                significance=plan.significance,
                checks=[record.measured for record in kept.records],
            )
        )
    elif kept.records:
        _print(kept.records, plan.num_checks)
    kept.finish()
    if not verify_page.is_lossless(kept.records):
        raise typer.Exit(EXIT_FAILURE)


def _draw(records: Sequence[Record]) -> Table:
    from specengine.measure.verify_page import TITLES, row

    return tables.build_table(TITLES, [row(record) for record in records], num_names=3)


def _print(records: Sequence[Record], total: int) -> None:
    from rich.console import Console

    from specengine.measure import verify_page

    console = Console(highlight=False, markup=False)
    rows = [verify_page.row(record) for record in records]
    for table in tables.fitted(console, verify_page.TITLES, rows, split=4):
        console.print(table)
    console.print()
    for line in [*verify_page.reasons(records), *verify_page.explanation(records)]:
        console.print(line)
    console.print(f"\n{verify_page.verdict(records, total)}")
