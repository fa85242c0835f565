"""`make demo`: it compares every bit, tells when one differs, and does without a network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specengine import bundled
from specengine.errors import FetchError

SHORT = ["--max-new-tokens", "6", "--repeats", "1", "--color", "never"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tools" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def cannot_fetch(*_: Any, **__: Any) -> Path:
    raise FetchError("smollm2 could not be fetched. From nowhere")


def test_where_nothing_can_be_fetched_the_bundled_pair_is_shown(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "fetch", cannot_fetch)
    assert demo.main(SHORT) == 0
    out, err = capsys.readouterr()
    assert err == (
        "specengine: smollm2 could not be fetched. From nowhere\nspecengine: the bundled pair is shown instead\n"
    )
    assert f"target {bundled.target_path().name}, draft {bundled.draft_path().name}" in out
    assert "identical: yes" in out
    assert all(prompt in out for prompt in demo.COMPLETIONS.values())


def test_what_is_asked_for_by_name_is_not_replaced(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", cannot_fetch)
    with pytest.raises(FetchError):
        demo.main(["--model", "smollm2", *SHORT])


def test_one_bit_of_one_log_probability_is_noticed(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits, asked = demo.bits, []

    def with_a_flipped_bit(result: Any) -> list[tuple[int, bytes]]:
        """In the speculative run of the first case."""
        asked.append(result)
        found: list[tuple[int, bytes]] = bits(result)
        if len(asked) == 2:
            token, (first, *rest) = found[3]
            found[3] = (token, bytes([first ^ 1, *rest]))
        return found

    monkeypatch.setattr(demo, "bits", with_a_flipped_bit)
    assert demo.main(["--model", "bundled", *SHORT]) == 1
    out = capsys.readouterr().out
    assert "identical: NO" in out
    assert out.count(" NO") == 2


@pytest.mark.smollm2
def test_smollm2_is_shown_where_it_was_fetched(
    demo: ModuleType,
    smollm2_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "QUESTIONS", {"a question": "What is the capital of France?"})
    assert demo.main(SHORT) == 0
    out = capsys.readouterr().out
    assert f"target {smollm2_file.name}, draft suffix" in out
    assert "The capital of France is Paris" in out
    assert "identical: yes" in out
