"""Figures show the numbers they are given, and can be read: every text inside, apart from others, in contrast."""

from __future__ import annotations

import builtins
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from specengine.errors import SpecEngineError
from specengine.measure import figures
from specengine.measure.figures import Explained, Style
from specengine.measure.statistics import median_interval
from specengine.measure.theory import Costs, speed_up

RATES = {
    temperature: {
        k: [0.95 - 0.1 * k - 0.1 * temperature + 0.02 * n for n in range(3)] for k in (2, 3, 4, 5, 6)
    }
    for temperature in (0.5, 0.8, 1.0, 1.2)
}
SPEEDS = {"The future of AI is bright": ([30.0, 32.0], [60.0, 64.0]), "a": ([30.0, 31.0], [45.0, 50.0])}
PHASES = {
    "plain": {"verify": 0.02, "other": 0.001},
    "k = 4": {"draft": 0.008, "verify": 0.022, "other": 0.001},
}
COSTS = Costs(0.1, 1.1)
MEASURED = [(0.8, 4, 2.1), (0.6, 2, 1.4)]
ALL: dict[str, Callable[[Style], Explained]] = {
    "acceptance-by-k": lambda style: figures.acceptance_by_k(RATES, style=style),
    "throughput-by-k": lambda style: figures.throughput_by_k(RATES, style=style),
    "acceptance-by-temperature": lambda style: figures.acceptance_by_temperature(RATES, style=style),
    "acceptance-map": lambda style: figures.acceptance_map({**RATES, 2.0: {2: [0.1]}}, style=style),
    "rejection-positions": lambda style: figures.rejection_positions([4, 2, 1, 1], 5, style=style),
    "acceptance-by-position": lambda style: figures.acceptance_by_position(
        [13] * 4, [9, 7, 6, 5], [4, 2, 1, 1], style=style
    ),
    "speed-up-by-acceptance": lambda style: figures.speed_up_by_acceptance(
        [1, 2, 4, 8], COSTS, MEASURED, style=style
    ),
    "speed-up-by-k": lambda style: figures.speed_up_by_k([0.5, 0.7, 0.8, 0.9], COSTS, MEASURED, style=style),
    "plain-against-speculative": lambda style: figures.plain_against_speculative(SPEEDS, style=style),
    "time-by-phase": lambda style: figures.time_by_phase(PHASES, 200, style=style),
    "acceptance-by-similarity": lambda style: figures.acceptance_by_similarity(
        {0.0: [0.1, 0.2], 0.5: [0.4, 0.6], 1.0: [1.0, 1.0]}, style=style
    ),
    "time-by-k": lambda style: figures.time_by_k(
        {0: [1.2, 1.3], **{k: [1.5 / k, 1.6 / k] for k in (1, 2, 3, 4, 5, 8, 10)}}, style=style
    ),
    "forwards-by-k": lambda style: figures.forwards_by_k(
        {1: [32], 2: [24], 4: [20], 8: [14]}, 60, style=style
    ),
    "accepted-by-k": lambda style: figures.accepted_by_k(
        {1: [0.8], 2: [1.4], 4: [2.2], 8: [2.9]}, style=style
    ),
    "speed-up-by-prompt": lambda style: figures.bars_by_prompt(
        {prompt: {"fp32": [1.1, 1.2], "bf16": [1.5, 1.6], "fp16": [1.4]} for prompt in SPEEDS},
        "speed-up",
        style=style,
    ),
    "latency-reduction-by-dtype": lambda style: figures.bars_by_prompt(
        {"float32": {"plain": [0.1, 0.2], "speculative": [0.3]}, "bfloat16": {"plain": [0.2]}},
        "latency reduction",
        by="dtype",
        style=style,
    ),
    "next-token-laws": lambda style: figures.next_token_laws(
        {"target": {" a": 0.5, "\n": 0.2}, "threshold": {" a": 0.7, "\n": 0.1}}, style=style
    ),
    "acceptance-by-similarity/prompts": lambda style: figures.acceptance_by_similarity(
        {0.62: [0.6], 0.8: [0.75], 0.81: [0.9]}, are_prompts=True, style=style
    ),
    "k-over-time": lambda style: figures.k_over_time(
        {"a": [4] * 5 + [8] * 30, "b": [4, 2, 0, 0]}, style=style
    ),
}


