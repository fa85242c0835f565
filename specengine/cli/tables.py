"""Tables of measurements: cells, and columns that a terminal is wide enough for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from specengine.measure.summary import HasInterval, Interval, Summary

_NO_LIMIT = 10_000


def speedup(value: HasInterval | None) -> str:
    from specengine.measure.summary import ratio_text

    return "-" if value is None else ratio_text(value)


def reduction(value: Interval | None) -> str:
    return "-" if value is None else f"{value.median:.0%} ({value.low * 100:.0f} to {value.high * 100:.0f})"


def milliseconds(value: Interval) -> str:
    return f"{value.median * 1e3:.1f}"


def acceptance(each: Summary, *, is_plain: bool) -> str:
    """The rate, and how far single generations lie from it."""
    if is_plain:
        return "-"
    deviation = each.acceptance_deviation
    return f"{each.acceptance_rate:.0%}" + ("" if deviation is None else f" ± {deviation * 100:.0f}")


def shares(each: Summary) -> str:
    from specengine.measure.summary import SHARES

    return "-" if each.shares is None else "/".join(f"{each.shares[name]:.0%}" for name in SHARES)


def peak(each: Summary) -> str:
    return "-" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:.0f}"


def build_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1, wraps_names: bool = False
) -> Table:
    """Numbers to the right; the first `num_names` columns, which name the row, to the left, in several lines where
    they may be."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, title in enumerate(titles):
        is_name = place < num_names
        table.add_column(title, justify="left" if is_name else "right", no_wrap=not (is_name and wraps_names))
    for row in rows:
        table.add_row(*row)
    return table


def fitted(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    split: int,
) -> list[RenderableType]:
    """One table where the console is wide enough, else two: the columns before `split`, and the first one with the
    others."""
    whole = build_table(titles, rows)
    if console.measure(whole, options=console.options.update(max_width=_NO_LIMIT)).maximum <= console.width:
        return [whole]
    first = build_table(titles[:split], [row[:split] for row in rows])
    second = build_table([titles[0], *titles[split:]], [[row[0], *row[split:]] for row in rows])
    return [first, "", second]
