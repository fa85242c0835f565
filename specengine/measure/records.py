"""Measured rows: one JSON object a line, appended, never overwritten."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from specengine.errors import ModelLoadError
from specengine.json_file import parse_json

KINDS = ("latency", "sweep", "kernels", "compare", "verify", "tune", "report", "trace")


@dataclass(frozen=True)
class Record:
    """One measurement.

    kind:         the command that measured, one of `KINDS`
    run:          the same for all rows of one run: when it began, in UTC, and six hexadecimal digits
    environment:  `collect_environment()`
    pair:         model, draft_model, dtype, weight_dtype, draft_weight_dtype, device, backend
    settings:     num_speculative_tokens, temperature, …: what was asked for
    prompt_index: the prompt's place in the list; -1: of all together
    repeat:       how often this had been measured before, in this run
    measured:     numbers: seconds, tokens, bytes, shares; "metrics" is `GenerationMetrics.to_dict()`
    """

    kind: str
    run: str
    environment: dict[str, Any]
    pair: dict[str, Any]
    settings: dict[str, Any]
    prompt_index: int
    repeat: int
    measured: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def new_run() -> str:
    """A name for a run."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(3)}"


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Adds a line for each at the end of a file, which is made where there is none."""
    with path.open("a", encoding="ascii") as file:
        for record in records:
            file.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")


def read_records(path: Path) -> list[Record]:
    """The rows of a file. Raises `ValueError` with file and line for what is no row, `OSError` for what is no file."""
    lines = path.read_bytes().splitlines()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: bytes, where: str) -> Record:
    try:
        row = parse_json(line, where)
    except ModelLoadError as error:
        raise ValueError(str(error)) from None
    names = [item.name for item in fields(Record)]
    if set(row) != set(names):
        wrong = ", ".join(sorted(set(row) ^ set(names)))
        raise ValueError(f"{where}: not a measured row: missing or unknown: {wrong}")
    for item in fields(Record):
        wanted = {"str": str, "int": int}.get(str(item.type), dict)
        if not isinstance(row[item.name], wanted):
            raise ValueError(f"{where}: {item.name} must be {wanted.__name__}, got {row[item.name]!r}")
    if row["kind"] not in KINDS:
        raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}; got {row['kind']!r}")
    return Record(**row)
