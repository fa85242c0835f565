"""The repository keeps its promises: documented names, consistent versions, a README whose code runs."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import specengine
from specengine.kernels.reference import OPS
from specengine.models.registry import ARCHITECTURES
from specengine.ops.backend import Backend
from specengine.ops.native import NativeBackend

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PUBLIC_NAMES = [name for name in specengine.__all__ if name != "__version__"]
SELF_EXPLANATORY = {
    *("prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "metrics", "speculative_decoding"),
    *("index", "error", "seed", "num_prompt_tokens", "num_generated_tokens"),
}
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def page_without_transcripts(page: str) -> str:
    """What is between lines of ~~~ is what a model said, blocks of code included."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(
        r"^~~~.*?^~~~$", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )


def python_blocks() -> list[Any]:
    """Every Python block of the pages, with a name that says where it is."""
    blocks = []
    for page in PAGES:
        text = page_without_transcripts(page)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            blocks.append(pytest.param(match.group(1), id=f"{page}:{line}"))
    return blocks


# Names


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(specengine, name)
    assert value.__doc__, f"{name} has no docstring"
    assert not value.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclasses make"
    functions = {name: member for name, member in vars(value).items() if inspect.isfunction(member)}
    undocumented = [
        name for name, member in functions.items() if not name.startswith("_") and not member.__doc__
    ]
    assert set(undocumented) <= {"to_dict"}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_field_is_described(name: str) -> None:
    value = getattr(specengine, name)
    if not is_dataclass(value):
        return
    undescribed = [
        field.name for field in fields(value) if not re.search(rf"\b{field.name}\b", value.__doc__ or "")
    ]
    assert set(undescribed) <= SELF_EXPLANATORY


