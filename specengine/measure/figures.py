"""Pictures of speculation, from plain data: each function returns an ordinary matplotlib figure and says what it shows.

They need no model and no engine, so they also draw numbers of other programs. Several acceptance rates under one key
are repetitions or prompts: their mean is drawn, with their standard deviation. Nothing is told by colour alone: series
differ in marker and dash, bars in hatching, and a heat map's cells hold their numbers.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from specengine.errors import SpecEngineError
from specengine.measure.statistics import median_interval
from specengine.measure.theory import Costs, conditional_acceptances, popular_formula, speed_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["light", "dark"]
# [temperature][k]: acceptance rates (or speed-ups) of the runs with these.
ByTemperature = Mapping[float, Mapping[int, Sequence[float]]]
# Of values: what is drawn, and the ends of its bar.
Summarize = Callable[[Sequence[float]], tuple[float, float, float]]

_INK = {"light": "#1a1a1a", "dark": "#f0f0f0"}
_PAPER = {"light": "#ffffff", "dark": "#16181d"}
_GRID = {"light": "#d9d9d9", "dark": "#3a3f4a"}
# After Okabe and Ito, made darker or lighter until each has a contrast of 4.5 to the paper.
_COLOURS = {
    "light": ("#0068a8", "#b84e00", "#00705a", "#8a3f86", "#5c5c5c", "#7a5c00"),
    "dark": ("#63bdf0", "#ff9f57", "#38cfa4", "#e6a3d4", "#c4c4c4", "#f0e05a"),
}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_HATCHES = ("", "///", "...", "xxx", "---", "+++")
_PHASES = ("draft", "verify", "other")
_WIDTH, _HEIGHT = 4.8, 3.9  # inches: narrow, so that text is still legible on a phone


@dataclass(frozen=True)
class Explained:
    """A figure and what it says.

    name:             for a file
    figure:           an ordinary `matplotlib.figure.Figure`
    title:            what it shows
    explanation:      two sentences
    alternative_text: its content for whoever does not see it, with the numbers
    """

    name: str
    figure: Figure
    title: str
    explanation: str
    alternative_text: str

    def svg(self) -> str:
        """The figure as SVG, the same text for the same data."""
        import matplotlib

        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name, "svg.fonttype": "path"}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def save(self, path: Path) -> None:
        """Writes it in the format that the file's ending names (.png, .svg, .pdf); a PNG at 200 dots an inch."""
        self.figure.savefig(path, dpi=200)

    def _repr_html_(self) -> str:
        return (
            f'<figure><div role="img" aria-label="{html.escape(self.alternative_text)}">{self.svg()}</div>'
            f"<figcaption>{html.escape(self.explanation)}</figcaption></figure>"
        )


def acceptance_by_k(samples: ByTemperature, *, unit: str = "runs", style: Style = "light") -> Explained:
    """Acceptance rate (accepted / drafted) against k, a line a temperature. unit: what a rate is of"""
    with _axes(style) as (figure, axes):
        _lines(axes, samples, style)
        axes.set_ylim(-0.03, 1.03)
        title = "Acceptance against number of drafts"
        _label(axes, title, f"drafts a round, k\n{_counted(samples, unit=unit)}", "accepted / drafted")
        _legend(figure, axes)
    return Explained(
        "acceptance-by-k",
        figure,
        title,
        "The share of drafted tokens that the target kept. It falls with k, since a draft counts only if all before it "
        "in its round were right.",
        f"Lines of acceptance rate against k. {_described(samples, unit=unit)}",
    )


def throughput_by_k(samples: ByTemperature, *, style: Style = "light") -> Explained:
    """Speed beside plain decoding against k, a line a temperature: medians, and their 95 % bootstrap intervals.

    samples: speed-ups, each of one run and of plain decoding of the same prompt right before or after it
    """
    with _axes(style) as (figure, axes):
        _lines(axes, samples, style, summary=median_interval)
        _break_even(axes, style)
        axes.set_ylim(bottom=0)
        title = "Speed-up against number of drafts"
        counted = _counted(samples, "median, 95 % interval")
        _label(axes, title, f"drafts a round, k\n{counted}", "speed-up, × plain")
        _legend(figure, axes)
    listing = "; ".join(
        f"T = {temperature:g}: "
        + ", ".join(
            "{:g}: {:.3g} ({:.3g} to {:.3g})".format(k, *median_interval(values))
            for k, values in sorted(by_k.items())
            if values
        )
        for temperature, by_k in sorted(samples.items())
    )
    return Explained(
        "throughput-by-k",
        figure,
        title,
        "How many times as fast a text came as with plain decoding, its prompt included. Each line rises while one "
        "more draft pays for itself and falls after that; below the dashed line at 1 speculation is slower.",
        f"Lines of speed-up against k. {listing}; {counted}.",
    )


