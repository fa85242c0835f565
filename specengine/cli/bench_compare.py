"""`specengine bench compare`: beside `transformers`, with and without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specengine.cli import tables
from specengine.cli.exits import complain
from specengine.cli.measuring import (
    AsCsv,
    Lookaheads,
    NumPrompts,
    Out,
    Prompts,
    Repeats,
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
from specengine.errors import SpecEngineError

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.compare import Contestant, Difference
    from specengine.measure.records import Record

TITLES = ("by", "k", "tokens/s", "to plain (95 %)", "forwards", "ours is faster")
# What both sides have, and what concerns ours alone without changing what is compared.
_SHARED = (
    "model",
    "draft_model",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "seed",
    "device",
    "dtype",
    "num_threads",
    "revision",
    "backend",
    "cuda_graphs",
    "rounds_ahead",
    "max_seq_len",
    "kv_cache_bytes",
)


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=_SHARED,
    defaults={"max_new_tokens": 32},
)
def compare(
    options: dict[str, Any],
    lookaheads: Lookaheads = "4",
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    repeats: Repeats = 3,
    out: Out = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Compare with transformers: its generate, and its assisted generation with the same draft model and k.

    Same prompts, dtype and threads, in turn. Greedy texts are compared token by token: ours must all be equal
    (else the exit code is 1), and where one of transformers' differs, the first place is told: its rounding is another.
    """
    check_outputs(as_json=as_json, as_csv=as_csv)
    ks = read_lookaheads(lookaheads)

    chosen = {**options, "enable_prefix_cache": False}
    call = prepare_drafted_call("bench compare", chosen, ks[0], prompts, num_prompts)

    from specengine.measure.compare import compare as measure_compare
    from specengine.measure.compare import count_measurements, differences, summarize
    from specengine.measure.rival import require

    require()
    check_out(out)
    kept = collect(
        measure_compare(call, ks, repeats=repeats, warn=complain),
        total=count_measurements(call, ks, repeats=repeats),
        out=out,
        draw=_draw,
    )
    contestants, different = summarize(kept.records), differences(kept.records)
    if as_json:
        print_json(
            kept.to_json(
                contestants=[contestant.to_dict() for contestant in contestants],
                differences=[difference.to_dict() for difference in different],
            )
        )
    elif as_csv:
        print_csv([contestant.flat() for contestant in contestants])
    elif contestants:
        _print_table(contestants, different, is_greedy=call.params.is_greedy)
    kept.finish()
    _fail_where_ours_differ(kept.records, different)


def _draw(records: Sequence[Record]) -> Table:
    from specengine.measure.compare import summarize

    return _table(summarize(records))


def _table(contestants: Sequence[Contestant]) -> Table:
    return tables.build_table(TITLES, [_row(each) for each in contestants], num_names=2)


def _row(each: Contestant) -> list[str]:
    return [
        each.by,
        "plain" if each.k == 0 else str(each.k),
        f"{each.tokens_per_second.median:.0f}",
        tables.speedup(each.speedup),
        f"{each.target_forwards:g}",
        tables.speedup(each.ours_faster),
    ]


def _print_table(
    contestants: Sequence[Contestant], different: Sequence[Difference], *, is_greedy: bool
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(contestants))
    if is_greedy and not different:
        console.print("\nall greedy texts are equal")
    for each in different:
        who = each.by if each.k == 0 else f"{each.by}, k = {each.k}"
        console.print(
            f"\n{who}: prompt {each.prompt_index} differs from our plain text at new token {each.position}: "
            f"{_token(each.token)} instead of {_token(each.plain)}"
        )


def _token(token: int | None) -> str:
    return "the end" if token is None else f"id {token}"


def _fail_where_ours_differ(records: Sequence[Record], different: Sequence[Difference]) -> None:
    """The engine's promise, on the backends that make it."""
    from specengine.measure.compare import OURS

    broken = [each for each in different if each.by == OURS]
    if broken and records[0].pair["backend"] != "reference":
        raise SpecEngineError(
            f"k = {broken[0].k} changed the text of prompt {broken[0].prompt_index} at new token {broken[0].position}: "
            "this is a defect of specengine"
        )
