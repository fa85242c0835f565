"""`specengine bench sweep`: every combination once, plain decoding beside each, and the numbers are the records'."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from pathlib import Path

import pytest
from law_helpers import CheckpointFactory
from typer.testing import CliRunner

from specengine.cli import app
from specengine.engine import Engine
from specengine.measure import sweep
from specengine.measure.records import Record, read_records

SMALL = ["--num-prompts", "3", "--repeats", "2", "--max-new-tokens", "4", "--ignore-eos"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", "sweep", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_every_combination_once_with_plain_decoding_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine at a time, also where only what is stored in 8 bits has another dtype; text of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    open_engines: list[Engine] = []
    close = Engine.close
    load = sweep.Setup.load

    def load_alone(setup: sweep.Setup) -> Engine:
        assert not open_engines
        open_engines.append(load(setup))
        return open_engines[0]

    monkeypatch.setattr(sweep.Setup, "load", load_alone)
    monkeypatch.setattr(Engine, "close", lambda engine: (close(engine), open_engines.clear()))
    out = tmp_path / "measured.jsonl"
    axes = "-k 2 --temperature 0,1 --top-k 0,50 --batch-size 1,2 --dtype fp32,bf16 --weight-dtype int8"
    axes += " --enable-prefix-cache off,on --draft-model suffix+ngram --repeats 1"
    code, text, err = invoke(*SMALL, *axes.split(), "--out", str(out))
    assert (code, err) == (0, "")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    records = read_records(out)
    cells = {tuple(sweep.cell_of(record).values()) for record in records}
    # Filters change nothing at temperature 0.
    requests = [
        (size, top_k, t) for size, top_k, t in itertools.product((1, 2), (0, 50), (0, 1)) if t or not top_k
    ]
    assert len(cells) == 2 * 2 * len(requests) == 24
    assert {cell[0] for cell in cells} == {"suffix+ngram:2-4"}
    assert {cell[1] for cell in cells} == {"float32", "bfloat16"}
    # 3 prompts one by one, or in 2 batches.
    assert len(records) == 2 * 2 * (3 * 3 + 3 * 2) * 2
    for cell in sweep.summarize(records):
        assert cell.num_measured == (3 if cell.cell["batch_size"] == 1 else 2)
        assert cell.speedup is not None
        assert (cell.k != 0) or cell.speedup.low == cell.speedup.high == 1.0
    # The rotation of a cell is not left before it is done.
    runs = [tuple(sweep.cell_of(record).values()) for record in records]
    assert len([cell for cell, _ in itertools.groupby(runs)]) == len(cells)
    cached = {record.settings["enable_prefix_cache"]: 0 for record in records}
    for record in records:
        cached[record.settings["enable_prefix_cache"]] += record.measured["metrics"]["num_cached_tokens"]
    assert cached[False] == 0 < cached[True]


def test_json_csv_and_the_file_say_the_same(tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"
    axes = ["-k", "3", "--temperature", "0.8"]
    code, text, _ = invoke(*axes, *SMALL, "--json", "--out", str(out))
    answer, first = json.loads(text), read_records(out)
    assert (code, answer["is_complete"]) == (0, True)
    assert [record.to_dict() for record in first] == answer["records"]
    assert answer["cells"] == [json.loads(json.dumps(cell.to_dict())) for cell in sweep.summarize(first)]
    code, text, _ = invoke(*axes, *SMALL, "--csv", "--out", str(out))
    assert code == 0
    both = read_records(out)
    assert both[: len(first)] == first
    rows = list(csv.DictReader(io.StringIO(text)))
    cells = sweep.summarize(both[len(first) :])
    assert [(row["temperature"], row["num_speculative_tokens"]) for row in rows] == [
        ("0.8", "0"),
        ("0.8", "3"),
    ]
    for row, cell in zip(rows, cells, strict=True):
        assert cell.speedup is not None
        assert float(row["speedup_low"]) == cell.speedup.low
        assert float(row["acceptance_rate"]) == cell.acceptance_rate


def made(k: int, prompt: int, repeat: int, *, seconds: float, drafted: int = 0, accepted: int = 0) -> Record:
    """A record of two tokens."""
    speculation = {
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "num_rounds": 2,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
    }
    measured = {
        "seconds": seconds,
        "tokens": 2,
        "time_to_first_token": 0.1,
        "tokens_per_second": 2 / seconds,
        "target_forwards": 3,
        "shares": None,
        "peak_bytes": None,
        "metrics": {
            "num_prompt_tokens": 60,
            "num_cached_tokens": 10,
            "prompt_time": 0.1,
            "speculative_decoding": speculation,
        },
    }
    names = dict.fromkeys(sweep.CELL_NAMES)
    return Record("sweep", "run", {}, names, {**names, "num_speculative_tokens": k}, prompt, repeat, measured)


def test_speed_up_is_of_pairs_and_acceptance_of_all_rounds() -> None:
    """Each generation against plain decoding of its own prompt and repeat, whatever the order of rows."""
    plain = [
        made(0, prompt, repeat, seconds=10 ** (2 * prompt + repeat)) for prompt in (0, 1) for repeat in (0, 1)
    ]
    factors = {(0, 0): 2.0, (0, 1): 3.0, (1, 0): 3.0, (1, 1): 4.0}
    fast = [
        made(4, *key, seconds=10 ** (2 * key[0] + key[1]) / factor, drafted=10, accepted=int(factor))
        for key, factor in factors.items()
    ]
    fast.append(made(4, 2, 0, seconds=1.0, drafted=60, accepted=28))  # its pair is missing: an interruption
    _, cell = sweep.summarize([*reversed(fast), *plain])
    assert cell.speedup is not None
    assert cell.latency_reduction is not None
    assert cell.speedup.median == pytest.approx(3.0)
    assert 2.0 <= cell.speedup.low < 3.0 < cell.speedup.high <= 4.0
    assert cell.latency_reduction.median == pytest.approx(1 - 1 / 3)
    assert cell.acceptance_rate == (2 + 3 + 3 + 4 + 28) / 100
    assert cell.acceptance_deviation == pytest.approx(statistics.stdev([0.2, 0.3, 0.3, 0.4, 28 / 60]))
    assert cell.mean_acceptance_length == 1 + 40 / 10
    assert cell.prompt_tokens_per_second.median == pytest.approx(500.0)
    with pytest.raises(ValueError, match="plain decoding of prompt 0 was measured twice as repeat 1"):
        sweep.summarize([*plain, plain[1]])


def test_directories_and_what_drafts_together(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """A directory's name may hold a comma or a plus."""
    target = checkpoint(with_tokenizer=True)
    draft = tmp_path / "a,b+c"
    draft.symlink_to(checkpoint(with_tokenizer=True, noise=0.05))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("for item\nThe quick\n")
    model = ["--model", str(target), "--draft-model", str(draft), "--draft-model", "ngram, self:1"]
    code, text, err = invoke(
        *model,
        "-k",
        "2",
        "--temperature",
        "0",
        "--prompts",
        str(prompts),
        "--repeats",
        "1",
        *SMALL[4:],
        "--csv",
    )
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["draft_model"] for row in rows[::2]] == [str(draft), "ngram:2-4", "self:1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0,x"], "'x' is not a number"),
        (["--top-p", "0"], "top_p must be"),
        (["--dtype", "auto,float32"], "dtype='auto' is one of the others"),
        (["--enable-prefix-cache", "maybe"], "list of on and off"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--batch-size", "64"], "more than max_batch_size=32"),
        (["--draft-model", "suffix,self:99"], "self:99"),
        (["--model", "m"], "needs a draft_model"),
        (["--model", "m", "--draft-model", "bundled"], "no --model goes with it"),
        (["--json", "--csv"], "--json and --csv"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep.Setup, "load", None)
    code, out, err = invoke(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