def acceptance_by_temperature(
    samples: ByTemperature, *, unit: str = "runs", style: Style = "light"
) -> Explained:
    """Acceptance rate against temperature, a line a k."""
    by_k = _transposed(samples)
    with _axes(style) as (figure, axes):
        _lines(axes, by_k, style, "k = {}")
        axes.set_ylim(-0.03, 1.03)
        title = "Acceptance against temperature"
        _label(axes, title, f"temperature\n{_counted(samples, unit=unit)}", "accepted / drafted")
        _legend(figure, axes)
    return Explained(
        "acceptance-by-temperature",
        figure,
        title,
        "The same acceptance rates, along the temperature. A higher temperature flattens both models' distributions, "
        "which may bring them together or apart, so the line may go either way.",
        f"Lines of acceptance rate against temperature. {_described(by_k, 'k = {}', unit=unit)}",
    )


def acceptance_map(samples: ByTemperature, *, unit: str = "runs", style: Style = "light") -> Explained:
    """A heat map of mean acceptance rates: temperature down, k across."""
    temperatures = sorted(samples)
    ks = sorted({k for by_k in samples.values() for k in by_k})
    means = [[_mean(samples[temperature].get(k, ())) for k in ks] for temperature in temperatures]
    with _axes(style) as (figure, axes):
        image: Any = axes.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for row, values in enumerate(means):
            for column, value in enumerate(values):
                shown = "–" if value != value else f"{value:.0%}"
                is_missing = value != value
                ink = _INK[style] if is_missing else _ink_on(image.cmap(image.norm(value)))
                axes.text(column, row, shown, ha="center", va="center", color=ink, fontsize=11)
        axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        axes.set_yticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
        axes.grid(visible=False)
        title = "Acceptance by temperature and k"
        _label(axes, title, f"drafts a round, k\n{_counted(samples, 'mean', unit=unit)}", "temperature")
    return Explained(
        "acceptance-map",
        figure,
        title,
        "Each cell is the share of drafted tokens that the target kept, brighter where it is higher. A dash is a pair "
        "of temperature and k that was not run.",
        f"A table of acceptance rates. {_described(samples, unit=unit)}",
    )


def rejection_positions(
    counts: Sequence[int], num_fully_accepted: int = 0, *, of: str = "", style: Style = "light"
) -> Explained:
    """Where in a round the first rejection was.

    counts:             [i] = rounds whose first rejection was draft i + 1 (`SpeculativeDecodingMetrics`)
    num_fully_accepted: rounds in which nothing was rejected
    of:                 which runs: "k = 4"
    """
    positions = range(1, len(counts) + 1)
    total = sum(counts)
    listed = [position for position, count in zip(positions, counts, strict=True) for _ in range(count)]
    with _axes(style) as (figure, axes):
        axes.bar(positions, counts, color=_COLOURS[style][0], edgecolor=_INK[style], label="rounds")
        summary = "no draft was rejected"
        if listed:
            mean, median = fmean(listed), _median(listed)
            axes.axvline(
                mean, color=_COLOURS[style][1], linestyle="--", linewidth=2.5, label=f"mean {mean:.2f}"
            )
            axes.axvline(median, color=_INK[style], linestyle=":", linewidth=2.5, label=f"median {median:g}")
            summary = f"mean position {mean:.2f}, median {median:g}"
        title = "First rejected draft of a round"
        note = f"n = {total} rounds with a rejection, {num_fully_accepted} without"
        _label(axes, title, f"position in the round{_of(of)}\n{note}", "rounds")
        _integers(axes.xaxis)
        _legend(figure, axes)
    listing = ", ".join(f"{position}: {count}" for position, count in zip(positions, counts, strict=True))
    return Explained(
        "rejection-positions",
        figure,
        title,
        "How many rounds had their first rejection at each position; what was drafted behind it was for nothing. "
        "Rejections early in a round ask for fewer drafts, or a better draft.",
        f"Bars: rounds by position of the first rejection: {listing}; {summary}; {note}{_of(of)}.",
    )


