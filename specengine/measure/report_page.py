"""What a report shows of findings: a table, a text token by token, and the figures that the rows have numbers for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from specengine.config import SamplingParams
from specengine.measure import figures
from specengine.measure.figures import Explained, Style
from specengine.measure.findings import Findings, Positions, Row, Theory
from specengine.measure.report import Chapter, Draw, Section, page, table
from specengine.measure.summary import ratio_text
from specengine.measure.token_view import SCRIPT, token_view

TITLE = "Speculative decoding, measured"
STYLES: tuple[Style, ...] = ("light", "dark")
_ALPHAS = (0.5, 0.7, 0.8, 0.9)
# Of the options, those that are always shown; others where they are not the default.
_SHOWN = ("dtype", "weight_dtype", "draft_weight_dtype", "device", "backend", "max_new_tokens", "batch_size")
_NAMES = ("model", "draft_model", "drafter")
_OTHERS = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "draft_confidence",
)
_HEAD = (
    "temperature",
    "k",
    "time, ms",
    "speed-up (95 %)",
    "tokens/s",
    "first token, ms",
    "prompt tokens/s",
    "target forwards",
    "tokens a round",
    "accepted",
    "generations",
)


def build_page(found: Sequence[Findings], environment: dict[str, Any]) -> str:
    """The page of these findings, a chapter each."""
    chapters = [
        _chapter(each, place if len(found) > 1 else None, environment)
        for place, each in enumerate(found, start=1)
    ]
    return page(TITLE, chapters, scripts=[SCRIPT])


def save_figures(found: Sequence[Findings], directory: Path) -> list[Path]:
    """Every figure as PNG and SVG, light and dark. Raises `FileExistsError` where one of the files is there already:
    nothing is overwritten."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[Path, Explained]] = []
    for place, each in enumerate(found, start=1):
        for draw in _draws(each, place if len(found) > 1 else None)[0]:
            for style in STYLES:
                explained = draw(style)
                name = explained.name + ("" if style == "light" else "-dark")
                drawn += [(directory / f"{name}.{ending}", explained) for ending in ("png", "svg")]
    if there := [path for path, _ in drawn if path.exists()]:
        raise FileExistsError(f"{there[0]} is there already; nothing was written")
    for path, explained in drawn:
        if path.suffix == ".svg":
            path.write_text(explained.svg(), encoding="utf-8")
        else:
            explained.save(path)
    return [path for path, _ in drawn]


def _chapter(found: Findings, place: int | None, environment: dict[str, Any]) -> Chapter:
    draws, missing = _draws(found, place)
    sections, appendix = [], []
    prefix = "" if place is None else f"{place}-"
    lowest = min((row.temperature for row in found.rows), default=0.0)
    first = [row for row in found.rows if row.temperature == lowest]
    if first:
        title = f"Plain and speculative, temperature {lowest:g}"
        sections.append(
            Section(f"{prefix}summary", title, table(_HEAD[1:], [row[1:] for row in _table(first)], title))
        )
    if len(first) < len(found.rows):
        title = "Every temperature and k"
        body = table(_HEAD, _table(found.rows), title)
        appendix.append(Section(f"{prefix}settings", title, body, is_long=True))
    told = _most_telling(found.traces)
    if told is not None:
        body = token_view(f"{prefix}token", told["tokens"], told["prompt"])
        sections.append(Section(f"{prefix}tokens", "A text, token by token", body, is_long=True))
    title = (
        "" if place is None else f"{place}. {_short(found.setup['model'])}, {_short(found.setup['drafter'])}"
    )
    return Chapter(title, _facts(found.setup, environment), sections, draws, appendix, missing)


def _facts(setup: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [(name, _short(setup[name])) for name in _NAMES if setup.get(name) is not None]
    facts += [(name, str(setup[name])) for name in _SHOWN if setup.get(name) is not None]
    usual = SamplingParams()
    facts += [
        (name, str(setup[name])) for name in _OTHERS if name in setup and setup[name] != getattr(usual, name)
    ]
    machine, versions = environment.get("cpu", {}), environment.get("packages", {})
    facts += [("processor", f"{machine.get('model')}, {machine.get('cores')} cores")]
    facts += [(name, text) for name, text in environment.get("gpu", {}).items() if name.startswith("cuda:")]
    return facts + [(name, versions[name]) for name in ("specengine", "torch") if name in versions]


def _short(name: object) -> str:
    """Of a path its last two parts."""
    return "/".join(Path(str(name)).parts[-2:])


def _table(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            f"{row.temperature:g}",
            "plain" if row.k == 0 else str(row.k),
            f"{row.summary.seconds.median * 1e3:.1f}",
            "–" if row.summary.speedup is None or row.k == 0 else ratio_text(row.summary.speedup),
            f"{row.summary.tokens_per_second.median:.0f}",
            f"{row.summary.time_to_first_token.median * 1e3:.1f}",
            f"{row.summary.prompt_tokens_per_second.median:.0f}",
            f"{row.summary.target_forwards:g}",
            f"{row.summary.mean_acceptance_length:.2f}",
            "–" if row.k == 0 else f"{row.summary.acceptance_rate:.0%}",
            str(row.summary.num_measured),
        ]
        for row in rows
    ]