def test_dir_and_all_agree() -> None:
    assert set(specengine.__all__) <= set(dir(specengine))
    assert sorted(specengine.__all__) == sorted(set(specengine.__all__))
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = specengine.generat  # type: ignore[attr-defined]


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import specengine, sys; print(sorted({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert output.stdout == "[]\n", output.stderr


def test_the_command_line_is_quick_to_say_no(tmp_path: Path) -> None:
    """Usage errors do not wait for PyTorch to load."""
    code = (
        "import sys\n"
        "from specengine.cli import main\n"
        "try: main(['generate', 'x', '--top-p', '2'])\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert output.stdout == "2 False\n", output.stderr


# Benchmarks

BENCHMARKS = ROOT / "benchmarks"
# What prints a machine and its instruction set, or adds them to rows.
NAMES_THE_MACHINE = re.compile(r"\b(append_rows|about_processor|machine_name)\(|\breport: Report\b")
MEASURE_NOTHING = {"pairs.py", "gpu_model.py"}
WITH_A_TABLE_OF_THEIR_OWN = {"tune_tiles.py": '"source"'}  # tiles for a GPU, whose name the table has


def measuring_scripts() -> list[Path]:
    is_run = re.compile(r"^def test_|^if __name__ == ", re.MULTILINE)
    return [
        path
        for path in sorted(BENCHMARKS.glob("*.py"))
        if not path.name.startswith("test_")
        and path.name not in MEASURE_NOTHING
        and is_run.search(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("path", measuring_scripts(), ids=lambda path: path.name)
def test_every_benchmark_names_the_instruction_set(path: Path) -> None:
    """That those names do is tested in benchmarks/test_measure.py."""
    source = path.read_text(encoding="utf-8")
    known = WITH_A_TABLE_OF_THEIR_OWN.get(path.name)
    assert NAMES_THE_MACHINE.search(source) if known is None else known in source


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.jsonl")), ids=lambda path: path.name)
def test_every_row_that_was_kept_names_its_instruction_set(path: Path) -> None:
    known = re.compile(r"\b(portable|avx2|avx512|avx512_bf16|avx512_vnni|\w*amx\w*)\b")
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row.get("instruction_set") or known.search(row["machine"]), row


# Versions


def constraints(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in pinned}


def requirements(*extras: str) -> list[Requirement]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != "specengine"]


def test_every_extra_is_checked() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        "gpu",
        "report",
        "serve",
        "ray",
        "docs",
        "notebooks",
        "test",
        "dev",
        "bench",
    }


@pytest.mark.parametrize(
    ("path", "extras"),
    [
        ("constraints.txt", ("gpu", "report", "serve", "ray", "docs", "notebooks", "test", "dev")),
        ("benchmarks/constraints.txt", ("bench",)),
    ],
)
def test_every_dependency_is_pinned_to_an_allowed_version(path: str, extras: tuple[str, ...]) -> None:
    pinned = constraints(path)
    for requirement in requirements(*extras):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in {path}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_both_environments_have_one_torch() -> None:
    """They load the same extension."""
    assert constraints("constraints.txt")["torch"] == constraints("benchmarks/constraints.txt")["torch"]


def test_every_package_is_shipped() -> None:
    """setuptools is given a list: a new folder must be on it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "specengine").rglob("__init__.py")
    }
    found |= {
        ".".join(["specengine", *path.parent.relative_to(ROOT).parts])
        for path in (ROOT / "kernels").rglob("__init__.py")
    }
    assert found == set(settings["packages"])
    for package in found:
        importlib.import_module(package)


def test_every_concrete_module_is_kept_apart() -> None:
    """New ones too: drafters and architectures have a folder each, all of which may not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    listed = {
        module
        for contract in contracts["contracts"]
        if contract["type"] == "independence"
        for module in contract["modules"]
    }
    folder = "specengine.models.architectures"
    assert {name.rpartition(".")[0] for name in ARCHITECTURES.values()} == {folder}
    assert listed == {"specengine.drafters.*", f"{folder}.*"}


def test_the_version_is_the_projects() -> None:
    assert specengine.__version__ == PROJECT["version"]


# Files


def test_ci_is_executable() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!")


def test_every_target_of_the_makefile_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    for target in phony.group(1).split():
        assert re.search(rf"^{target}:.*## ", text, re.MULTILINE), f"{target} has no explanation"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    """Relative links, and paths in backticks that begin with a folder of the repository."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    targets = [path.parent / link for link in links if link and "://" not in link]
    folders = "specengine|kernels|csrc|benchmarks|tests|tools|docs|examples|\\.ci"
    targets += [ROOT / name for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text)]
    missing = [str(target.relative_to(ROOT)) for target in targets if not target.exists()]
    assert missing == []


def test_no_print_in_the_package() -> None:
    for path in [*(ROOT / "specengine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"^\s*print\(", code, re.MULTILINE), path


# Pages


@pytest.mark.parametrize("code", python_blocks())
def test_python_on_the_pages_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})
    expected = re.findall(r"#: (.*)$", code, re.MULTILINE)
    assert [line for line in expected if line not in capsys.readouterr().out] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_says_what_it_is(page: str) -> None:
    """So that none escapes the test above: Python that cannot run here, for want of a model, is marked `py`."""
    text = page_without_transcripts(page)
    assert set(re.findall(r"^ *```(.*)\n(?:.*\n)*? *```$", text, re.MULTILINE)) <= {
        "python",
        "py",
        "json",
        "bash",
        "text",
    }


# Four twins


INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', re.MULTILINE)


@pytest.mark.parametrize(
    ("room", "allowed"), [("core", {"core"}), ("isa", {"core", "isa"}), ("python", {"core", "python"})]
)
def test_rooms_of_the_extension_include_their_own_and_what_is_below(room: str, allowed: set[str]) -> None:
    """Only `csrc/python` knows PyTorch and Python; the core knows `csrc/isa` as tables of functions."""
    paths = sorted((ROOT / "csrc" / room).iterdir())
    assert paths
    for path in paths:
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            first, is_ours = name.split("/")[0], (ROOT / "csrc" / name).exists()
            assert not is_ours or first in allowed, f"{path}: {name}"
            if room != "python":
                is_known = first in ("torch", "ATen", "c10", "pybind11") or name.startswith("Python")
                assert not is_known, f"{path}: {name}"


def test_every_op_has_its_four_twins() -> None:
    """A Triton kernel, a reference, a test and a benchmark of one name, and nothing beside them. Rules that differ in
    one line are tested by one file."""
    infrastructure = {"__init__", "packed", "program"}
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")} - infrastructure
    references = {path.stem for path in (ROOT / "kernels" / "reference").glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert kernels == references == set(OPS)
    tested_together = {"lossy_verify": {"threshold_verify", "typical_verify"}}
    assert set(OPS) <= tests.union(*(ops for name, ops in tested_together.items() if name in tests))
    assert set(OPS) <= benchmarks


@pytest.mark.parametrize("op", OPS)
def test_twins_have_one_signature(op: str) -> None:
    """Triton's may have more options, by keyword."""
    ours, theirs = (
        inspect.signature(getattr(importlib.import_module(f"specengine.kernels.{place}{op}"), op)).parameters
        for place in ("", "reference.")
    )
    options = {name for name, each in ours.items() if each.kind is each.KEYWORD_ONLY}
    assert [name for name in ours if name not in options - set(theirs)] == list(theirs)
    assert list(inspect.signature(getattr(Backend, op)).parameters) == ["self", *theirs]
    assert hasattr(NativeBackend(), op)
