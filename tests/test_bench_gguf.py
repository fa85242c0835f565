"""The benchmark of one GGUF file: who does what with which prompts, and what its rows compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_gguf
import gguf
import numpy as np
import pytest
from generation import contest
from generation.protocol import Setup, Task
from test_bench_generate import FakeReport, FakeWorker

MATRIX_BYTES = 8 * 32 * 4


class Letters:
    """A token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    encode_part = encode
    roles: Mapping[str, str] = {}


@dataclass
class FakeCheckpoint:
    tokenizer: Letters
    name: str = "tiny"
    chat_template: str | None = "{{ messages[0].content }}"


def write_model(path: Path, *names: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name in names:
        writer.add_tensor(name, np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class FakeMachine:
    """Starts `FakeWorker`s in place of processes, and remembers what they were asked."""

    def __init__(self, **worker: Any) -> None:
        self.calls: list[str] = []
        self.setups: list[Setup] = []
        self.worker = worker

    def start(self, setups: list[Setup], *_: Any, tasks: list[Task]) -> tuple[dict[str, Any], dict[str, str]]:
        self.setups, self.tried_with = setups, [len(task.prompts[0]) for task in tasks]
        workers = {}
        for setup in setups:
            workers[setup.contestant] = FakeWorker(self.calls, setup.contestant, **self.worker)
            workers[setup.contestant].about = {  # type: ignore[attr-defined]
                "settings": "fake",
                "instruction_set": f"of {setup.contestant}",
                "versions": {"fake": "1"},
            }
        return workers, {}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(contest, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bench_gguf, "Report", lambda threads: FakeReport())
    monkeypatch.setattr(bench_gguf, "open_checkpoint", lambda path: FakeCheckpoint(Letters()))
    return write_model(tmp_path / "tiny.gguf", "token_embd.weight", "blk.0.attn_q.weight")


def run(model: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(contest, "start", machine.start)
    return bench_gguf.main(["--gguf", str(model), "--repetitions", "2", "--threads", "1", *arguments])


def test_both_do_the_same_in_turn_and_ours_drafts_in_chats(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, path = FakeMachine(), tmp_path / "rows.jsonl"
    assert run(model, machine, monkeypatch, "--results", str(path)) == 0
    out = capsys.readouterr().out
    assert "tiny.gguf, 100 tokens, 128 new, as stored" in out
    ours, theirs = machine.setups
    assert (ours.target, ours.draft, ours.speculates) == (str(model), "suffix", True)
    assert (theirs.contestant, theirs.target, theirs.speculates) == ("llama.cpp", str(model), False)
    assert machine.tried_with == [100, 1000]
    assert ours.max_seq_len == theirs.max_seq_len >= 1001
    timed = [call for call in machine.calls if not call.endswith(("x8", "1x1"))]
    assert timed == [
        *("ours k=0 1x128", "llama.cpp k=0 1x128", "llama.cpp k=0 1x128", "ours k=0 1x128"),
        *("ours k=0 2x112", "llama.cpp k=0 2x112", "ours k=None 2x112", "ours k=4 2x112", "ours k=8 2x112"),
        *("ours k=8 2x112", "ours k=4 2x112", "ours k=None 2x112", "llama.cpp k=0 2x112", "ours k=0 2x112"),
    ]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["contestant"], row["mode"], row["prompt_tokens"]) for row in rows[:4]] == [
        ("ours", "plain", 100),
        ("llama.cpp", "plain", 100),
        ("ours", "prefill, 1000 tokens", 1000),
        ("llama.cpp", "prefill, 1000 tokens", 1000),
    ]
    drafted = next(row for row in rows if row.get("num_speculative_tokens") == 4)
    assert drafted["ratio_to_plain"] == 1.4, "of our plain decoding of the same chats"
    assert {row["instruction_set"] for row in rows} == {"of ours", "of llama.cpp"}
    assert all(
        {"machine", "processor", "commit", "versions", "weights_mb", "read_bandwidth"} <= set(row)
        for row in rows
    )


def test_drafts_that_change_a_token_are_no_result(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, FakeMachine(lie=True), monkeypatch) == 1
    assert "ours is not exact" in capsys.readouterr().err


def test_what_cannot_be_measured_is_told_in_a_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = FakeCheckpoint(Letters(), chat_template=None)
    monkeypatch.setattr(bench_gguf, "open_checkpoint", lambda path: mute)
    assert run(model, FakeMachine(), monkeypatch) == 1
    assert capsys.readouterr().err == "bench_gguf.py: tiny has no chat template, and chats are measured too\n"
    monkeypatch.undo()
    assert bench_gguf.main(["--gguf", str(tmp_path / "none.gguf")]) == 1
    assert capsys.readouterr().err.endswith("none.gguf: No such file or directory\n")
    with pytest.raises(SystemExit):
        bench_gguf.main(["--gguf", str(model), "--results", str(tmp_path)])
    assert "is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "num_matrices"),
    [
        (("token_embd.weight", "blk.0.attn_q.weight"), 2),
        (("token_embd.weight", "blk.0.attn_q.weight", "output.weight"), 2),
    ],
    ids=["tied", "untied"],
)
def test_a_token_table_is_read_only_where_it_is_the_head(
    names: tuple[str, ...], num_matrices: int, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "x.gguf", *names)
    assert bench_gguf.streamed_bytes(path) == num_matrices * MATRIX_BYTES
