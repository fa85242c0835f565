"""Executes the notebooks of examples/notebooks and writes them, with what they show, beside their sources.

    python tools/notebooks.py              # all
    python tools/notebooks.py 2 5          # those whose names begin so

A notebook is written when all of it ran; the others stay as they were. Nothing but results changes from run to run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"


def sources(wanted: list[str]) -> list[Path]:
    """The percent scripts whose names begin with one of `wanted`, or all."""
    found = sorted(FOLDER.glob("[0-9]_*.py"))
    return [path for path in found if not wanted or any(path.name.startswith(name) for name in wanted)]


def read_source(path: Path) -> Any:
    """A percent script as a notebook without outputs."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def execute(path: Path) -> Any:
    """The notebook with its outputs. Raises `CellExecutionError`."""
    notebook = read_source(path)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_warning(output, path.name)]
    return notebook


def _is_warning(output: Any, name: str) -> bool:
    """What went to stderr is for whoever runs this: it speaks of this machine."""
    if output.output_type != "stream" or output.name != "stderr":
        return False
    print(f"{name}: {output.text}", file=sys.stderr)
    return True


def main() -> int:
    paths = sources(sys.argv[1:])
    if not paths:
        print(f"notebooks.py: nothing begins with {' or '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    if os.environ.get("SPECENGINE_NOTEBOOKS_SMALL"):
        print(
            "notebooks.py: SPECENGINE_NOTEBOOKS_SMALL is set: small runs are not what is shown",
            file=sys.stderr,
        )
        return 2
    # On a machine with other work, PyTorch's threads that wait for each other by spinning get nowhere.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    num_failed = 0
    for path in paths:
        begin = time.perf_counter()
        print(f"{path.name} ...", flush=True)
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(f"{path.name} failed:\n{error}", file=sys.stderr)
            num_failed += 1
            continue
        nbformat.validate(notebook)
        nbformat.write(notebook, path.with_suffix(".ipynb"))
        size = path.with_suffix(".ipynb").stat().st_size
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {size / 1e6:.2f} MB", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
