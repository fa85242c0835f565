"""EleutherAI's evaluation harness runs against the server unchanged, and finds the same with drafts and without.

Its package is large and not among the tests' own: where it is installed, this runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running_server import Running

from specengine.engine import Engine

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval[api]")
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITING_TASK = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["@@"], max_gen_toks: 20, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "serving" / "evaluation.sh"


def evaluate(server: Running, model: Path, directory: Path, k: int) -> tuple[float, list[Any]]:
    """The score, and what the harness was told of every choice."""
    from lm_eval.tasks import TaskManager

    arguments = {
        "model": "tiny",
        "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
        "tokenizer": str(model),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 1,
        "max_retries": 1,
        "max_length": 512,
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        gen_kwargs={"num_speculative_tokens": k},
    )
    return found["results"]["tiny"]["acc,none"], [sample["resps"] for sample in found["samples"]["tiny"]]


def test_an_evaluation_finds_the_same_with_drafts(
    start: Any, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows = [
        {"question": f"Number {i} comes after", "choices": [" one", f" {i - 1}", " many"], "answer": 1}
        for i in range(3, 9)
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    drafting, plain = start("suffix"), start(None)
    with_drafts = evaluate(drafting, chat_model, tmp_path, 4)
    without = evaluate(plain, chat_model, tmp_path, 0)
    assert with_drafts == without
    assert len(without[1]) == len(rows)


def test_the_example_scores_what_is_written_with_drafts_and_without(
    server: Running, library: Engine, chat_model: Path, tmp_path: Path
) -> None:
    """In both runs the harness is told what the library writes."""
    questions = [f"{word} {word} {word}" for word in ("one", "two", "three")]
    tokenizer = library.tokenizer
    assert tokenizer is not None
    # The harness sends ids, and none that the tokenizer would put before a text.
    texts = [library.generate(tokenizer.encode_part(each), max_new_tokens=20).text for each in questions]
    rows = [{"question": each, "answer": text} for each, text in zip(questions, texts, strict=True)]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "writing.yaml").write_text(WRITING_TASK.format(data=data))
    done = subprocess.run(
        [
            *("bash", str(SCRIPT), "tiny", str(chat_model), "--tasks", "writing"),
            *("--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path / "found")),
        ],
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "cache"),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{server.port}/v1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [
        [json.loads(line)["resps"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(tmp_path.glob("found/**/samples_writing_*.jsonl"))
    ]
    assert found == 2 * [[[[text]] for text in texts]]
    plain, drafted = re.findall(r"exact_match\|[^|]*\|\s*([\d.]+)\|", done.stdout)
    assert plain == drafted
    assert server.metric("spec_decode_num_draft_tokens_total") > 0
