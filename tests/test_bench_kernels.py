"""`specengine bench kernels`: the rows of a checkout's benchmarks, as they say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import specengine
from specengine.cli import app
from specengine.measure import kernels
from specengine.measure.records import read_records

ROWS = [
    {
        "op": "head",
        "shape": "8x4",
        "dtype": "bf16",
        "rows": 1,
        "us": {"median": 4.0},
        "pytorch_us": {"median": 10.0},
    },
    {"op": "head", "shape": "8x4", "dtype": "bf16", "rows": 9, "us": {"median": 250.0}, "share": 0.5},
]


@pytest.fixture
def pytest_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; each writes ROWS, the benchmark of `embed` fails."""
    commands: list[list[str]] = []
    really_run = subprocess.run

    def run(command: list[str], **given: Any) -> Any:
        if "--results" not in command:
            return really_run(command, **given)
        commands.append(command)
        if "bench_embed.py" in command[-1]:
            return SimpleNamespace(returncode=1, stdout="it is wrong", stderr="")
        path = Path(command[command.index("--results") + 1])
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_rows_are_those_of_the_benchmarks(pytest_runs: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    code, text, _ = invoke("head", "norm_qkv", "--json", "--out", str(out))
    assert code == 0
    answer, records = json.loads(text), read_records(out)
    assert answer["records"] == [record.to_dict() for record in records]
    assert [record.settings["rows"] for record in records] == [1, 9, 1, 9]
    assert records[0].measured == {"us": {"median": 4.0}, "pytorch_us": {"median": 10.0}}
    assert [Path(command[-1]).name for command in pytest_runs] == ["bench_head.py", "bench_norm_qkv.py"]
    assert all("--benchmark-only" in command for command in pytest_runs)


def test_the_table_says_how_much_longer_others_take(
    pytest_runs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = invoke("head")
    assert (code, len(pytest_runs)) == (0, 1)
    first, *rows = text.splitlines()
    assert first.split() == ["op", "shape", "rows", "µs", "of", "memory", "pytorch/ours"]
    assert [row.split() for row in rows] == [
        ["head", "bf16", "8x4", "1", "4", "2.50"],
        ["head", "bf16", "8x4", "9", "250", "50%"],
    ]


def test_a_benchmark_that_fails_ends_it_and_keeps_the_rest(
    pytest_runs: list[list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    code, _, err = invoke("head", "embed", "norm_qkv", "--out", str(out))
    assert code == 1
    assert "2 measurements were made" in err
    assert "the benchmark of embed failed" in err
    assert "it is wrong" in err
    assert len(read_records(out)) == 2


def test_ops_are_those_that_have_a_benchmark(pytest_runs: list[list[str]]) -> None:
    code, text, _ = invoke("--list")
    assert code == 0
    assert set(kernels.DEFAULT_OPS) <= set(text.split())
    code, _, err = invoke("no_such_op")
    assert code == 2
    assert "there is no benchmark of no_such_op" in err
    assert pytest_runs == []


def test_without_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specengine, "__file__", str(tmp_path / "specengine" / "__init__.py"))
    code, _, err = invoke()
    assert (code, err.count("\n")) == (1, 1)
    assert "of a checkout" in err


def test_a_real_benchmark_runs() -> None:
    """One, by pytest itself; and none, which is no silence."""
    code, text, err = invoke("match_verify", "-k", "native and greedy and 1-4", "--json")
    assert code == 0, err
    records = json.loads(text)["records"]
    assert records
    assert all("verify" in record["settings"]["op"] for record in records)
    assert all(record["measured"]["us"]["median"] > 0 for record in records)
    code, _, err = invoke("match_verify", "-k", "no_such_case")
    assert (code, "no benchmark of match_verify of 'no_such_case' runs" in err) == (1, True)