def acceptance_by_position(
    num_drafted: Sequence[int],
    num_accepted: Sequence[int],
    rejected: Sequence[int],
    *,
    of: str = "",
    style: Style = "light",
) -> Explained:
    """Acceptance by position in the round, of all drafts there and of those that came to be judged.

    num_drafted, num_accepted, rejected: `num_drafted_by_position`, `num_accepted_by_position`, `rejection_positions` of
    `SpeculativeDecodingMetrics`
    of: which runs: "k = 4"
    """
    conditional = conditional_acceptances(num_accepted, rejected)
    shares = [accepted / drafted for accepted, drafted in zip(num_accepted, num_drafted, strict=True)]
    reached = [accepted + wrong for accepted, wrong in zip(num_accepted, rejected, strict=True)]
    with _axes(style) as (figure, axes):
        for index, (label, values, sizes) in enumerate(
            (("if all before were right", conditional, reached), ("of all drafted", shares, num_drafted))
        ):
            errors = [(value * (1 - value) / size) ** 0.5 for value, size in zip(values, sizes, strict=False)]
            axes.errorbar(range(1, len(values) + 1), values, errors, **_series(style, index), label=label)
        axes.set_ylim(-0.03, 1.08)
        title = "Acceptance by position in the round"
        counts = f"n = {num_drafted[0] if num_drafted else 0} rounds; bars: standard error"
        _label(axes, title, f"position in the round{_of(of)}\n{counts}", "share accepted")
        _integers(axes.xaxis)
        _legend(figure, axes)
    listing = "; ".join(
        f"position {at + 1}: {share:.0%} of {drafted} drafted"
        + (f", {conditional[at]:.0%} of {reached[at]} judged" if at < len(conditional) else ", none judged")
        for at, (share, drafted) in enumerate(zip(shares, num_drafted, strict=True))
    )
    return Explained(
        "acceptance-by-position",
        figure,
        title,
        "The lower line is the share of all drafts at a position that were kept, which can only fall where all rounds "
        "draft alike. The upper one counts only rounds that came so far without a rejection: it says whether the "
        "draft itself gets worse.",
        f"Two lines over the position in a round{_of(of)}. {listing}.",
    )


def speed_up_by_acceptance(
    ks: Sequence[int],
    costs: Costs,
    measured: Sequence[tuple[float, int, float]] = (),
    *,
    of: str = "",
    style: Style = "light",
) -> Explained:
    """Speed-up against the acceptance α, a line a k, beside the popular formula for the largest k.

    measured: (α, k, speed-up) of runs; see `theory.equal_acceptance`
    of:       which runs: "T = 0"
    """
    alphas = [index / 100 for index in range(101)]
    with _axes(style, height=4.5) as (figure, axes):
        for index, k in enumerate(ks):
            values = [speed_up([alpha] * k, costs) for alpha in alphas]
            axes.plot(alphas, values, **_series(style, index, markevery=20), label=f"k = {k}")
            points = [(alpha, speed) for alpha, number, speed in measured if number == k]
            _points(axes, points, style, index)
        _end_above(axes)
        wrong = [popular_formula(alpha, max(ks)) for alpha in alphas]
        axes.plot(alphas, wrong, color=_GREY[style], linewidth=1.2, label=f"γ/(1+(1−α)γ), γ = {max(ks)}")
        _break_even(axes, style)
        title = "Speed-up against acceptance"
        note = _costs(costs, measured, of)
        _label(axes, title, f"acceptance of a draft, α\n{note}", "speed-up, × plain")
        _legend(figure, axes)
    return Explained("speed-up-by-acceptance", figure, title, _THEORY, _theory_text(ks, costs, measured))


