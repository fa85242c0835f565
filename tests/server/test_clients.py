"""Clients of others: the examples of examples/serving run as they stand, and benchmark clients find what they look for.

Where a client's package is not installed, its test is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_server import Running

from specengine import bundled

SERVING = Path(__file__).resolve().parent.parent.parent / "examples" / "serving"
# What each must print, as patterns: whatever is served; what the bundled pair adds, and what a model that chats does.
SHOWN = {
    "openai_client": [
        r"^48 tokens, \d+ of them drafted, \d\.\d\d a round",
        "without drafts: the same text",
        "refused: temperature must be .*, got -1",
    ],
    "langchain_client": [r"\n---\n", "without drafts: the same texts", "^streamed: the same text"],
}
DRAFTED = {"openai_client": [r"^48 tokens, [1-9]\d* of them drafted, [12345]\.\d\d a round"]}
CHATS = {
    "openai_client": ["^chat: ."],
    "langchain_client": ["^chat: (.|\n)+'output_tokens': 24", "streamed chat: the same text"],
}
NEEDED = {"langchain_client": "langchain_openai"}


def run(server: Running, command: list[str], directory: Path, **environment: str) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env={
            **os.environ,
            "OPENAI_BASE_URL": f"http://127.0.0.1:{server.port}/v1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_program_is_tested() -> None:
    assert {path.stem for path in SERVING.glob("*.py")} == set(SHOWN)


@pytest.fixture(scope="module")
def pair() -> Iterator[Running]:
    """What `specengine serve` serves by itself."""
    with Running(bundled.target_path(), bundled.draft_path()) as running:
        yield running.ready()
        running.check_clean()


@pytest.mark.parametrize("name", SHOWN)
def test_a_program_shows_what_it_is_for(server: Running, pair: Running, tmp_path: Path, name: str) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    for asked, more in ((pair, DRAFTED), (server, CHATS)):
        shown = run(asked, [sys.executable, str(SERVING / f"{name}.py")], tmp_path)
        patterns = [*SHOWN[name], *more.get(name, [])]
        missing = [pattern for pattern in patterns if not re.search(pattern, shown, re.MULTILINE)]
        assert missing == [], shown


@pytest.mark.parametrize("model", ["specengine", "specengine-text"])
def test_the_command_llm_needs_a_file_only(start: Any, tmp_path: Path, model: str) -> None:
    """Of its own: no plugin."""
    pytest.importorskip("llm")
    server = start(server_options={"served_model_name": "specengine"})
    models = yaml.safe_load((SERVING / "llm" / "extra-openai-models.yaml").read_text(encoding="utf-8"))
    assert {each["api_base"] for each in models} == {"http://127.0.0.1:8000/v1"}
    for each in models:
        each["api_base"] = f"http://127.0.0.1:{server.port}/v1"
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models), encoding="utf-8")
    command = ["llm", "-m", model, "-o", "seed", "7", "-o", "max_tokens", "12", "def mean(values):"]
    shown = run(server, command, tmp_path, LLM_USER_PATH=str(tmp_path))
    body = {"max_tokens": 12, "seed": 7}
    if model == "specengine":
        chat = {"messages": [{"role": "user", "content": "def mean(values):"}], **body}
        expected = server.post("/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]
    else:
        expected = server.complete(prompt="def mean(values):", **body)["choices"][0]["text"]
    assert expected.strip()
    assert shown.strip() == expected.strip()


def test_vllms_benchmark_shows_its_speculative_section(start: Any, chat_model: Path, tmp_path: Path) -> None:
    """With the prefix that it looks for."""
    vllm = os.environ.get("VLLM") or shutil.which("vllm")
    if vllm is None:
        pytest.skip("needs vLLM's program on the PATH, or its path as $VLLM")
    server = start(server_options={"metrics_prefix": "vllm"})
    command = [
        *(vllm, "bench", "serve", "--base-url", f"http://127.0.0.1:{server.port}", "--model", server.model),
        *("--tokenizer", str(chat_model), "--dataset-name", "random", "--random-input-len", "16"),
        *("--random-output-len", "16", "--num-prompts", "3"),
        *("--extra-body", '{"num_speculative_tokens": 4}'),
    ]
    shown = run(server, command, tmp_path)
    assert re.search(r"Successful requests: +3\b", shown), shown
    assert re.search(r"-Speculative Decoding-+\nAcceptance rate \(%\): +\d", shown), shown
    drafted = re.search(r"Draft tokens: +(\d+)", shown)
    assert drafted
    assert int(drafted[1]) > 0
    assert re.search(r"Position 0: +\d", shown), shown
