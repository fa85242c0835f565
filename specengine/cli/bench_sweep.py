"""`specengine bench sweep`: every combination of settings, each with plain decoding beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    print_csv,
    read_list,
    read_lookaheads,
)
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import EngineConfig, ModelOptions, SamplingParams
from specengine.kinds import Flag, Integer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from specengine.measure.records import Record
    from specengine.measure.sweep import Cell

TITLES = (
    "temperature",
    "k",
    "tokens/s",
    "speed-up (95 %)",
    "accepted",
    "a round",
    "first, ms",
)
BUNDLED = "bundled"
_SWITCH = {"on": True, "true": True, "off": False, "false": False}


class _OnOrOff(Flag):
    def parse(self, text: str) -> bool:
        if text not in _SWITCH:
            raise ValueError(f"enable_prefix_cache must be a list of on and off, got {text!r}")
        return _SWITCH[text]


def _axis(help: str, flag: str | None = None) -> Any:
    return typer.Option(*([flag] if flag else []), metavar="LIST", help=f"{help}, with commas")


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=all_options_but(
        "draft_model",
        "num_speculative_tokens",
        "temperature",
        "top_k",
        "top_p",
        "acceptance",
        "dtype",
        "weight_dtype",
        "draft_weight_dtype",
        "enable_prefix_cache",
        "n",
    ),
    defaults={"max_new_tokens": 64},
)
def sweep(
    options: dict[str, Any],
    draft_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="what drafts, with commas; + between several that draft together; bundled is the bundled pair's draft "
            "(repeatable)",
        ),
    ] = None,
    lookaheads: Lookaheads = "2,3,4,5,6",
    temperature: Annotated[str, _axis("0 is greedy decoding")] = "0,0.5,0.8,1,1.2",
    top_k: Annotated[str, _axis("numbers of likely tokens to keep, 0: all")] = "0",
    top_p: Annotated[str, _axis("probabilities to keep, 1: all")] = "1",
    acceptance: Annotated[str, _axis("how drafts are judged")] = "auto",
    dtype: Annotated[str, _axis("of the weights")] = "auto",
    weight_dtype: Annotated[str, _axis("storage of the target's weights")] = "auto",
    draft_weight_dtype: Annotated[str, _axis("storage of the draft's weights")] = "auto",
    enable_prefix_cache: Annotated[str, _axis("off, on")] = "off",
    batch_size: Annotated[str, _axis("prompts that are continued at the same time")] = "1",
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    repeats: Repeats = 5,
    out: Out = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Measure every combination of k, temperature, filters, dtypes, prefix cache, drafter and batch size.

    Each has plain decoding beside it, in turn with every k. At temperature 0 filters and acceptance change nothing, and
    are measured once. In the table, accepted: of all drafts, and the deviation of single generations; a round: tokens
    that a round of the target gives; first: time to the first token.
    """
    check_outputs(as_json=as_json, as_csv=as_csv)
    model, drafters = _read_pairs(options.get("model"), draft_model)
    batch_sizes = read_list("batch_size", batch_size, Integer(1, 4096))
    axes = {
        "draft_model": drafters,
        "dtype": read_list("dtype", dtype),
        "weight_dtype": read_list("weight_dtype", weight_dtype),
        "draft_weight_dtype": read_list("draft_weight_dtype", draft_weight_dtype),
        "enable_prefix_cache": read_list("enable_prefix_cache", enable_prefix_cache, _OnOrOff()),
        "batch_size": batch_sizes,
        "acceptance": read_list("acceptance", acceptance),
        "top_k": read_list("top_k", top_k),
        "top_p": read_list("top_p", top_p),
        "temperature": read_list("temperature", temperature),
        "num_speculative_tokens": read_lookaheads(lookaheads),
    }

    from specengine.measure.bench_prompts import read_prompts
    from specengine.measure.sweep import build_plan, summarize
    from specengine.measure.sweep import sweep as measure_sweep

    if prompts is None and num_prompts is None:
        num_prompts = max(3, *batch_sizes)  # different ones, for a batch too
    texts = read_prompts(prompts, num_prompts)
    plan = build_plan({**options, "model": model}, axes)
    check_out(out)
    kept = collect(
        measure_sweep(plan, texts, repeats=repeats),
        total=plan.count(len(texts), repeats=repeats),
        out=out,
        draw=_draw,
    )
    cells = summarize(kept.records)
    if as_json:
        print_json(kept.to_json(cells=[cell.to_dict() for cell in cells]))
    elif as_csv:
        print_csv([cell.flat() for cell in cells])
    else:
        _print_sections(cells)
    kept.finish()


def _read_pairs(model: Any, draft_models: Sequence[str] | None) -> tuple[Any, list[Any]]:
    """The target, and everything that drafts for it in turn."""
    from specengine import bundled

    if model is not None and not draft_models:
        raise ValueError("bench sweep needs a draft_model: without one there is only plain decoding")

    def resolve(name: str) -> Any:
        if name == BUNDLED and model is not None:
            raise ValueError(
                "--draft-model bundled is the draft of the bundled target: no --model goes with it"
            )
        return bundled.draft_path() if name == BUNDLED else name

    drafters = []
    for text in draft_models or [BUNDLED]:
        for part in _split(text, ","):
            together = [resolve(name) for name in _split(part, "+")]
            drafters.append(together[0] if len(together) == 1 else together)
    return (bundled.target_path() if model is None else model), drafters


def _split(text: str, separator: str) -> list[str]:
    """The name of a directory or a file may hold the separator."""
    return [text] if Path(text).exists() else [part.strip() for part in text.split(separator)]


# Tables: one for all that differs in temperature and k only


def _section(cell: Cell) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in cell.cell.items() if name != "temperature")


def _draw(records: Sequence[Record]) -> RenderableType:
    """What is being measured."""
    from rich.console import Group

    from specengine.measure.sweep import CELL_NAMES, cell_of, summarize

    last = {**cell_of(records[-1]), "temperature": None}
    same = [record for record in records if {**cell_of(record), "temperature": None} == last]
    title = ", ".join(_words(name, last[name]) for name in CELL_NAMES if name != "temperature")
    return Group(title, _table(summarize(same)))


def _print_sections(cells: Sequence[Cell]) -> None:
    """What all have in common is said once."""
    from rich.console import Console

    console = Console(highlight=False)
    sections = list(dict.fromkeys(_section(cell) for cell in cells))
    common = [item for item in dict.fromkeys(sum(sections, ())) if all(item in each for each in sections)]
    console.print(", ".join(_words(*item) for item in common))
    for section in sections:
        title = ", ".join(_words(*item) for item in section if item not in common)
        console.print(f"\n{title}" if title else "")
        console.print(_table([cell for cell in cells if _section(cell) == section]))


def _words(name: str, value: Any) -> str:
    if name == "enable_prefix_cache":
        return f"prefix cache {'on' if value else 'off'}"
    if name == "draft_model":
        from specengine import bundled

        return f"drafter {value}".replace(str(bundled.draft_path()), BUNDLED)
    return f"{name.replace('_', ' ')} {value}"


def _table(cells: Sequence[Cell]) -> RenderableType:
    return tables.build_table(TITLES, [_row(cell) for cell in cells], num_names=2)


def _row(each: Cell) -> list[str]:
    return [
        f"{each.cell['temperature']:g}",
        "plain" if each.k == 0 else str(each.k),
        f"{each.tokens_per_second.median:.0f}",
        tables.speedup(each.speedup),
        tables.acceptance(each, is_plain=each.k == 0),
        f"{each.mean_acceptance_length:.2f}",
        tables.milliseconds(each.time_to_first_token),
    ]