def speed_up_by_k(
    alphas: Sequence[float],
    costs: Costs,
    measured: Sequence[tuple[float, int, float]] = (),
    *,
    max_k: int = 16,
    of: str = "",
    style: Style = "light",
) -> Explained:
    """Speed-up against k, a line an α, beside the popular formula for the largest α.

    measured: (α, k, speed-up) of runs; each is drawn with the mark of the nearest α
    of:       which runs: "T = 0"
    """
    ks = range(max_k + 1)
    with _axes(style, height=4.5) as (figure, axes):
        for index, alpha in enumerate(alphas):
            values = [speed_up([alpha] * k, costs) for k in ks]
            axes.plot(ks, values, **_series(style, index, markevery=4), label=f"α = {alpha:g}")
            points = [
                (k, speed)
                for given, k, speed in measured
                if min(alphas, key=lambda line, given=given: abs(line - given)) == alpha  # type: ignore[misc]
            ]
            _points(axes, points, style, index)
        _end_above(axes)
        wrong = [popular_formula(max(alphas), k) for k in ks[1:]]
        axes.plot(
            ks[1:], wrong, color=_GREY[style], linewidth=1.2, label=f"γ/(1+(1−α)γ), α = {max(alphas):g}"
        )
        _break_even(axes, style)
        title = "Speed-up by theory against k"
        note = _costs(costs, measured, of)
        _label(axes, title, f"drafts a round, k\n{note}", "speed-up, × plain")
        _integers(axes.xaxis)
        _legend(figure, axes)
    listed = sorted({4, max_k})
    return Explained("speed-up-by-k", figure, title, _THEORY, _theory_text(listed, costs, measured, alphas))


def plain_against_speculative(
    speeds: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    of: str = "",
    num_more: int = 0,
    style: Style = "light",
) -> Explained:
    """Bars of tokens a second, two a prompt.

    speeds:   by prompt, (plain, speculative): tokens a second of each repetition
    of:       how it speculated: "k = 4"
    num_more: prompts that were measured and are not among these
    """
    with _axes(style, height=1.9 + 0.55 * len(speeds)) as (figure, axes):
        for index, label in enumerate(("plain", f"speculative{_of(of)}")):
            means = [fmean(pair[index]) for pair in speeds.values()]
            deviations = [pstdev(pair[index]) for pair in speeds.values()]
            places = [row + 0.2 * (2 * index - 1) for row in range(len(speeds))]
            axes.barh(places, means, 0.4, xerr=deviations, label=label, **_bar(style, index))
        axes.set_yticks(range(len(speeds)), [_short(prompt) for prompt in speeds])
        axes.invert_yaxis()
        sizes = {len(values) for pair in speeds.values() for values in pair}
        counted = f"mean ± standard deviation\nn = {_range(sizes)} runs a bar"
        counted += f"; {len(speeds)} of {len(speeds) + num_more} prompts" if num_more else ""
        title = "Plain and speculative, by prompt"
        _label(axes, title, f"tokens/s\n{counted}", "")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    listing = "; ".join(
        f"{_short(prompt)}: {fmean(plain):.1f} plain, {fmean(fast):.1f} speculative"
        for prompt, (plain, fast) in speeds.items()
    )
    return Explained(
        "plain-against-speculative",
        figure,
        title,
        "Decoding speed of each prompt without and with speculation. How much it gains depends on how predictable the "
        "text is for the draft.",
        f"Two bars a prompt, in tokens a second{_of(of)}. {listing}.",
    )


def time_by_phase(
    seconds: Mapping[str, Mapping[str, float]],
    num_rounds: int | None = None,
    *,
    of: str = "",
    style: Style = "light",
) -> Explained:
    """Stacked bars of what a round takes.

    seconds:    by setting ("k = 4"), by phase ("draft", "verify", "other"): mean seconds a round
    num_rounds: how many rounds were measured
    of:         which runs: "T = 0"
    """
    found = dict.fromkeys(phase for parts in seconds.values() for phase in parts)
    phases = sorted(found, key=lambda phase: _PHASES.index(phase) if phase in _PHASES else len(_PHASES))
    with _axes(style, height=2.1 + 0.42 * len(seconds)) as (figure, axes):
        lefts = [0.0] * len(seconds)
        for index, phase in enumerate(phases):
            widths = [parts.get(phase, 0.0) * 1e3 for parts in seconds.values()]
            axes.barh(range(len(seconds)), widths, 0.6, lefts, label=phase, **_bar(style, index))
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axes.set_yticks(range(len(seconds)), list(seconds))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        title = "Time of a round, by phase"
        note = "" if num_rounds is None else f"\nmean of n = {num_rounds} rounds"
        _label(axes, title, f"ms a round{_of(of)}{note}", "")
        _legend(figure, axes)
    listing = "; ".join(
        f"{setting}: " + ", ".join(f"{phase} {value * 1e3:.3g} ms" for phase, value in parts.items())
        for setting, parts in seconds.items()
    )
    return Explained(
        "time-by-phase",
        figure,
        title,
        "Where a round's time goes: the draft's steps, the target's forward that verifies, and everything else. "
        "Speculation pays if the tokens that a round gives grow faster than the length of its bar.",
        f"Stacked bars. {listing}.",
    )


