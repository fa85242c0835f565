"""`specengine bench`: measurements of the user's own pair."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specengine.cli.exits import EXIT_INTERRUPTED, complain
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import (
    MAX_NUM_SPECULATIVE_TOKENS,
    EngineConfig,
    ModelOptions,
    SamplingParams,
    field_names,
)
from specengine.kinds import IntegerOrAuto

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.latency import Interval, Summary
    from specengine.measure.records import Record

bench = typer.Typer(
    rich_markup_mode=None,
    help="Measure plain decoding against speculative, on your own pair and prompts.",
    no_args_is_help=True,
)
# A measurement asks for these in its own way.
_OWN = ("num_speculative_tokens", "n")
_OPTIONS = [name for group in (ModelOptions, SamplingParams, EngineConfig) for name in field_names(group)]


@bench.command()
@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=[name for name in _OPTIONS if name not in _OWN],
    defaults={"max_new_tokens": 64, "enable_prefix_cache": False},
)
def latency(
    options: dict[str, Any],
    lookaheads: Annotated[
        str,
        typer.Option(
            "--num-speculative-tokens",
            "-k",
            metavar="LIST",
            help="draft tokens a round, with commas; auto too",
        ),
    ] = "1,2,3,4,5,8,10",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=".jsonl, or a text file with a prompt a line; by default bundled ones"
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(metavar="INT", min=1, help="of them; by default all of a file, 3 bundled ones"),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="INT", min=1, help="times that each is measured")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append every measurement to it, a JSON object a line")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="the table on stdout as CSV, in seconds and bytes")
    ] = False,
) -> None:
    """Compare plain decoding with speculative for several numbers of draft tokens, prompt by prompt."""
    if as_json and as_csv:
        raise ValueError("--json and --csv both write on stdout: give one of them")
    ks = _read_list(lookaheads)

    from specengine.call import prepare_call
    from specengine.measure.bench_prompts import read_prompts

    texts = read_prompts(prompts, num_prompts)
    call = prepare_call(texts, {**options, "num_speculative_tokens": ks[0]})
    if call.draft_model is None:
        raise ValueError("bench latency needs a draft_model: without one there is only plain decoding")

    from specengine.api import lease_engine
    from specengine.measure.latency import count_measurements, measure_latency, summarize
    from specengine.measure.records import append_records

    if out is not None:
        append_records(out, [])  # what cannot be written is known before anything is measured
    records: list[Record] = []
    total = count_measurements(call, ks, repeats=repeats)
    was_interrupted = False
    try:
        with lease_engine(call) as engine, _progress(total) as show:
            for record in measure_latency(call, engine, ks, repeats=repeats):
                records.append(record)
                if out is not None:
                    append_records(out, [record])
                show(records)
    except KeyboardInterrupt:
        was_interrupted = True
    summaries = summarize(records)
    if as_json:
        print_json(
            {
                "is_complete": not was_interrupted,
                "summaries": [summary.to_dict() for summary in summaries],
                "records": [record.to_dict() for record in records],
            }
        )
    elif as_csv:
        _print_csv(summaries)
    elif summaries:
        from rich.console import Console

        console = Console(highlight=False)
        for index in dict.fromkeys(summary.prompt_index for summary in summaries):
            console.print("all prompts" if index is None else f"\nprompt {index}")
            console.print(_table([summary for summary in summaries if summary.prompt_index == index]))
    if was_interrupted:
        kept = "" if out is None else f"; they are in {out}"
        complain(f"interrupted: {len(records)} of {total} measurements were made{kept}")
        raise typer.Exit(EXIT_INTERRUPTED)


def _read_list(text: str) -> list[int | str]:
    """Numbers of draft tokens, each once."""
    kind = IntegerOrAuto(1, MAX_NUM_SPECULATIVE_TOKENS)
    ks = [kind.check("num_speculative_tokens", kind.parse(part.strip())) for part in text.split(",")]
    return list(dict.fromkeys(ks))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yields what shows the measurements so far: a table, how many there are and the time left. On a terminal only."""
    if not sys.stderr.isatty():
        yield lambda records: None
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from specengine.cli.terminal import stderr_console
    from specengine.measure.latency import summarize

    bar = Progress(TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    task = bar.add_task("measuring", total=total)
    with Live(bar, console=stderr_console(), transient=True) as live:

        def show(records: Sequence[Record]) -> None:
            bar.update(task, completed=len(records))
            overall = [summary for summary in summarize(records) if summary.prompt_index is None]
            live.update(Group(_table(overall), bar))

        yield show


def _table(summaries: Sequence[Summary]) -> Table:
    from rich.table import Table

    table = Table("k", box=None, pad_edge=False)
    for title in (
        "ms",
        "speed-up (95 %)",
        "less time",
        "tokens/s",
        "first token, ms",
        "forwards",
        "tokens a round",
        "accepted",
        "draft/verify/other",
        "peak, MB",
    ):
        table.add_column(title, justify="right")
    for each in summaries:
        shares, speedup, less = each.shares, each.speedup, each.latency_reduction
        table.add_row(
            "plain" if each.k == 0 else str(each.k),
            f"{each.seconds.median * 1e3:.1f}",
            "-" if speedup is None else f"{speedup.median:.2f}× ({speedup.low:.2f}–{speedup.high:.2f})",
            "-" if less is None else f"{less.median:.0%}",
            f"{each.tokens_per_second.median:.0f}",
            f"{each.time_to_first_token.median * 1e3:.1f}",
            f"{each.target_forwards:g}",
            f"{each.mean_acceptance_length:.2f}",
            f"{each.acceptance_rate:.0%}" if each.k != 0 else "-",
            "-"
            if shares is None
            else "/".join(f"{shares[name]:.0%}" for name in ("draft", "verify", "other")),
            "-" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:.0f}",
        )
    return table


def _print_csv(summaries: Sequence[Summary]) -> None:
    rows = [_flat(summary) for summary in summaries]
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(each: Summary) -> dict[str, Any]:
    """One level; what is not known is empty."""

    def interval(name: str, value: Interval | None) -> dict[str, Any]:
        ends = (None,) * 3 if value is None else (value.median, value.low, value.high)
        return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))

    shares = each.shares or {}
    return {
        "num_speculative_tokens": each.k,
        "prompt_index": each.prompt_index,
        "num_measured": each.num_measured,
        **interval("seconds", each.seconds),
        **interval("time_to_first_token", each.time_to_first_token),
        **interval("tokens_per_second", each.tokens_per_second),
        **interval("speedup", each.speedup),
        **interval("latency_reduction", each.latency_reduction),
        "target_forwards": each.target_forwards,
        "mean_acceptance_length": each.mean_acceptance_length,
        "acceptance_rate": each.acceptance_rate,
        **{f"{name}_share": shares.get(name) for name in ("draft", "verify", "other")},
        "peak_bytes": each.peak_bytes,
    }
