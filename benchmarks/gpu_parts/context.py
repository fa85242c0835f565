"""What a part is given, and what it gives back."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FailedError(Exception):
    """The part did what it could, and something is wrong; the message says what."""


class SkippedError(Exception):
    """The part cannot run here; the message is the reason. This is no failure."""


@dataclass(frozen=True)
class Settings:
    """The same for every part.

    device:       "cuda" or "cpu"
    dtype:        of the models' weights: "float16", "bfloat16" or "float32"
    is_rehearsal: small models and few tokens: nothing that is timed counts
    limit:        seconds that a part may take
    cache:        where widened models are kept
    work:         where logs and traces go
    about:        the machine and the versions, see `about.describe`
    """

    device: str
    dtype: str
    is_rehearsal: bool
    limit: float
    cache: str
    work: str
    about: dict[str, Any]


class Context:
    """A part's side of the run. A row is in the file as soon as it is added: it survives whatever comes after."""

    def __init__(self, part: str, arguments: dict[str, Any], settings: Settings, rows: Path) -> None:
        self.part, self.arguments, self.settings = part, arguments, settings
        self._rows = rows
        self._started = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """A row of results."""
        self._write(row)

    def finish(self, status: str, reason: str = "") -> None:
        """How the part ended; without it, it was killed or crashed."""
        self._write({"outcome": {"status": status, "reason": reason}})

    def say(self, line: str) -> None:
        """Progress."""
        print(f"  {line.strip()}", flush=True)

    def remaining(self) -> float:
        """Seconds until the part is ended."""
        return self.settings.limit - (time.monotonic() - self._started)

    def path(self, name: str) -> Path:
        """A file of this part for people to read."""
        path = Path(self.settings.work) / f"{self.part}{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, line: dict[str, Any]) -> None:
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