def acceptance_by_similarity(
    points: Mapping[float, Sequence[float]], *, are_prompts: bool = False, style: Style = "light"
) -> Explained:
    """Acceptance rate against how alike draft and target are.

    points:      by similarity (0 … 1), acceptance rates
    are_prompts: each similarity is one of a prompt's text: points, beside the line on which both are equal. Otherwise
                 it is a draft's (for example the weight of the trained parameters in one that is mixed of random and
                 trained ones): a line
    """
    num_points = sum(len(values) for values in points.values())
    with _axes(style) as (figure, axes):
        if are_prompts:
            pairs = [(place, value) for place, values in sorted(points.items()) for value in values]
            axes.plot(
                *zip(*pairs, strict=True),
                **_series(style, 0, linestyle="none", markersize=9),
                label="a prompt",
            )
            axes.plot([0, 1], [0, 1], color=_INK[style], linewidth=1, linestyle=(0, (2, 2)), label="equal")
            axes.set_xlim(-0.03, 1.03)
            note = f"1 − total variation, mean over a text\nn = {num_points} prompts"
        else:
            _lines(axes, {"acceptance": points}, style, "{}")
            note = _counted({"": points})
        axes.set_ylim(-0.03, 1.03)
        title = "Acceptance against similarity"
        _label(axes, title, f"similarity of draft and target\n{note}", "accepted / drafted")
        if are_prompts:
            _legend(figure, axes)
    meaning = (
        "For each prompt, how much probability the two models' distributions share along its text, and how many of the "
        "drafts there were accepted."
        if are_prompts
        else "The acceptance rate of drafts that resemble the target to a known degree."
    )
    listing = (
        "; ".join(
            f"{value:.3g} at {place:.3g}" for place, values in sorted(points.items()) for value in values
        )
        + f"; n = {num_points} prompts."
        if are_prompts
        else _described({"acceptance": points}, "{}", "at")
    )
    return Explained(
        "acceptance-by-similarity",
        figure,
        title,
        f"{meaning} What matters is not how good a draft is but how near its distribution is to the target's.",
        f"{'Points' if are_prompts else 'A line'} of acceptance rate against similarity. {listing}",
    )


