"""Files that a contestant writes once and finds again as long as the checkpoint they came from is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pairs import MARKER


def cached(source: str, cache: str, label: str, write: Callable[[Path, Path], None]) -> Path:
    """The path of what `write(source, path)` makes of a widened checkpoint: a file or a directory.

    label: names what it is, and its recipe: another recipe needs another label
    """
    directory = Path(source)
    key = json.loads((directory / MARKER).read_text(encoding="utf-8"))["key"]
    path = Path(cache) / f"{directory.name}-{key[:12]}-{label}"
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        write(directory, unfinished)
        unfinished.rename(path)
    return path
