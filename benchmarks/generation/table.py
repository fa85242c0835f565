"""The rows as a table for a terminal, and as Markdown with equal bits side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from generation.plan import DTYPES
from generation.rows import Row

SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("contestant", lambda row: row.contestant),
    ("mode", lambda row: row.mode + (" *" if row.is_best else "")),
    ("prompt ms", lambda row: number(row.prompt_ms, ".0f")),
    ("tokens/s", lambda row: number(row.tokens_per_second, ".1f")),
    ("x plain", lambda row: number(row.ratio_to_plain, ".2f")),
    ("accepted", lambda row: number(row.acceptance_rate, ".2f")),
    ("length", lambda row: number(row.mean_acceptance_length, ".2f")),
    ("equal", lambda row: number(row.equal_tokens, ".2f")),
    ("MB", lambda row: number(row.weights_mb, ".0f")),
    ("GB/s", lambda row: number(row.read_bandwidth, ".1f")),
    ("share", lambda row: number(row.bandwidth_share, ".2f")),
    ("", lambda row: row.reason or ""),
)
NUM_TEXT_COLUMNS = 2


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if index < NUM_TEXT_COLUMNS or index == last else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def text(rows: list[Row]) -> list[str]:
    """A block for each pair and dtype."""
    lines = []
    for pair in unique(row.pair for row in rows):
        for dtype in unique(row.dtype for row in rows if row.pair == pair):
            block = [row for row in rows if (row.pair, row.dtype) == (pair, dtype)]
            cells = [[name for name, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in block)]
            lines += ["", f"{pair}, {SHORT_NAMES.get(dtype, dtype)}", *aligned(cells)]
    return [*lines, "", *footnotes(rows)]


def footnotes(rows: list[Row]) -> list[str]:
    """What the columns mean, and how each contestant was set up."""
    meanings = (
        "tokens/s: decoding, the first token not counted; x plain: of our plain decoding in the same repetition",
        "equal: tokens that our plain decoding has at the same place; MB: weights that a target forward reads",
        "share: weight bytes read a second, of what the read loop reached (GB/s); *: the contestant's fastest",
    )
    return [*meanings, *setups(rows)]


def setups(rows: list[Row]) -> list[str]:
    """A line a contestant: versions, what it computes with, and settings by dtype."""
    lines = []
    for name in unique(row.contestant for row in rows):
        mine = [row for row in rows if row.contestant == name and row.versions]
        if mine:
            versions = ", ".join(f"{package} {version}" for package, version in mine[0].versions.items())
            computed = " | ".join(unique(row.instruction_set for row in mine))
            lines.append(
                f"{name}: {versions}; {computed}; {' | '.join(unique(row.settings for row in mine))}"
            )
    return lines


def reasons(rows: list[Row]) -> list[str]:
    return unique(
        f"{row.contestant}, {SHORT_NAMES[row.dtype]}, {row.mode}: {row.reason}" for row in rows if row.reason
    )


def shares(rows: list[Row], name: str, value: Callable[[Row], float | None]) -> list[str]:
    """A line for each pair: what `value` is in the rows that are shown, dtypes together."""
    lines = []
    for pair in unique(row.pair for row in rows):
        known = [row for row in rows if row.pair == pair and is_shown(row) and value(row) is not None]
        parts = [
            " ".join(
                [label, *(f"{SHORT_NAMES[r.dtype]} {value(r):.2f}" for r in known if label_of(r) == label)]
            )
            for label in unique(map(label_of, known))
        ]
        lines += [f"{name}, {pair}: {'; '.join(parts)}."] if parts else []
    return lines


def markdown(rows: list[Row], machine: str, about: str) -> list[str]:
    """Hardware first; then a table a pair, dtypes side by side; of the speculative rows each contestant's fastest."""
    lines = [machine, "", about]
    for pair in unique(row.pair for row in rows):
        mine = [row for row in rows if row.pair == pair]
        dtypes = unique(row.dtype for row in mine)
        head = ["", *(f"{SHORT_NAMES[dtype]}: tokens/s (prompt, ms)" for dtype in dtypes)]
        lines += ["", f"**{pair}**", "", line(head), line(["---"] + ["---:"] * len(dtypes))]
        for label in unique(label_of(row) for row in mine if is_shown(row)):
            found = {row.dtype: row for row in mine if is_shown(row) and label_of(row) == label}
            lines.append(line([label, *(cell(found.get(dtype)) for dtype in dtypes)]))
    notes = [
        *setups(rows),
        *shares(rows, "Share of drafted tokens that were accepted", lambda row: row.acceptance_rate),
        *shares(rows, "Tokens that our plain decoding has at the same place", lambda row: row.equal_tokens),
        *reasons(rows),
    ]
    return [*lines, "", *(f"* {note}" for note in notes)]


def is_shown(row: Row) -> bool:
    """Everything but a contestant's slower draft lengths, and what only has a reason."""
    is_candidate = row.is_best or row.kind != "generate" or row.num_speculative_tokens == 0
    return is_candidate and row.reason is None


def label_of(row: Row) -> str:
    return f"{row.contestant}, {'speculative' if row.is_best else row.mode}"


def cell(row: Row | None) -> str:
    """`57.1, 1.35× (310)`; with the draft length where there is one; a prefill has a time only."""
    if row is None:
        return "–"
    ratio = "" if row.ratio_to_plain is None else f", {row.ratio_to_plain:.2f}×"
    if row.kind == "prefill":
        return f"{number(row.prompt_ms, '.0f')} ms{ratio}"
    k = f", k = {row.num_speculative_tokens}" if row.num_speculative_tokens else ""
    return f"{number(row.tokens_per_second, '.1f')}{ratio}{k} ({number(row.prompt_ms, '.0f')})"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