def k_over_time(choices: Mapping[str, Sequence[int]], *, style: Style = "light") -> Explained:
    """What the engine chose with `num_speculative_tokens="auto"`: k against the round, a line a request."""
    with _axes(style) as (figure, axes):
        for index, (label, ks) in enumerate(choices.items()):
            every = max(1, len(ks) // 8)
            series = _series(style, index, markevery=every)
            axes.plot(range(1, len(ks) + 1), ks, drawstyle="steps-post", **series, label=_short(label))
        title = "Drafts chosen, round by round"
        numbers = _range({len(ks) for ks in choices.values()})
        _label(axes, title, f"round\nn = {numbers} rounds a line", "drafts, k")
        axes.set_ylim(bottom=-0.3)
        _integers(axes.xaxis)
        _integers(axes.yaxis)
        _legend(figure, axes)
    listing = "; ".join(
        f"{label}: from {min(ks)} to {max(ks)}, {fmean(ks):.1f} on average"
        for label, ks in choices.items()
        if ks
    )
    return Explained(
        "k-over-time",
        figure,
        title,
        "The number of drafts that the engine chose for each round. It grows where drafts are accepted, falls to 0 "
        "where they do not pay, and from there is tried again now and then.",
        f"Steps of k against the round. {listing}.",
    )


# What they are made of

_GREY = {"light": "#5c5c5c", "dark": "#c4c4c4"}
_THEORY = (
    "Lines are (tokens a round) / (k c + v) with equal acceptances, a draft step costing c plain forwards and "
    "verification v; measured runs should lie on them. The thin grey line is a formula that is often quoted and wrong: "
    "it knows no cost of drafting and no token of the target's own."
)


@contextmanager
def _axes(style: Style, *, height: float = _HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    if style not in _INK:
        raise ValueError(f"style must be 'light' or 'dark', not {style!r}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SpecEngineError("figures need matplotlib: pip install 'specengine[report]'") from None
    ink, paper, grid = _INK[style], _PAPER[style], _GRID[style]
    settings: Any = {
        "font.size": 11,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.facecolor": paper,
        "figure.facecolor": paper,
        "savefig.facecolor": "auto",
        "legend.fontsize": 10,
        "legend.frameon": False,
        "legend.handlelength": 3,
        "hatch.color": ink,
        "errorbar.capsize": 3,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _series(style: Style, index: int, **more: Any) -> dict[str, Any]:
    """Colour, marker and dash of series `index`: no two of 6 share one of them, no two of 180 all."""
    colours = _COLOURS[style]
    turn = index // len(colours)
    return {
        "color": colours[index % len(colours)],
        "marker": _MARKERS[(index + turn) % len(_MARKERS)],
        "linestyle": _DASHES[(index + turn) % len(_DASHES)],
        "linewidth": 2,
        "markersize": 6,
        **more,
    }


def _bar(style: Style, index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[style][index % 6],
        "hatch": _HATCHES[index % 6],
        "edgecolor": _INK[style],
        "error_kw": {"ecolor": _INK[style], "elinewidth": 2},
    }


def _lines(
    axes: Axes,
    samples: Mapping[Any, Mapping[Any, Sequence[float]]],
    style: Style,
    label: str = "T = {:g}",
    summary: Summarize | None = None,
) -> None:
    """A line a key. summary: of values, (what is drawn, the ends of its bar); by default mean and standard deviation"""
    for index, key in enumerate(sorted(samples)):
        places = sorted(place for place, values in samples[key].items() if values)
        drawn = [(summary or _mean_and_deviation)(samples[key][place]) for place in places]
        bars = [[middle - low for middle, low, _ in drawn], [high - middle for middle, _, high in drawn]]
        axes.errorbar(
            places, [middle for middle, *_ in drawn], bars, **_series(style, index), label=label.format(key)
        )
    places = sorted({place for by_place in samples.values() for place in by_place})
    if len(places) <= 7:
        axes.set_xticks(places, [f"{place:g}" for place in places])


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float, float]:
    mean, deviation = fmean(values), pstdev(values)
    return mean, mean - deviation, mean + deviation


def _of(what: str) -> str:
    return f", {what}" if what else ""


def _ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever has more contrast to the colour (WCAG 2.1: 4.58 at the least)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _points(axes: Axes, points: Sequence[tuple[float, float]], style: Style, index: int) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        series = _series(style, index, linestyle="none", markersize=9, markeredgecolor=_INK[style])
        axes.plot(xs, ys, **series, markeredgewidth=1.5)


def _end_above(axes: Axes) -> None:
    """Ends the picture a little above what is drawn so far; what comes later may leave it."""
    lines: list[Any] = list(axes.lines)
    axes.set_ylim(0, 1.15 * max(float(max(line.get_ydata())) for line in lines))


def _break_even(axes: Axes, style: Style) -> None:
    axes.axhline(1, color=_INK[style], linewidth=1, linestyle=(0, (2, 2)))


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    # The title begins where the figure does, so that a long one fits beside the labels of the axis.
    axes.figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=0)
    columns = 3 if longest <= 9 else 2 if longest <= 22 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _integers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _transposed(samples: ByTemperature) -> dict[int, dict[float, Sequence[float]]]:
    ks = sorted({k for by_k in samples.values() for k in by_k})
    return {k: {key: by_k[k] for key, by_k in samples.items() if k in by_k} for k in ks}


def _counted(
    samples: Mapping[Any, Mapping[Any, Sequence[float]]],
    what: str = "mean ± standard deviation",
    unit: str = "runs",
) -> str:
    sizes = {len(values) for by_place in samples.values() for values in by_place.values() if values}
    return f"{what} of n = {_range(sizes)} {unit}"


def _described(
    samples: Mapping[Any, Mapping[Any, Sequence[float]]],
    label: str = "T = {:g}",
    place: str = "",
    unit: str = "runs",
) -> str:
    lines = [
        f"{label.format(key)}: "
        + ", ".join(
            f"{place} {at:g}: {fmean(values):.3g}".strip()
            for at, values in sorted(samples[key].items())
            if values
        )
        for key in sorted(samples)
    ]
    return "; ".join(lines) + f"; {_counted(samples, unit=unit)}."


def _costs(costs: Costs, measured: Sequence[object], of: str) -> str:
    note = f"c = {costs.draft:.3g}, v = {costs.verify:.3g}"
    return f"{note}; big marks: n = {len(measured)} measured{_of(of)}" if measured else note


def _theory_text(
    ks: Sequence[int],
    costs: Costs,
    measured: Sequence[tuple[float, int, float]],
    alphas: Sequence[float] = (0.5, 0.8, 1.0),
) -> str:
    lines = [
        f"k = {k}: " + ", ".join(f"{speed_up([alpha] * k, costs):.2f} at α = {alpha:g}" for alpha in alphas)
        for k in ks
    ]
    runs = [f"α = {alpha:.2f}, k = {k}: {speed:.2f}" for alpha, k, speed in measured]
    return (
        f"Curves of speed-up for c = {costs.draft:.3g}, v = {costs.verify:.3g}. By theory: {'; '.join(lines)}. "
        f"Measured: {'; '.join(runs) or 'nothing'}."
    )


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else float("nan")


def _median(values: Sequence[float]) -> float:
    from statistics import median

    return median(values)


def _range(sizes: set[int]) -> str:
    return f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}" if sizes else "0"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 18 else line[:17] + "…"


# Of the notebooks: what their originals drew, right

Quantity = Literal["time", "speed", "speed-up", "latency reduction", "acceptance"]
_QUANTITIES: dict[str, tuple[str, str]] = {
    "time": ("seconds", "From the request to the last token, the prompt included; shorter is better."),
    "speed": ("tokens/s", "Tokens a second, the prompt's time included; longer is better."),
    "speed-up": (
        "× plain",
        "Plain time over the time of each way, measured in turn; beyond 1 a way is faster.",
    ),
    "latency reduction": ("share of plain time saved", "1 − 1/speed-up; below 0 a way is slower than plain."),
    "acceptance": ("accepted / drafted", "The share of the drafts that the target kept."),
}


def time_by_k(seconds: Mapping[int, Sequence[float]], *, style: Style = "light") -> Explained:
    """Seconds a text against k.

    seconds: by k, of each repetition; 0 is plain decoding
    """
    with _axes(style) as (figure, axes):
        _lines(axes, {"speculative": {k: seconds[k] for k in seconds if k}}, style, "{}")
        plain = fmean(seconds[0]) if seconds.get(0) else None
        if plain is not None:
            axes.axhline(plain, color=_INK[style], linewidth=2, linestyle=(0, (2, 2)), label="plain")
        axes.set_ylim(bottom=0)
        title = "Time of a text against number of drafts"
        _label(axes, title, f"drafts a round, k\n{_counted({'': seconds})}", "seconds")
        _legend(figure, axes)
    known = "" if plain is None else f"Plain: {plain:.3g}. "
    described = _described({"speculative": {k: seconds[k] for k in seconds if k}}, "{}")
    return Explained(
        "time-by-k",
        figure,
        title,
        "Seconds from the request to its last token. Below the dashed line speculation is faster than plain decoding; "
        "behind the lowest point a further draft costs more time than it saves.",
        f"A line of seconds against k. {known}{described}",
    )


def forwards_by_k(
    forwards: Mapping[int, Sequence[float]], num_tokens: int, *, style: Style = "light"
) -> Explained:
    """Forwards of the target that a text of `num_tokens` tokens takes, against k, and the fewest that are possible.

    forwards: by k, of each repetition
    """
    ks = sorted(forwards)
    fewest = [1 + -(-(num_tokens - 1) // (k + 1)) for k in ks]
    title = "Forwards of the target against k"
    figure = _beside_the_best(forwards, fewest, title, "forwards", style)
    return Explained(
        "forwards-by-k",
        figure,
        title,
        f"How often the target ran for {num_tokens} tokens, its prompt included. Fewer is not yet faster: each forward "
        "also had k steps of the draft before it, and k + 1 rows to compute.",
        f"A line of forwards against k. {_described({'measured': forwards}, '{}')} "
        f"The fewest possible: {', '.join(f'{k}: {count}' for k, count in zip(ks, fewest, strict=True))}.",
    )


def accepted_by_k(accepted: Mapping[int, Sequence[float]], *, style: Style = "light") -> Explained:
    """Accepted drafts a round against k, and the most that are possible.

    accepted: by k, the mean of each repetition or prompt
    """
    title = "Accepted drafts of a round against k"
    figure = _beside_the_best(accepted, sorted(accepted), title, "accepted drafts a round", style)
    return Explained(
        "accepted-by-k",
        figure,
        title,
        "How many drafts of a round the target kept on average; each round gives one token more, the target's own. "
        "The line flattens, since a draft counts only if all before it were right.",
        f"A line of accepted drafts a round against k. {_described({'measured': accepted}, '{}')}",
    )


def _beside_the_best(
    measured: Mapping[int, Sequence[float]], best: Sequence[float], title: str, quantity: str, style: Style
) -> Figure:
    """Against k, what was measured, and what it would be if every draft were accepted."""
    with _axes(style) as (figure, axes):
        _lines(axes, {"measured": measured}, style, "{}")
        axes.plot(sorted(measured), best, **_series(style, 1), label="if every draft were accepted")
        axes.set_ylim(bottom=0)
        _label(axes, title, f"drafts a round, k\n{_counted({'': measured})}", quantity)
        _legend(figure, axes)
    return figure


def bars_by_prompt(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    quantity: Quantity,
    *,
    by: str = "prompt",
    style: Style = "light",
) -> Explained:
    """Bars of one quantity: a group a prompt, a bar a way to decode.

    values: by prompt, by way ("plain", "fp16", …), of each repetition
    by:     what the groups are if not prompts
    """
    unit, meaning = _QUANTITIES[quantity]
    ways = list(dict.fromkeys(way for by_way in values.values() for way in by_way))
    width = 0.8 / len(ways)
    with _axes(style, height=2.0 + (0.15 + 0.24 * len(ways)) * len(values)) as (figure, axes):
        for index, way in enumerate(ways):
            found = [by_way.get(way, ()) for by_way in values.values()]
            means = [_mean(each) for each in found]
            deviations = [pstdev(each) if each else float("nan") for each in found]
            places = [row + width * (index - (len(ways) - 1) / 2) for row in range(len(values))]
            axes.barh(places, means, width, xerr=deviations, label=way, **_bar(style, index))
        axes.set_yticks(range(len(values)), [_short(prompt) for prompt in values])
        axes.invert_yaxis()
        if quantity == "speed-up":
            axes.axvline(1, color=_INK[style], linewidth=1, linestyle=(0, (2, 2)))
        title = f"{quantity.capitalize()}, by {by}"
        sizes = {len(each) for by_way in values.values() for each in by_way.values() if each}
        _label(axes, title, f"{unit}\nmean ± standard deviation\nn = {_range(sizes)} runs a bar", "")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    listing = "; ".join(
        f"{_short(prompt)}: " + ", ".join(f"{way} {fmean(each):.3g}" for way, each in by_way.items() if each)
        for prompt, by_way in values.items()
    )
    return Explained(
        f"{quantity}-by-{by}".replace(" ", "-"),
        figure,
        title,
        f"{meaning} A group of bars is a {by}, the bars of a group are ways to decode.",
        f"Bars of {quantity} in {unit}, by {by}. {listing}.",
    )


def next_token_laws(laws: Mapping[str, Mapping[str, float]], *, style: Style = "light") -> Explained:
    """The probability of the same few next tokens under several laws.

    laws: by name ("target", "threshold", …), by token
    """
    tokens = list(dict.fromkeys(token for law in laws.values() for token in law))
    width = 0.8 / len(laws)
    with _axes(style, height=2.0 + (0.15 + 0.22 * len(laws)) * len(tokens)) as (figure, axes):
        for index, (name, law) in enumerate(laws.items()):
            places = [row + width * (index - (len(laws) - 1) / 2) for row in range(len(tokens))]
            axes.barh(
                places, [law.get(token, 0.0) for token in tokens], width, label=name, **_bar(style, index)
            )
        axes.set_yticks(range(len(tokens)), [_short(repr(token)) for token in tokens])
        axes.invert_yaxis()
        title = "What the next token may be"
        _label(axes, title, "probability, computed\nn = 1 place in a text", "")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    listing = "; ".join(
        f"{name}: " + ", ".join(f"{token!r} {law.get(token, 0.0):.1%}" for token in tokens)
        for name, law in laws.items()
    )
    return Explained(
        "next-token-laws",
        figure,
        title,
        "The law by which each rule draws the next token, where a draft is judged. A rule is lossless if its bars are "
        "the target's, for every token and after every text.",
        f"Bars of probability by token. {listing}.",
    )
