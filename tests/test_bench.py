"""`specengine bench`: what it says is what the engine measured, in an order that is fair, and nothing is lost."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specengine.cli import app, bench_latency
from specengine.measure import latency, runs
from specengine.measure.bench_prompts import read_prompts
from specengine.measure.records import read_records

SMALL = ["-k", "2,auto", "--num-prompts", "2", "--repeats", "2", "--max-new-tokens", "6", "--ignore-eos"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "latency", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_every_number_is_the_engines(tmp_path: Path) -> None:
    """In the table, in JSON and in the file; another run is appended."""
    out = tmp_path / "measured.jsonl"
    code, text, err = invoke(*SMALL, "--json", "--out", str(out))
    assert (code, err) == (0, "")
    answer = json.loads(text)
    records = read_records(out)
    assert [record.to_dict() for record in records] == answer["records"]
    assert len(records) == 3 * 2 * 2
    for record in records:
        measured, metrics = record.measured, record.measured["metrics"]
        assert measured["seconds"] == metrics["total_time"] > measured["time_to_first_token"] > 0
        assert measured["tokens"] == metrics["num_generated_tokens"] == 6
        assert sum(measured["shares"].values()) == pytest.approx(1.0)
        assert min(measured["shares"].values()) >= 0
        is_plain = record.settings["num_speculative_tokens"] == 0
        assert (metrics["speculative_decoding"]["num_draft_tokens"] == 0) or not is_plain
        assert measured["peak_bytes"] is None or measured["peak_bytes"] > 1_000_000
    assert answer["is_complete"]
    assert answer["summaries"] == [
        json.loads(json.dumps(each.to_dict())) for each in latency.summarize(records)
    ]
    assert [(each["prompt_index"], each["k"]) for each in answer["summaries"]] == [
        (index, k) for index in (None, 0, 1) for k in (0, 2, "auto")
    ]
    assert answer["summaries"][0]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}

    code, text, _ = invoke(*SMALL, "--csv", "--out", str(out))
    assert code == 0
    both = read_records(out)
    assert both[: len(records)] == records
    assert len({record.run for record in both}) == 2
    rows = list(csv.DictReader(io.StringIO(text)))
    expected = latency.summarize(both[len(records) :])
    assert [float(row["seconds"]) for row in rows] == [each.seconds.median for each in expected]


def test_settings_take_turns_at_coming_first(tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"
    assert invoke(*SMALL, "--out", str(out))[0] == 0
    turns = [record.settings["num_speculative_tokens"] for record in read_records(out)]
    assert turns == [0, 2, "auto", 2, "auto", 0, "auto", 0, 2, 0, 2, "auto"]


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, out = runs.measured, tmp_path / "measured.jsonl"
    calls: list[Any] = []

    def interrupt(results: Any, **given: Any) -> dict[str, Any]:
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measured(results, **given)

    monkeypatch.setattr(runs, "measured", interrupt)
    code, text, err = invoke(*SMALL, "--out", str(out))
    assert code == 130
    assert f"4 of 12 measurements were made; they are in {out}" in err
    assert "plain" in text
    assert len(read_records(out)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "0"], "num_speculative_tokens"),
        (["-k", "2,x"], "'x' is neither"),
        (["--json", "--csv"], "--json and --csv"),
        (["--model", "m", "-k", "auto"], "needs a draft_model"),
        (["--num-prompts", "201"], "holds 200 prompts"),
        (["--prompts", "no-such-file"], "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, err = invoke(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_prompts_from_files(tmp_path: Path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("  one\r\n\ntwo", encoding="utf-8-sig")
    lines.write_text('"one"\n\n{"id": 3, "prompt": "two\\n"}\n')
    assert read_prompts(text, None) == ["  one", "two"]
    assert read_prompts(lines, None) == ["one", "two\n"]
    assert read_prompts(lines, 1) == ["one"]
    lines.write_text('"one"\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: expected a string"):
        read_prompts(lines, None)


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    path.write_text('{"kind": "latency"}\n')
    with pytest.raises(ValueError, match=r"measured\.jsonl:1: not a measured row"):
        read_records(path)


def test_a_real_interruption_at_a_real_terminal(tmp_path: Path) -> None:
    """A table grows with how much is left; Ctrl-C ends it, and the file holds what is said to be in it."""
    out = tmp_path / "measured.jsonl"
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "specengine", "bench", "latency", "-k", "1,2", "--repeats", "10000"]
    running = subprocess.Popen(
        [*command, "--max-new-tokens", "6", "--out", str(out)],
        stdin=there,
        stdout=subprocess.PIPE,
        stderr=there,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(there)
    said, is_sent = b"", False
    with contextlib.suppress(OSError):  # the terminal's end, once nobody writes to it
        while read := os.read(here, 65536):
            said += read
            if not is_sent and out.exists() and out.read_bytes().count(b"\n") > 20:
                running.send_signal(signal.SIGINT)
                is_sent = True
    os.close(here)
    table, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert "tokens/s" in text
    assert re.search(r"measuring .*/90000 .* left", text)
    assert b"plain" in table
    made = re.search(r"interrupted: (\d+) of 90000 measurements were made", text)
    assert made
    assert len(read_records(out)) == int(made.group(1)) > 20


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_table_is_whole_at_any_width(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns nothing is cut and no line is broken: what is too wide for one table is two."""
    monkeypatch.setenv("COLUMNS", width)
    code, text, _ = invoke(*SMALL)
    lines = text.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= int(width)
    assert "…" not in text
    heads = [line for line in lines if line.startswith("k ")]
    assert len(heads) == 3 * (2 if width == "80" else 1)
    for title in bench_latency.TITLES[1:]:
        assert sum(title in line for line in heads) == 3, title
    for line in (line for line in lines if line.startswith("plain ")):
        assert len(line.split("  ")) > 4
