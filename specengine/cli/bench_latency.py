"""`specengine bench latency`: plain decoding against speculative, prompt by prompt."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from specengine.cli import tables
from specengine.cli.measuring import (
    AsCsv,
    Lookaheads,
    NumPrompts,
    Out,
    Prompts,
    Repeats,
    all_options_but,
    check_out,
    check_outputs,
    collect,
    prepare_drafted_call,
    print_csv,
    read_lookaheads,
)
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import EngineConfig, ModelOptions, SamplingParams

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.call import Call
    from specengine.measure.latency import Summary
    from specengine.measure.records import Record

TITLES = (
    "k",
    "ms",
    "speed-up (95 %)",
    "less time (95 %)",
    "tokens/s",
    "first token, ms",
    "forwards",
    "tokens a round",
    "accepted",
    "draft/verify/other",
    "peak, MB",
)
_NUM_TIMES = 6  # of the titles: those of a first table where all are too wide for one


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=all_options_but("num_speculative_tokens", "n"),
    defaults={"max_new_tokens": 64, "enable_prefix_cache": False},
)
def latency(
    options: dict[str, Any],
    lookaheads: Lookaheads = "1,2,3,4,5,8,10",
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    repeats: Repeats = 5,
    out: Out = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Compare plain decoding with speculative for several numbers of draft tokens, prompt by prompt.

    Percentages of accepted drafts are followed by the deviation of single generations.
    """
    check_outputs(as_json=as_json, as_csv=as_csv)
    ks = read_lookaheads(lookaheads)

    call = prepare_drafted_call("bench latency", options, ks[0], prompts, num_prompts)

    from specengine.measure.latency import count_measurements, summarize

    check_out(out)
    kept = collect(
        _records(call, ks, repeats),
        total=count_measurements(call, ks, repeats=repeats),
        out=out,
        draw=_draw,
    )
    summaries = summarize(kept.records)
    if as_json:
        print_json(kept.to_json(summaries=[summary.to_dict() for summary in summaries]))
    elif as_csv:
        print_csv([_flat(summary) for summary in summaries])
    else:
        _print_tables(summaries)
    kept.finish()


def _records(call: Call, ks: Sequence[int | str], repeats: int) -> Generator[Record, None, None]:
    from specengine.engine import Engine
    from specengine.measure.latency import measure_latency

    with Engine(call.model, call.draft_model, config=call.config, progress=False) as engine:
        yield from measure_latency(call, engine, ks, repeats=repeats)


def _draw(records: Sequence[Record]) -> Table:
    """The times of all prompts together."""
    from specengine.measure.latency import summarize

    overall = [summary for summary in summarize(records) if summary.prompt_index is None]
    return tables.build_table(TITLES[:_NUM_TIMES], [_row(summary)[:_NUM_TIMES] for summary in overall])


def _print_tables(summaries: Sequence[Summary]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for index in dict.fromkeys(summary.prompt_index for summary in summaries):
        console.print("all prompts" if index is None else f"\nprompt {index}")
        rows = [_row(summary) for summary in summaries if summary.prompt_index == index]
        for table in tables.fitted(console, TITLES, rows, split=_NUM_TIMES):
            console.print(table)


def _row(each: Summary) -> list[str]:
    return [
        "plain" if each.k == 0 else str(each.k),
        tables.milliseconds(each.seconds),
        tables.speedup(each.speedup),
        tables.reduction(each.latency_reduction),
        f"{each.tokens_per_second.median:.0f}",
        tables.milliseconds(each.time_to_first_token),
        f"{each.target_forwards:g}",
        f"{each.mean_acceptance_length:.2f}",
        tables.acceptance(each, is_plain=each.k == 0),
        tables.shares(each),
        tables.peak(each),
    ]


def _flat(each: Summary) -> dict[str, Any]:
    columns = each.flat()
    return {
        "num_speculative_tokens": columns.pop("k"),
        "prompt_index": columns.pop("prompt_index"),
        **columns,
    }
