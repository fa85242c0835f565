"""`specengine run-batch`: a file of requests is answered in order, each once, whatever ends a run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_server import PATIENCE_SECONDS
from typer.testing import CliRunner

from specengine.cli import app
from specengine.engine import Engine
from specengine.server import batch

NUM_REQUESTS = 14
SLOW = 0.3  # a second a token and more, so that there is a middle to be killed in
ENGINE = ("--dtype", "float32", "--block-size", "4", "--num-threads", "1", "--max-batch-size", "3")


def request(place: int, **body: Any) -> dict[str, Any]:
    """Prompts of several kinds; some sampled, without a seed of their own."""
    defaults = {"prompt": "abcab" * (place % 4 + 1), "max_tokens": 10 + place, "temperature": place % 3 / 2}
    return {
        "custom_id": f"request {place}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {**defaults, **body},
    }


def write(path: Path, requests: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in requests), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    last = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    wrong = [request(90, n=99), request(91, model="another"), request(92, prompt=[]), request(93, nonsense=1)]
    return write(tmp_path / "in.jsonl", [*map(request, range(NUM_REQUESTS)), *wrong, last])


@pytest.fixture
def run(chat_model: Path) -> Callable[..., Any]:
    """run(source, output, *options): the command in this process."""

    def invoke(source: Path, output: Path, *options: str) -> Any:
        arguments = ["run-batch", str(source), str(output), "--model", str(chat_model), *ENGINE]
        return CliRunner().invoke(app, [*arguments, "--draft-model", "suffix", *options])

    return invoke


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(answer: dict[str, Any]) -> Any:
    """What is the same in every run: not its ids, its clock and its rounds."""
    body = dict(answer["response"]["body"])
    for name in ("id", "created", "metrics"):
        body.pop(name, None)
    if "usage" in body:  # what was found in the prefix cache depends on who came before
        body["usage"].pop("prompt_tokens_details")
    return answer["custom_id"], answer["response"]["status_code"], body


def test_answers_are_the_librarys_in_order(
    source: Path, tmp_path: Path, run: Callable[..., Any], library: Engine
) -> None:
    output = tmp_path / "out.jsonl"
    done = run(source, output)
    assert done.exit_code == 0, done.output
    assert f"{NUM_REQUESTS + 5} requests answered, 4 of them with an error" in done.stderr
    answers, requests = read(output), read(source)
    assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in requests]
    for place in range(NUM_REQUESTS):
        body, asked = answers[place]["response"]["body"], requests[place]["body"]
        expected = library.generate(
            asked["prompt"],
            temperature=asked["temperature"],
            max_new_tokens=asked["max_tokens"],
            seed=body["metrics"]["seed"],
        )
        assert body["choices"][0]["text"] == expected.text
    wrong = [each["response"] for each in answers[NUM_REQUESTS:-1]]
    assert [each["status_code"] for each in wrong] == [400, 404, 400, 400]
    assert [each["body"]["error"]["param"] for each in wrong] == ["n", "model", "prompt", None]
    assert answers[-1]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert all(each["error"] is None for each in answers)
    again = run(source, output)
    assert again.exit_code == 0
    assert "all 19 requests are answered" in again.stderr
    assert read(output) == answers


def test_another_seed_gives_other_texts(source: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    outputs = [tmp_path / f"{seed}.jsonl" for seed in ("0", "1")]
    for output in outputs:
        assert run(source, output, "--seed", output.stem).exit_code == 0
    first, second = ([kept(each) for each in read(output)] for output in outputs)
    same = [place for place in range(NUM_REQUESTS) if first[place] == second[place]]
    assert set(same) >= {place for place in range(NUM_REQUESTS) if place % 3 == 0}, "greedy ones"
    assert len(same) < NUM_REQUESTS


def test_wherever_an_output_was_cut_off_it_is_gone_on_with(
    source: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    output = tmp_path / "out.jsonl"
    assert run(source, output).exit_code == 0
    whole = output.read_bytes()
    expected = [kept(each) for each in read(output)]
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[5] + 7, ends[-2], len(whole) - 1):
        output.write_bytes(whole[:cut])
        done = run(source, output)
        assert done.exit_code == 0, done.output
        assert [kept(each) for each in read(output)] == expected
        num_whole = whole[:cut].count(b"\n")
        assert (
            output.read_bytes()[: ends[num_whole - 1] if num_whole else 0]
            == whole[:cut][: ends[num_whole - 1] if num_whole else 0]
        )


def test_a_run_that_is_killed_in_the_middle_is_gone_on_with(
    source: Path, tmp_path: Path, chat_model: Path, run: Callable[..., Any]
) -> None:
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    assert run(source, undisturbed).exit_code == 0
    slowly = (
        "import sys, time\nfrom specengine.engine import Engine\nstep = Engine.step\n"
        f"Engine.step = lambda self: (time.sleep({SLOW}), step(self))[1]\n"
        "from specengine.cli import main\nmain(sys.argv[1:])"
    )
    arguments = ["run-batch", str(source), str(output), "--model", str(chat_model), *ENGINE]
    for num_lines in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", slowly, *arguments], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 4 * PATIENCE_SECONDS
        while not output.exists() or output.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert output.read_bytes().count(b"\n") < NUM_REQUESTS, "it was in the middle"
    assert run(source, output).exit_code == 0
    assert [kept(each) for each in read(output)] == [kept(each) for each in read(undisturbed)]


def test_an_output_of_another_input_is_left_alone(
    source: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    output = tmp_path / "out.jsonl"
    for content in ('{"custom_id": "another"}\n', "no json\n", '{"custom_id": "request 0"}\n{"x": 1}\n'):
        output.write_text(content, encoding="utf-8")
        done = run(source, output)
        assert done.exit_code == 1
        line = content.count("\n")
        assert f"line {line}: not an answer to this input" in done.stderr
        assert output.read_text(encoding="utf-8") == content
    output.unlink()
    with batch.open_output(output):
        done = run(source, output)
    assert done.exit_code == 1
    assert "another process is writing it" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: expected a JSON object, got 'nonsense'"),
        ("[" * 100_000, "line 2: expected a JSON object, got '[[["),
        ("[]", "line 2: expected a JSON object, got '[]'"),
        ('{"custom_id": 7}', "line 2: custom_id must be a string, got 7"),
        (json.dumps(request(0)), "line 2: 'request 0' is line 1's custom_id"),
        (json.dumps({**request(1), "method": "GET"}), "line 2: method must be 'POST', got 'GET'"),
        (json.dumps({**request(1), "url": "/v1/embeddings"}), "line 2: url must be one of /v1/completions"),
        (json.dumps({**request(1), "body": "x"}), "line 2: body must be an object, got 'x'"),
    ],
    ids=["text", "deep", "list", "id", "twice", "method", "url", "body"],
)
def test_an_input_that_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr("specengine.engine.Engine.__init__", lambda *_, **__: pytest.fail("it was loaded"))
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request(0)) + "\n" + line + "\n", encoding="utf-8")
    done = run(source, tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_arguments(tmp_path: Path, source: Path, run: Callable[..., Any]) -> None:
    done = run(tmp_path / "nothing.jsonl", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert "nothing.jsonl" in done.stderr
    done = run(source, tmp_path / "nowhere" / "out.jsonl")
    assert done.exit_code == 1
    assert "nowhere" in done.stderr
    done = CliRunner().invoke(app, ["run-batch", str(source), str(tmp_path / "o"), "--model", "/nowhere"])
    assert done.exit_code == 1
    assert "Traceback" not in done.output


def test_rays_options_want_ray(tmp_path: Path, source: Path, run: Callable[..., Any]) -> None:
    for option in (("--ray-workers", "2"), ("--ray-address", "127.0.0.1:6379")):
        done = run(source, tmp_path / "out.jsonl", *option)
        assert done.exit_code == 2
        assert f"{option[0]} is of no use without --ray" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["serve", "run-batch"])
def test_without_ray_it_says_what_to_install(source: Path, tmp_path: Path, command: str) -> None:
    arguments = {"serve": [], "run-batch": [str(source), str(tmp_path / "out.jsonl")]}[command]
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"from specengine.cli import main; main({[command, *arguments, '--ray']!r})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 1
    # Whichever of the extra's packages is looked for first.
    assert re.fullmatch(
        r"specengine: --ray needs (ray|pyarrow): pip install 'specengine\[ray\]'\n", output.stderr
    )
