"""The page: what the rows of a part say, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu_parts.runner import Outcome

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
REHEARSAL = "REHEARSAL, NOT A MEASUREMENT: small models, few tokens, to see that everything runs"
FORCED = "FORCED ACCEPTANCE: what was generated is NOT THE MODEL'S OUTPUT; only times mean anything"


def number(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else format(value, form)


def value(name: str, form: str = ".0f") -> Callable[[Row], str]:
    return lambda row: number(row.get(name), form)


def median(name: str, form: str = ".0f") -> Callable[[Row], str]:
    return lambda row: number((row.get(name) or {}).get("median"), form)


def text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, ""))


def draft_length(row: Row) -> str:
    k = row["num_speculative_tokens"]
    return "auto" if k is None else str(k) if k else "–"


def target(row: Row) -> str:
    """What docs/gpu.md wants of an H200."""
    wants = (
        ("target_us", "≤ {:.0f} us"),
        ("target_ratio_to_compiled", "≥ {:.1f} x compile"),
        ("target_ratio", "≥ {:.1f} x plain at .7"),
    )
    return ", ".join(form.format(row[name]) for name, form in wants if name in row)


END_TO_END: tuple[Column, ...] = (
    ("system", text("system")),
    ("B", value("batch_size")),
    ("k", draft_length),
    ("tokens/s", value("tokens_per_second", ".1f")),
    ("us/token", median("us_per_token")),
    ("us/round", median("us_per_round")),
    ("accepted", value("acceptance_rate", ".2f")),
    ("length", value("mean_acceptance_length", ".2f")),
    ("x plain", value("ratio_to_plain", ".2f")),
    ("x compile", value("ratio_to_compiled", ".2f")),
    ("equal", value("equal_tokens", ".2f")),
    ("differs at", value("first_difference")),
    ("floor us", value("floor_us")),
    ("kv us", value("kv_us")),
    ("phases", value("num_phases")),
    ("over/phase", value("overhead_us_per_phase", ".2f")),
    ("here us", value("here_us")),
    ("target (H200)", target),
    ("", text("reason")),
)
STEADY: tuple[Column, ...] = (
    ("rounds", lambda row: "graphs" if row["has_graphs"] else "launches"),
    ("B", value("batch_size")),
    ("k", draft_length),
    ("us/round", median("us_per_round", ".1f")),
    ("device us", value("device_us_per_round", ".1f")),
    ("graphs", value("graph_launches_per_round", ".1f")),
    ("kernels", value("kernels_per_round")),
    ("idle", value("idle_share", ".1%")),
    ("gaps", value("gap_share", ".1%")),
    ("waits", value("waits_per_round", ".2f")),
    ("trace", lambda row: row["trace"].rpartition("/")[2]),
    ("", text("reason")),
)
CAPTURE: tuple[Column, ...] = (
    ("rounds", lambda row: "graphs" if row["has_graphs"] else "launches"),
    ("engine s", value("engine_seconds", ".2f")),
    ("recorded", value("num_graphs")),
    ("recording s", value("seconds", ".2f")),
    ("MB", lambda row: number(row["num_bytes"] / 1e6) if "num_bytes" in row else ""),
)
FIRST: tuple[Column, ...] = (
    ("rounds", lambda row: "graphs" if row["has_graphs"] else "launches"),
    ("dependent", lambda row: "yes" if row["is_dependent"] else "no"),
    ("k", draft_length),
    ("engine s", value("engine_seconds", ".2f")),
    ("recorded", value("num_graphs")),
    ("tokens and bits", text("digest")),
)
MICRO: tuple[Column, ...] = (
    ("op", text("op")),
    ("shape", text("shape")),
    ("dtype", text("dtype")),
    ("rows", value("rows")),
    ("target", value("target_us", ".1f")),
    ("us", median("us", ".2f")),
    ("GB/s", value("gigabytes_per_second")),
    ("share", value("share", ".2f")),
    ("torch us", median("torch_us", ".2f")),
    ("compile us", median("compile_us", ".2f")),
    ("flashinfer us", median("flashinfer_us", ".2f")),
)
TABLES = {
    "first": FIRST,
    "generate": END_TO_END,
    "forced": END_TO_END,
    "steady": STEADY,
    "capture": CAPTURE,
    "micro": MICRO,
}
LEGEND = {
    "generate": (
        "us/token: of one sequence; us/round: of a draft and verify round; floor: weights over the bandwidth measured "
        "beside them, kv: keys and values",
        "over/phase: (us/round - floor) / phases, which wait for each other; here us: floor + 1.6 us a phase",
        "decoding from the first token on: what a draft reads of the prompt is in it",
    ),
    "steady": (
        "us/round: without a profiler; idle: nothing launched was running; gaps: no kernel was running, in the trace, "
        "which widens them",
        "waits: calls a round that make the host wait for the device (target 0; idle < 3 %)",
    ),
}


def head(about: Row, *, is_rehearsal: bool) -> list[str]:
    """What everything below was measured on."""
    names = ("driver", "cuda", "torch", "triton", "transformers", "commit")
    versions = ", ".join(f"{name} {about[name]}" for name in names if about.get(name))
    return [*([REHEARSAL] if is_rehearsal else []), f"{about['machine']}; {versions}"]


def section(outcome: Outcome) -> list[str]:
    """A part: how it ended, and its tables."""
    title = f"{outcome.part}: {outcome.status}"
    if outcome.seconds:
        title += f", {outcome.seconds:.0f} s"
    if outcome.reason and outcome.reason != outcome.status:
        title += f": {outcome.reason}"
    lines = ["", f"== {title}"]
    kinds = list(dict.fromkeys(row.get("kind", "") for row in outcome.rows))
    if "forced" in kinds:  # its plain rows belong in the same table, or nothing is compared
        lines += [FORCED]
        kinds = [kind for kind in kinds if kind != "forced"] or ["forced"]
    for kind in kinds:
        shown = ("generate", "forced") if kind == "generate" else (kind,)
        rows = [row for row in outcome.rows if row.get("kind") in shown]
        lines += table(TABLES[kind], rows) if kind in TABLES else [plain(row) for row in rows]
        lines += LEGEND.get(kind, ())
    return lines


def plain(row: Row) -> str:
    """A row that has no table."""
    return "  ".join(f"{name}: {item}" for name, item in row.items() if name != "kind")


def table(columns: Iterable[Column], rows: Sequence[Row]) -> list[str]:
    """Aligned; a pair a table, and columns that are empty in every row left out."""
    lines: list[str] = []
    for pair in dict.fromkeys((row.get("pair"), row.get("dtype")) for row in rows if "pair" in row) or [None]:
        mine = [row for row in rows if pair is None or (row.get("pair"), row.get("dtype")) == pair]
        cells = [(name, [show(row) for row in mine]) for name, show in columns]
        kept = [(name, column) for name, column in cells if any(column)]
        if pair is not None:
            lines.append(", ".join(str(part) for part in pair if part))
        lines += aligned([[name for name, _ in kept], *zip(*(column for _, column in kept), strict=True)])
    return lines


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column and the last, a text, to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A line a part, the last thing on the page."""
    width = max(len(outcome.part) for outcome in outcomes)
    return [
        "",
        "== all parts",
        *(
            f"{outcome.part.ljust(width)}  {outcome.status}"
            + (f": {outcome.reason}" if outcome.reason and outcome.reason != outcome.status else "")
            for outcome in outcomes
        ),
    ]
