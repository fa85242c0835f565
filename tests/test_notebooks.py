"""The notebooks run, in small, and those that are shown are these very sources, executed."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
Figure = pytest.importorskip("matplotlib.figure").Figure

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]_*.py"))
MAX_BYTES = 1_500_000
# Pictures of each at the least: what the originals drew is drawn.
NUM_PICTURES = {"1": 7, "2": 1, "3": 10, "4": 5, "5": 11}


def test_there_are_five() -> None:
    assert [path.name[0] for path in SCRIPTS] == list(NUM_PICTURES)
    assert sorted(FOLDER.glob("*.ipynb")) == [path.with_suffix(".ipynb") for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain script, which every reader can run too. Its own assertions say that texts are equal."""
    drawn: list[str] = []
    save = Figure.savefig

    def count(figure: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(str(figure))
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", count)
    monkeypatch.setenv("SPECENGINE_NOTEBOOKS_SMALL", "1")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    with warnings.catch_warnings():
        runpy.run_path(str(script))
    assert sys.modules["common"].IS_SMALL
    assert len(drawn) >= NUM_PICTURES[script.name[0]]
    monkeypatch.delitem(sys.modules, "common")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_shown_is_the_source_executed(script: Path) -> None:
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    source = jupytext.read(script)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], "`make notebooks` brings them up to date"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= NUM_PICTURES[script.name[0]]
    assert all(re.search(r"\d", output.metadata["image/png"]["alt"]) for output in pictures)
    assert len(text.encode()) < MAX_BYTES


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_ran_on_and_what_was_wrong(script: Path) -> None:
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    shown = json.dumps(notebook["cells"][1:3])
    assert "This ran on:" in shown
    assert "as small as can be" not in shown, "it was run in small"
    last = "".join(notebook["cells"][-1]["source"])
    assert last.startswith("## What the original got wrong")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_knows_nothing_of_the_machine_it_ran_on(script: Path) -> None:
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [text for kind, text in output.get("data", {}).items() if kind != "image/png"]
            shown = " ".join([*map(str, texts), output.get("text", "")])
            assert not re.search(r"(^|[\s'\"(])/(root|home|work|tmp|usr|opt)/", shown), shown
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
