"""`specengine bench compare`: both sides continue the same ids in the same dtype, and greedy texts are compared."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from law_helpers import CheckpointFactory
from typer.testing import CliRunner

from specengine.cli import app
from specengine.measure import compare, rival
from specengine.measure.compare import Difference
from specengine.measure.records import Record, read_records

SMALL = ["--num-threads", "1", "--dtype", "fp32", "--max-new-tokens", "8", "--ignore-eos"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "compare", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def pair(checkpoint: CheckpointFactory, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("for item\nThe quick brown\n")
    target, draft = (str(checkpoint(with_tokenizer=True, noise=noise)) for noise in (0.0, 0.02))
    return ["--model", target, "--draft-model", draft, "--prompts", str(prompts), *SMALL]


def test_both_sides_continue_the_same_text(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"
    num_threads = torch.get_num_threads()
    code, text, err = invoke(*pair, "-k", "3", "--repeats", "2", "--json", "--out", str(out))
    assert (code, err) == (0, "")
    answer, records = json.loads(text), read_records(out)
    assert torch.get_num_threads() == num_threads
    assert [record.to_dict() for record in records] == answer["records"]
    assert [(each["by"], each["k"]) for each in answer["contestants"]] == [
        ("specengine", 0),
        ("specengine", 3),
        ("transformers", 0),
        ("transformers", 3),
    ]
    assert answer["differences"] == []
    assert len(records) == 4 * 2 * 2
    for prompt in (0, 1):
        same = [record for record in records if record.prompt_index == prompt]
        assert len({tuple(record.measured["token_ids"][0]) for record in same}) == 1
    for record in records:
        measured, speculation = record.measured, record.measured["metrics"]["speculative_decoding"]
        assert measured["tokens"] == len(measured["token_ids"][0]) == 8
        assert measured["seconds"] >= measured["time_to_first_token"] > 0
        assert record.pair["dtype"] == "float32"
        if record.settings["num_speculative_tokens"] == 0:
            assert measured["target_forwards"] == 8
            assert speculation["num_draft_tokens"] == 0
        else:
            assert measured["target_forwards"] < 8
            assert speculation["num_draft_tokens"] > 0
            accepted = speculation["num_accepted_draft_tokens"]
            at_first = record.pair["backend"] != "transformers"  # the prompt's forward judges no drafts
            assert accepted == 8 - at_first - speculation["num_rounds"] + speculation["num_trimmed_tokens"]
    # A rotation has everything of one prompt.
    assert [record.prompt_index for record in records] == ([0] * 4 + [1] * 4) * 2


def test_sampling_lookup_and_what_transformers_lacks(
    pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sampled = ["--temperature", "0.9", "--top-k", "20", "--seed", "3", "--repeats", "1"]
    lookup = [*pair[:2], "--draft-model", "ngram", *pair[4:]]
    code, text, err = invoke(*lookup, *sampled, "-k", "2,auto", "--csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["by"], row["num_speculative_tokens"]) for row in rows] == [
        (by, k) for by in ("specengine", "transformers") for k in ("0", "2", "auto")
    ]
    suffix = [*pair[:2], "--draft-model", "suffix", *pair[4:]]
    code, text, err = invoke(*suffix, "-k", "2", "--repeats", "1")
    assert (code, err) == (0, "specengine: transformers has nothing that drafts as suffix does\n")
    assert "all greedy texts are equal" in text
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [
        ["specengine", "plain"],
        ["specengine", "2"],
        ["transformers", "plain"],
    ]


def made(by: str, k: int, token_ids: list[int], *, seconds: float = 1.0, repeat: int = 0) -> Record:
    measured = {"token_ids": [token_ids], "seconds": seconds, "tokens": len(token_ids)}
    pair = {"backend": "transformers" if by == "transformers" else "native"}
    return Record(
        "compare", "run", {}, pair, {"num_speculative_tokens": k, "temperature": 0.0}, 0, repeat, measured
    )


def test_the_first_difference_is_told_once() -> None:
    records = [
        made("transformers", 0, [1, 2, 4, 3]),
        made("specengine", 0, [1, 2, 3, 4]),
        made("specengine", 5, [1, 2, 3, 4]),
        made("transformers", 5, [1, 2]),
        made("transformers", 0, [1, 2, 4, 3], repeat=1),
    ]
    assert compare.differences(records) == [
        Difference("transformers", 0, 0, 2, 4, 3),
        Difference("transformers", 5, 0, 2, None, 3),
    ]
    sampled = [replace(record, settings={**record.settings, "temperature": 1.0}) for record in records]
    assert compare.differences(sampled) == []


def test_ours_is_faster_by_pairs_of_one_k() -> None:
    ours = [made("specengine", 4, [1, 2], seconds=1.0), made("specengine", 4, [1, 2], seconds=8.0, repeat=1)]
    theirs = [made("transformers", 4, [1], seconds=8.0, repeat=1), made("transformers", 4, [1], seconds=1.0)]
    ratio = compare._ratio(theirs, ours)
    assert ratio is not None
    assert ratio.low == ratio.median == ratio.high == 2.0


def test_a_changed_text_of_ours_is_a_failure(pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = compare.EngineCase.measure

    def forge(case: Any, prompts: Any) -> dict[str, Any]:
        row = measure(case, prompts)
        if case.params.num_speculative_tokens:
            row["token_ids"][0][5] += 1
        return row

    monkeypatch.setattr(compare.EngineCase, "measure", forge)
    code, text, err = invoke(*pair, "-k", "2", "--repeats", "1")
    assert code == 1
    assert "specengine, k = 2: prompt 0 differs from our plain text at new token 5" in text
    assert "this is a defect of specengine" in err


def test_without_transformers_it_is_one_line(pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = invoke(*pair)
    assert (code, out) == (1, "")
    assert err == (
        "specengine: bench compare needs transformers, which is not installed: pip install transformers\n"
    )


def test_an_assisted_generation_that_fails_is_left_out(
    pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = rival.RivalCase._options

    def break_drafts(case: rival.RivalCase) -> dict[str, Any]:
        given = options(case)
        return given if case.params.num_speculative_tokens == 0 else {**given, "assistant_model": 3}

    monkeypatch.setattr(rival.RivalCase, "_options", break_drafts)
    code, text, err = invoke(*pair, "-k", "2", "--repeats", "1")
    assert code == 0
    assert "left out: transformers, k = 2: " in err
    assert sum(line.startswith("transformers") for line in text.splitlines()) == 1
