"""`specengine tune`: what to draft with for a pair, prompts and a machine, and how much of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specengine.cli import tables
from specengine.cli.exits import complain
from specengine.cli.measuring import NumPrompts, Out, Prompts, Repeats, all_options_but, check_out, collect
from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_json
from specengine.config import EngineConfig, ModelOptions, SamplingParams
from specengine.weight_formats import WEIGHT_FORMATS

if TYPE_CHECKING:
    from rich.table import Table

    from specengine.measure.tune import Score, Tuner
    from specengine.profiles import Profile

TITLES = ("", "speed-up (95 %)", "tokens/s", "pairs")
_NUM_PROMPTS = 6


@takes(
    ModelOptions,
    SamplingParams,
    EngineConfig,
    only=all_options_but("num_speculative_tokens", "n", "profile", "max_batch_size", "return_rounds"),
    defaults={"max_new_tokens": 64, "enable_prefix_cache": False},
)
def tune(
    options: dict[str, Any],
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    repeats: Repeats = 6,
    batch_size: Annotated[
        int, typer.Option(metavar="INT", min=1, max=4096, help="prompts that are continued at the same time")
    ] = 1,
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            metavar="NAME",
            help="try this besides the draft model, suffix and ngram: self:6, another model (repeatable)",
        ),
    ] = None,
    try_dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--try-dtype",
            metavar="NAME",
            help="of the target, int8 and int4 too: try it besides, though it changes what the model says (repeatable)",
        ),
    ] = None,
    write: Annotated[
        Path, typer.Option(metavar="FILE", help="the profile, for --profile and profile=")
    ] = Path("specengine-profile.json"),
    force: Annotated[bool, typer.Option("--force", help="write it over a file that is there")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest way to draft for your pair and prompts, and write it to a profile.

    What is recommended changes no text, unless --try-dtype or a lossy --acceptance asks for more. The fastest ways that
    a short survey finds are measured against plain decoding in turns; the gain is the median of these pairs, with its
    95 % interval.
    """
    _check_new(write, force=force)

    from specengine.call import prepare_call
    from specengine.measure.bench_prompts import read_prompts

    texts = read_prompts(prompts, _NUM_PROMPTS if prompts is None and num_prompts is None else num_prompts)
    call = prepare_call(texts, {**options, "num_speculative_tokens": "auto"})
    if call.config.forced_acceptance is not None:
        raise ValueError("forced_acceptance makes every drafter look alike: there is nothing to tune")

    from specengine.measure.tune import build_tuner

    tuner = build_tuner(
        call,
        precisions=read_precisions(try_dtypes or [], call.config),
        drafters=drafters or [],
        repeats=repeats,
        batch_size=batch_size,
    )
    check_out(out)
    kept = collect(tuner.run(), total=tuner.num_records, out=out, draw=lambda _: _table(tuner.scores()))
    profile = tuner.profile() if kept.is_complete else None
    if profile is not None:
        write.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(
            kept.to_json(
                profile=None if profile is None else profile.model_dump(),
                scores=[
                    {
                        "candidate": score.candidate.label,
                        "speedup": score.speedup.model_dump(),
                        "pairs": score.num_pairs,
                        "tokens_per_second": score.tokens_per_second,
                    }
                    for score in tuner.scores()
                ],
            )
        )
    else:
        _print(tuner, profile)
    sys.stdout.flush()
    if profile is None:
        complain("no profile was written: the measurements are not complete")
    else:
        complain(
            f"profile written to {write}; use it with --profile {write}, or Engine(profile={str(write)!r})"
        )
    kept.finish()


def _check_new(path: Path, *, force: bool) -> None:
    """Before anything is measured."""
    if path.exists() and not (force and path.is_file()):
        hint = "it is not a file" if not path.is_file() else "it exists; --force writes over it"
        raise ValueError(f"--write {str(path)!r}: {hint}")
    if not path.parent.is_dir():
        raise ValueError(f"--write {str(path)!r}: no such directory")


def read_precisions(names: Sequence[str], config: EngineConfig) -> list[tuple[str, str]]:
    """(dtype, weight_dtype) of the target."""
    from specengine.config import declaration

    field = EngineConfig.__dataclass_fields__["weight_dtype"]
    kind = declaration(field).kind
    checked = [kind.check("--try-dtype", name) for name in names]
    has_scales = {name for name, format in WEIGHT_FORMATS.items() if format.has_scales}
    return [(config.dtype, name) if name in has_scales else (name, config.weight_dtype) for name in checked]


def _table(scores: Sequence[Score]) -> Table:
    rows = [
        [
            score.candidate.label,
            tables.speedup(score.speedup),
            f"{score.tokens_per_second:.0f}",
            str(score.num_pairs),
        ]
        for score in scores
    ]
    return tables.build_table(TITLES, rows)


def _print(tuner: Tuner, profile: Profile | None) -> None:
    """For people: what was measured, what comes of it, and why."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    for line in _survey_lines(tuner):
        console.print(line)
    if tuner.duels:
        console.print("\nAgainst plain decoding, in turns:")
        console.print(_table(tuner.scores()))
    if profile is None:
        return
    best, advice = tuner.best(), profile.recommendation
    if advice.speedup is None:
        console.print("\nSpeculation does not pay here: decode plainly.")
    else:
        gain = advice.speedup
        console.print(
            f"\nRecommended: {best.candidate.label}. {gain.median:.2f}× as fast as plain decoding "
            f"(95 % interval {gain.low:.2f} to {gain.high:.2f}, {best.num_pairs} pairs)."
        )
        if gain.low < 1:
            console.print(
                "  The gain is not sure: with other texts it may be as fast as plain decoding, or slower."
            )
    for reason in tuner.reasons(best):
        console.print(f"  {reason}.")
    if best.candidate.is_changed:
        console.print(
            "  This changes the model slightly: its text is not what it would be as the target is given."
        )
    if best.candidate.acceptance in ("threshold", "typical"):
        console.print(f"  acceptance={best.candidate.acceptance} is lossy, as was asked for.")


def _survey_lines(tuner: Tuner) -> list[str]:
    lines = ["Accepted of the drafts that are judged, by position; what one costs, in rounds:"]
    names = {setup: tuner.name_of(setup) for setup in tuner.surveys}
    width = max(map(len, names.values()), default=0)
    for setup, found in tuner.surveys.items():
        rates = " ".join(f"{rate:4.0%}" for rate in found.acceptance[:8]) or "none"
        cost = "" if setup.is_lookup or found.draft is None else f"  {found.draft / found.plain:.2f}"
        lines.append(f"  {names[setup]:<{width}}  {rates}{cost}")
    return lines if tuner.surveys else []
