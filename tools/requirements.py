"""Prints the requirements of an optional-dependency group of pyproject.toml, one a line.

python tools/requirements.py dev
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(group: str, groups: dict[str, list[str]]) -> list[str]:
    """The group's requirements; `specengine[a,b]` stands for those of a and b."""
    found: list[str] = []
    for requirement in groups[group]:
        included = re.fullmatch(r"specengine\[(.*)\]", requirement)
        names = included.group(1).split(",") if included else []
        found += [item for name in names for item in requirements(name.strip(), groups)] or [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(sys.argv[1], project["optional-dependencies"])))
