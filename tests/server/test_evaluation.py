"""EleutherAI's evaluation harness runs against the server unchanged, and finds the same with drafts and without.

Its package is large and not among the tests' own: where it is installed, this runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running_server import Running

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