def luminance(colour: Any) -> float:
    """WCAG 2.1."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(left: Any, right: Any) -> float:
    low, high = sorted((luminance(left), luminance(right)))
    return (high + 0.05) / (low + 0.05)


def complaints(explained: Explained) -> list[str]:
    """What of a figure cannot be read."""
    figure = explained.figure
    FigureCanvasAgg(figure).draw()
    paper = figure.get_facecolor()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    visible = [text for text in texts if text.get_window_extent().width > 0]
    boxes = [(text, text.get_window_extent()) for text in visible]
    axes = figure.axes[0]
    beyond = set()  # labels of ticks outside of the axis, which are not drawn
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        labels = [
            (label, tick.get_loc()) for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
        ]
        beyond |= {id(label) for label, at in labels if not low - 1e-9 <= at <= high + 1e-9}
    boxes = [(text, box) for text, box in boxes if id(text) not in beyond]
    found = []
    for text, box in boxes:
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.width or box.y1 > figure.bbox.height:
            found.append(f"{text.get_text()!r} is cut")
        if text.get_fontsize() < 10:
            found.append(f"{text.get_text()!r} is small")
        if (
            not (explained.name == "acceptance-map" and text in axes.texts)
            and contrast(text.get_color(), paper) < 4.5
        ):
            found.append(f"{text.get_text()!r} is pale")
    for (left, box), (right, other) in itertools.combinations(boxes, 2):
        if box.padded(-1).overlaps(other.padded(-1)):
            found.append(f"{left.get_text()!r} lies on {right.get_text()!r}")
    drawn = [line for line in axes.lines if line.get_label()[:1] != "_" and line.get_linestyle() != "None"]
    looks = [(line.get_marker(), line.get_linestyle()) for line in drawn]
    found += ["two lines differ in colour alone"] * (len(set(looks)) < len(looks))
    found += [f"{colour} is pale" for line in drawn if contrast(colour := line.get_color(), paper) < 4.5]
    return found


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize("name", ALL)
def test_a_figure_can_be_read(name: str, style: Style) -> None:
    explained = ALL[name](style)
    assert explained.name == name.partition("/")[0]
    assert complaints(explained) == []
    assert len(re.findall(r"[^.]\.(?: |$)", explained.explanation)) == 2, explained.explanation
    assert re.search(r"\d", explained.alternative_text)
    shown = " ".join(text.get_text() for text in explained.figure.findobj(Text))
    assert explained.title in shown
    assert re.search(r"n = \d", shown), "the sample size"


def test_what_cannot_be_read_is_noticed() -> None:
    """A long label, a small and pale text, two texts in one place, and lines that only differ in colour."""
    explained = figures.acceptance_by_k(RATES)
    axes = explained.figure.axes[0]
    long = axes.text(0.5, 0.5, "m" * 60, transform=axes.transAxes, fontsize=9, color="#bbbbbb")
    long.set_in_layout(False)
    axes.text(0.5, 0.5, "here", transform=axes.transAxes)
    for colour in ("#000000", "#0000aa"):
        axes.plot([2, 3], [0, 1], color=colour, label=colour)
    found = " ".join(complaints(explained))
    assert all(word in found for word in ("is cut", "is small", "is pale", "lies on", "in colour alone"))


def test_lines_are_means_and_deviations_of_what_was_given() -> None:
    axes = figures.acceptance_by_k({0.8: {4: [0.5, 0.7], 2: [0.9]}}).figure.axes[0]
    line, (caps, _), (bars,) = axes.containers[0]
    assert list(line.get_xdata()) == [2, 4]
    assert list(line.get_ydata()) == pytest.approx([0.9, 0.6])
    assert list(caps.get_ydata()) == pytest.approx([0.9, 0.5])
    assert [segment[1][1] for segment in bars.get_segments()] == pytest.approx([0.9, 0.7])
    across = figures.acceptance_by_temperature({0.8: {4: [0.5, 0.7]}, 0.5: {4: [0.8], 2: [1.0]}}).figure.axes[
        0
    ]
    assert [list(drawn[0].get_ydata()) for drawn in across.containers] == [[1.0], pytest.approx([0.8, 0.6])]


def test_a_map_says_what_was_not_run() -> None:
    axes = figures.acceptance_map({0.5: {2: [0.9], 4: [0.3, 0.5]}, 1.0: {2: [0.7]}}).figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["90%", "40%", "70%", "–"]


def test_a_maps_numbers_stand_out_from_their_cells() -> None:
    axes = figures.acceptance_map(
        {n / 10: {k: [n / 11 + k / 110] for k in range(10)} for n in range(11)}
    ).figure.axes[0]
    (image,) = axes.images
    cells = image.to_rgba(image.get_array()).reshape(-1, 4)
    assert min(contrast(text.get_color(), cell) for text, cell in zip(axes.texts, cells, strict=True)) > 4.5


def test_rejections_are_counted_from_one() -> None:
    explained = figures.rejection_positions([4, 2, 0, 2], 5)
    assert (
        "mean position 2.00, median 1.5; n = 8 rounds with a rejection, 5 without"
        in explained.alternative_text
    )
    assert [bar.get_height() for bar in explained.figure.axes[0].patches] == [4, 2, 0, 2]
    assert "no draft was rejected" in figures.rejection_positions([0, 0], 5).alternative_text


def test_positions_of_unequal_rounds() -> None:
    """Ten rounds drafted one token, all right; two drafted two, of which one had its first wrong."""
    explained = figures.acceptance_by_position([12, 2], [11, 1], [1, 0])
    assert "position 1: 92% of 12 drafted, 92% of 12 judged" in explained.alternative_text
    assert "position 2: 50% of 2 drafted, 100% of 1 judged" in explained.alternative_text


def test_theory_lies_on_its_formula_and_points_where_they_were_measured() -> None:
    by_acceptance = figures.speed_up_by_acceptance([4], COSTS, [(0.8, 4, 2.1)]).figure.axes[0].lines
    assert by_acceptance[0].get_ydata()[80] == pytest.approx(speed_up([0.8] * 4, COSTS))
    assert (list(by_acceptance[1].get_xdata()), list(by_acceptance[1].get_ydata())) == ([0.8], [2.1])
    assert by_acceptance[2].get_ydata()[80] == pytest.approx(4 / 1.8), "the popular formula"
    by_k = figures.speed_up_by_k([0.8], COSTS, [(0.7, 4, 2.1)]).figure.axes[0].lines
    assert by_k[0].get_ydata()[4] == pytest.approx(speed_up([0.8] * 4, COSTS))
    assert (list(by_k[1].get_xdata()), list(by_k[1].get_ydata())) == ([4], [2.1])


def test_phases_are_stacked_in_milliseconds() -> None:
    axes = figures.time_by_phase(PHASES).figure.axes[0]
    drawn = [[(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers]
    assert drawn[1] == [(0.0, pytest.approx(20)), (pytest.approx(8), pytest.approx(22))]


def test_the_same_data_is_the_same_svg_and_files_are_written(tmp_path: Path) -> None:
    first, second = (figures.acceptance_by_k(RATES).svg() for _ in range(2))
    assert first == second
    assert first.startswith("<svg")
    explained = figures.acceptance_by_k(RATES)
    explained.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert 'aria-label="Lines of acceptance rate' in explained._repr_html_()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SpecEngineError, match=r"pip install 'specengine\[report\]'"):
        figures.acceptance_by_k(RATES)


def test_speed_ups_are_medians_with_their_intervals() -> None:
    values = [1.0, 2.0, 4.0, 1.5]
    explained = figures.throughput_by_k({0.8: {4: values, 2: [0.9]}})
    line, (lower, upper), _ = explained.figure.axes[0].containers[0]
    middle, low, high = median_interval(values)
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [0.9, middle])
    assert list(lower.get_ydata()) == pytest.approx([0.9, low])
    assert list(upper.get_ydata()) == pytest.approx([0.9, high])
    assert f"4: {middle:.3g} ({low:.3g} to {high:.3g})" in explained.alternative_text


def test_bars_of_prompts_are_means_in_their_order() -> None:
    explained = figures.plain_against_speculative(SPEEDS, of="k = 4", num_more=3)
    plain, fast = [bars for bars in explained.figure.axes[0].containers if hasattr(bars, "patches")]
    assert [bar.get_width() for bar in plain] == [31.0, 30.5]
    assert [bar.get_width() for bar in fast] == [62.0, 47.5]
    (segments,) = [line.get_segments() for line in fast.errorbar.lines[2]]
    assert [segment[:, 0].tolist() for segment in segments] == [[60.0, 64.0], [45.0, 50.0]]
    shown = [text.get_text() for text in explained.figure.findobj(Text)]
    assert "speculative, k = 4" in shown
    assert any("2 of 5 prompts" in text for text in shown)


def test_similar_models_lie_where_they_were_measured() -> None:
    points = {0.5: [0.4, 0.6], 0.25: [0.2]}
    axes = figures.acceptance_by_similarity(points, are_prompts=True).figure.axes[0]
    drawn, diagonal = axes.lines
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == [
        (0.25, 0.2),
        (0.5, 0.4),
        (0.5, 0.6),
    ]
    assert (list(diagonal.get_xdata()), list(diagonal.get_ydata())) == ([0, 1], [0, 1])
    line = figures.acceptance_by_similarity(points).figure.axes[0].containers[0][0]
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.5])


def test_every_round_has_its_k() -> None:
    choices = {"a": [4, 4, 0, 8], "b": [2]}
    drawn = figures.k_over_time(choices).figure.axes[0].lines
    assert [list(line.get_ydata()) for line in drawn] == list(choices.values())
    assert [list(line.get_xdata()) for line in drawn] == [[1, 2, 3, 4], [1]]