def _most_telling(traces: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The generation with the most drafts that were rejected somewhere."""
    return max(
        traces, key=lambda each: sum(bool(token["rejected"]) for token in each["tokens"]), default=None
    )


def _draws(found: Findings, place: int | None) -> tuple[list[Draw], list[str]]:
    """The figures that there are numbers for, and what is missing for the others."""
    several_temperatures = len(found.acceptance) > 1
    grid, traced = "specengine report, or specengine bench sweep with several", "specengine report"
    drawn: list[tuple[Callable[..., Explained] | None, str]] = [
        (
            partial(figures.plain_against_speculative, found.by_prompt) if found.by_prompt else None,
            "plain against speculative by prompt: speculative rows beside plain ones",
        ),
        (
            partial(figures.acceptance_by_k, found.acceptance) if found.acceptance else None,
            "acceptance against k: rows with drafts",
        ),
        (
            partial(figures.throughput_by_k, found.speedups) if found.speedups else None,
            "speed-up against k: rows with drafts beside plain ones",
        ),
        (
            partial(figures.acceptance_by_temperature, found.acceptance) if several_temperatures else None,
            f"acceptance against temperature: several temperatures ({grid})",
        ),
        (
            partial(figures.acceptance_map, found.acceptance) if several_temperatures else None,
            f"the map of temperature and k: several temperatures ({grid})",
        ),
        *_of_positions(found.positions),
        *_of_theory(found.theory, f"plain rows and two numbers of drafts ({grid} k)"),
        (
            partial(figures.time_by_phase, found.phases, found.num_rounds) if found.phases else None,
            "time by phase: rows whose rounds were watched (not on CUDA)",
        ),
        (
            partial(figures.acceptance_by_similarity, found.similarity)
            if len(found.similarity) > 1
            else None,
            f"acceptance against similarity: traces of a draft model with the target's vocabulary ({traced})",
        ),
        (
            partial(figures.k_over_time, found.choices) if found.choices else None,
            f'k over time: traces of num_speculative_tokens="auto" ({traced})',
        ),
    ]
    draws = [_drawing(draw, found, place) for draw, _ in drawn if draw is not None]
    return draws, [f"{needs}." for draw, needs in drawn if draw is None]


def _of_positions(positions: Positions | None) -> list[tuple[Callable[..., Explained] | None, str]]:
    if positions is None:
        return [
            (None, f"{what}: rows with drafts") for what in ("rejection positions", "acceptance by position")
        ]
    counts = (positions.num_drafted, positions.num_accepted, positions.rejected)
    rejected = (positions.rejected, positions.num_fully_accepted)
    return [
        (partial(figures.rejection_positions, *rejected), ""),
        (partial(figures.acceptance_by_position, *counts), ""),
    ]


def _of_theory(theory: Theory | None, needs: str) -> list[tuple[Callable[..., Explained] | None, str]]:
    if theory is None:
        return [(None, f"speed-up by theory, against {what}: {needs}") for what in ("acceptance", "k")]
    ks = [k for _, k, _ in theory.points][:6]
    return [
        (partial(figures.speed_up_by_acceptance, ks, theory.costs, theory.points), ""),
        (partial(figures.speed_up_by_k, _ALPHAS, theory.costs, theory.points), ""),
    ]


def _drawing(draw: Callable[..., Explained], found: Findings, place: int | None) -> Draw:
    """With a chapter's number in the name, and with which rows are meant where that is not said."""

    def in_style(style: Style) -> Explained:
        explained = draw(style=style)
        more = ""
        if found.positions is not None and explained.name in (
            "rejection-positions",
            "acceptance-by-position",
        ):
            more = f" Rounds of k = {found.positions.k}, at all temperatures."
        elif explained.name == "plain-against-speculative":
            more = f" k = {found.best_k}, the fastest, at the lowest temperature."
        name = explained.name if place is None else f"{place}-{explained.name}"
        return replace(explained, name=name, explanation=explained.explanation + more)

    return in_style
