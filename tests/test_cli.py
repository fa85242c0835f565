"""The command line: what goes where, what it exits with, and how it ends when it is interrupted."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import specengine
from specengine import EngineConfig, SamplingParams, StreamEvent, bundled, call
from specengine.call import prepare_call
from specengine.cli import app, main
from specengine.cli.terminal import STYLES, paint, wants_color
from specengine.config import ModelOptions
from specengine.models.checkpoints.tokenizer_files import read_tokenizer
from specengine.runtime.text import TokenPainter
from specengine.tokenizer import Tokenizer

PROMPT = "def binary_search(items, x):"
COMMAND = [sys.executable, "-m", "specengine"]


def invoke(*arguments: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    return result.exit_code, result.stdout, result.stderr


def run(*arguments: str, stdin: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, as a user's shell would."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def expected() -> str:
    """The bundled pair's continuation of `PROMPT`."""
    return specengine.generate(PROMPT, max_new_tokens=12).text


# generate


def test_the_text_is_on_stdout_and_nothing_on_stderr(expected: str) -> None:
    for stream in ("--stream", "--no-stream"):
        assert invoke("generate", PROMPT, "--max-new-tokens", "12", stream) == (0, expected + "\n", "")


@pytest.mark.parametrize("prompt", [["--prompt", "-"], ["-"]])
def test_the_prompt_from_stdin(prompt: list[str], expected: str) -> None:
    code, out, _ = invoke("generate", *prompt, "--max-new-tokens", "12", stdin=PROMPT + "\n")
    assert (code, out) == (0, expected + "\n")


def test_json_is_one_object_and_nothing_else(expected: str) -> None:
    code, out, err = invoke(
        "generate", PROMPT, "--max-new-tokens", "12", "--json", "--logprobs", "2", "-k", "3"
    )
    result = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert result["text"] == result["outputs"][0]["text"] == expected
    assert len(result["outputs"][0]["logprobs"]) == 12
    assert len(result["outputs"][0]["logprobs"][0]["top"]) == 2
    assert result["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    assert (result["model"], result["draft_model"]) == (str(bundled.target_path()), str(bundled.draft_path()))


def test_several_drafters_one_by_one(expected: str) -> None:
    given = ("--draft-model", "ngram", "--draft-model", "self:1")
    code, out, _ = invoke("generate", PROMPT, "--max-new-tokens", "12", "-k", "3", "--json", *given)
    assert code == 0
    result = json.loads(out)
    assert result["text"] == expected
    assert result["draft_model"] == "ngram:2-4+self:1"
    for wrong, shown in (("ngram", "'ngram' twice"), ("self:99", "'self:99'")):
        code, out, err = invoke("generate", PROMPT, *given, "--draft-model", wrong)
        assert (code, out) == (2, "")
        assert shown in err


def test_statistics_go_to_stderr(expected: str) -> None:
    code, out, err = invoke("generate", PROMPT, "--max-new-tokens", "12", "--stats")
    assert (code, out) == (0, expected + "\n")
    assert "acceptance rate" in err
    assert "tokens/s" in err


def test_a_lossy_mode_says_so() -> None:
    sampled = ("generate", PROMPT, "--max-new-tokens", "12", "--acceptance", "threshold", "--temperature")
    done = run(*sampled, "0.8", "--stats")
    assert done.returncode == 0
    assert done.stderr.count("specengine: warning: acceptance='threshold': lossy") == 1
    assert "NO: not distributed as the target says" in done.stderr
    with pytest.warns(UserWarning, match="lossy"):
        _, out, _ = invoke(*sampled, "0.8", "--json")
    assert json.loads(out)["lossless"] is False
    _, _, err = invoke(*sampled, "0", "--stats")
    assert "lossy" not in err
    assert re.search(r"lossless +yes", err)


def test_color_changes_nothing_but_the_color(expected: str) -> None:
    code, out, err = invoke("generate", PROMPT, "--max-new-tokens", "12", "--color", "always")
    assert code == 0
    assert "the target's own" in err
    assert strip_colors(out) == expected + "\n"
    assert out != expected + "\n"


def strip_colors(text: str) -> str:
    for style in STYLES.values():
        before, after = style.render("|").split("|")
        text = text.replace(before, "").replace(after, "")
    return text


def test_every_sampling_option_is_passed_on() -> None:
    given = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 11, "min_new_tokens": 2}
    given |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.1}
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    more = [
        "--bad-word",
        "self",
        "--logit-bias",
        "14=-50",
        "--logit-bias",
        "15=1.5",
        "--stop",
        r"\n\n",
        "--stop",
        "xyz",
    ]
    more += ["--stop-token-id", "3", "--include-stop", "--ignore-eos", "--acceptance", "coupled"]
    result = specengine.generate(
        PROMPT,
        max_new_tokens=20,
        bad_words="self",
        logit_bias={14: -50, 15: 1.5},
        stop=["\n\n", "xyz"],
        stop_token_ids=[3],
        include_stop_str_in_output=True,
        ignore_eos=True,
        acceptance="coupled",
        **given,
    )
    code, out, _ = invoke("generate", PROMPT, "--max-new-tokens", "20", *flags, *more)
    assert (code, out) == (0, result.text + "\n")


def test_samples_come_one_after_the_other() -> None:
    results = specengine.generate(PROMPT, max_new_tokens=6, n=2, temperature=1.0, seed=3)
    code, out, err = invoke(
        "generate", PROMPT, "--max-new-tokens", "6", "--n", "2", "--temperature", "1", "--seed", "3"
    )
    assert (code, out) == (0, "".join(f"{output.text}\n" for output in results.outputs))
    assert err == "--- sample 0\n--- sample 1\n"


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", PROMPT, "--temprature", "1"], ["--temprature"]),
        (["generate", PROMPT, "--temperature", "hot"], ["--temperature", "'hot'"]),
        (["generate", PROMPT, "--temperature", "nan"], ["temperature", "nan"]),
        (["generate", PROMPT, "--top-p", "1.5"], ["top_p", "1.5"]),
        (["generate", PROMPT, "-k", "65"], ["num_speculative_tokens", "65"]),
        (["generate", PROMPT, "-k", "many"], ["--num-speculative-tokens", "'many'"]),
        (["generate", PROMPT, "--n", "1000000"], ["n must", "1000000"]),
        (["generate", PROMPT, "--seed", "-1"], ["seed", "-1"]),
        (["generate", PROMPT, "--backend", "gpu"], ["backend", "'gpu'"]),
        (["generate", PROMPT, "--device", "toaster"], ["device", "'toaster'"]),
        (["generate", PROMPT, "--dtype", "float8"], ["dtype", "'float8'"]),
        (["generate", PROMPT, "--color", "blue"], ["--color", "'blue'"]),
        (["generate", PROMPT, "--logit-bias", "x"], ["--logit-bias", "'x'"]),
        (["generate", PROMPT, "--model", "m", "-k", "3"], ["num_speculative_tokens=3", "'m'"]),
        (["generate", PROMPT, "--draft-model", "d"], ["draft_model='d'"]),
        (["generate", PROMPT, "--prompt", "again"], ["'again'"]),
        (["generate", ""], ["prompt", "''"]),
        (["generate"], ["prompt is missing"]),
        (["generat"], ["'generat'"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("specengine: ")
    assert all(word in err for word in words), err


def test_a_model_that_is_not_there_is_exit_code_1(tmp_path: Path) -> None:
    code, out, err = invoke("generate", PROMPT, "--model", str(tmp_path / "none"))
    assert (code, out) == (1, "")
    assert str(tmp_path / "none") in err
    assert err.count("\n") == 1


def test_a_prompt_that_fills_the_context_is_wrong_usage() -> None:
    code, _, err = invoke("generate", PROMPT * 500)
    assert code == 2
    assert "1024" in err


def test_stdin_that_is_no_text() -> None:
    code, _, err = invoke("generate", "-", stdin=b"\xff\xfe")
    assert code == 2
    assert "UTF-8" in err


def test_a_process_exits_with_the_same_codes(tmp_path: Path) -> None:
    result = run("generate", PROMPT, "--top-p", "2", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    result = run("generate", "-", "--max-new-tokens", "5", stdin=PROMPT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == specengine.generate(PROMPT, max_new_tokens=5).text + "\n"
    assert result.stderr == ""


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that streams more text than anybody reads."""
    arguments = [
        "generate",
        PROMPT,
        "--max-new-tokens",
        "1000",
        "--ignore-eos",
        "-k",
        "1",
        "--num-threads",
        "1",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    # A shell's background job, as a CI run may be, starts with SIGINT ignored, and children inherit that.
    heeds_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, preexec_fn=heeds_interrupts, **pipes)
    yield process
    process.kill()
    process.wait()


def test_interrupted(endless: subprocess.Popen[bytes]) -> None:
    """The text so far is kept, there is no traceback, and the exit code is 130."""
    assert endless.stdout is not None
    first = endless.stdout.read(1)
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    shown = first + out
    expected = specengine.generate(PROMPT, max_new_tokens=32, ignore_eos=True).text.encode()
    assert endless.returncode == 130
    assert shown[: len(expected)] == expected[: len(shown)]
    assert b"Traceback" not in err
    assert err == b""


def test_the_reader_goes_away(endless: subprocess.Popen[bytes]) -> None:
    """`specengine generate ... | head -1` ends at once and in silence."""
    assert endless.stdout is not None
    assert endless.stderr is not None
    endless.stdout.read(1)
    endless.stdout.close()
    started = time.monotonic()
    assert endless.stderr.read() == b""
    assert endless.wait(timeout=60) == 0
    assert time.monotonic() - started < 30


# models, collect-env


def test_models_lists_the_bundled_pair() -> None:
    code, out, err = invoke("models")
    assert (code, err) == (0, "")
    for words in ("bundled target", "bundled draft", "gpt2", "gpt_neox", "opt", str(bundled.target_path())):
        assert words in out


def test_models_describes_a_directory_without_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was loaded")

    monkeypatch.setattr("specengine.models.checkpoints.tensors.SafetensorsSource.load", refuse)
    code, out, _ = invoke("models", "--model", str(bundled.draft_path()), "--json")
    description = json.loads(out)[str(bundled.draft_path())]
    size = (bundled.draft_path() / "model.safetensors").stat().st_size / 1e6
    assert code == 0
    assert description["architecture"] == "gpt2"
    assert description["vocab_size"] > 0
    assert description["megabytes"] == pytest.approx(size, rel=0.01)
    assert description["parameters"] * (2 if description["dtype"] == "bfloat16" else 4) == pytest.approx(
        size * 1e6, rel=0.01
    )


def test_models_of_nothing(tmp_path: Path) -> None:
    code, out, err = invoke("models", "--model", str(tmp_path))
    assert (code, out) == (1, "")
    assert "config.json" in err


def test_collect_env() -> None:
    code, out, err = invoke("collect-env", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["packages"]["specengine"] == specengine.__version__
    assert {"packages", "system", "cpu", "gpu", "native"} == set(report)
    code, out, _ = invoke("collect-env")
    assert code == 0
    assert report["cpu"]["model"] in out


# Colours


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(bundled.target_path())


@pytest.mark.parametrize("text", ["x = 1\n", "naïve café ☕ 日本語 🙂", "\ufffd?", "'é' * 3  # ❄"])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_the_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str, group: int) -> None:
    """However the ids are grouped, and however late the text comes."""
    ids = tokenizer.encode(text)
    sources = ["draft" if index % 3 else "target" for index in range(len(ids))]
    events = [
        StreamEvent(0, 0, ids[start : start + group], "", sources[start : start + group])  # type: ignore[arg-type]
        for start in range(0, len(ids), group)
    ]
    painter = TokenPainter(tokenizer, [])
    pieces = [piece for event in events for piece in painter.split(event)]
    pieces += painter.split(StreamEvent(0, 0, [], text, []))
    assert "".join(piece for piece, _ in pieces) == text


def test_each_token_has_its_own_color(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("import os")
    sources = ["draft" if index % 2 else "target" for index in range(len(ids))]
    painter = TokenPainter(tokenizer, [])
    pieces = list(painter.split(StreamEvent(0, 0, ids, "import os", sources)))  # type: ignore[arg-type]
    assert pieces == [(tokenizer.decode([token]), source) for token, source in zip(ids, sources, strict=True)]


def test_text_of_nobody_is_the_targets() -> None:
    assert list(TokenPainter(None, []).split(StreamEvent(0, 0, [], "x", []))) == [("x", "target")]


def test_when_to_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with open(os.devnull, "w", encoding="utf-8") as file:
        assert wants_color("always", file)
        assert not wants_color("never", file)
        assert not wants_color("auto", file)
    leader, follower = os.openpty()
    with open(follower, "w", encoding="utf-8") as terminal:
        assert wants_color("auto", terminal)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not wants_color("auto", terminal)
    os.close(leader)
    assert paint("x", "draft") != paint("x", "target")


# Options


def test_defaults_are_those_of_the_library() -> None:
    code, out, _ = invoke("generate", "--help")
    assert code == 0
    assert f"[default: {SamplingParams.max_new_tokens}]" in " ".join(out.split())


@pytest.mark.parametrize(("command", "changed"), [("generate", {}), ("profile", {"max_new_tokens": 64})])
def test_a_command_has_every_option_of_the_library(
    command: str, changed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name; with nothing given, what the library does with nothing given."""
    help_page = invoke(command, "--help")[1]
    names = [field.name for group in (ModelOptions, SamplingParams, EngineConfig) for field in fields(group)]
    flags = [f"--{name.replace('_', '-')}" for name in names if name != "logits_processor"]
    assert [flag for flag in [*flags, "-k", "-n"] if not re.search(rf"{flag}\b", help_page)] == []
    calls: list[call.Call] = []
    monkeypatch.setattr(call, "prepare_call", lambda *given: calls.append(prepare_call(*given)) or stop())
    assert invoke(command, PROMPT)[0] == 2
    assert calls[0].params == SamplingParams(**changed)


def stop() -> None:
    raise ValueError("enough has been seen")


GIVEN: dict[str, tuple[list[str], Any]] = {
    "several drafts": (["--draft-model", "a", "--draft-model", "b"], {"draft_model": ["a", "b"]}),
    "one draft": (["--draft-model", "a"], {"draft_model": "a"}),
    "biases": (["--logit-bias", "3=-1.5", "--logit-bias", "4=2"], {"logit_bias": ((3, -1.5), (4, 2.0))}),
    "stops": (["--stop", r"\n", "--stop", r"a\\b\x41\u00e9"], {"stop": ("\n", "a\\bAé")}),
    "stop ids": (["--stop-token-id", "3", "--stop-token-ids", "4"], {"stop_token_ids": (3, 4)}),
    "bad words": (["--bad-word", r"a\n", "--bad-words", "b"], {"bad_words": ("a\n", "b")}),
    "flags": (
        ["--ignore-eos", "--include-stop", "--no-enable-prefix-cache", "--no-cuda-graphs"],
        {
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "enable_prefix_cache": False,
            "cuda_graphs": False,
        },
    ),
    "graphs": (["--graphs"], {"cuda_graphs": True}),
    "numbers": (
        ["-k", "3", "-n", "2", "--rounds-ahead", "auto", "--num-blocks", "9", "--min-p", "0.5"],
        {"num_speculative_tokens": 3, "n": 2, "rounds_ahead": "auto", "num_blocks": 9, "min_p": 0.5},
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_options_reach_the_library_as_they_are(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = GIVEN[case]
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(call, "prepare_call", lambda _, options: calls.append(options) or stop())
    assert invoke("generate", PROMPT, *arguments)[0] == 2
    assert {name: calls[0][name] for name in expected} == expected


# What was an error as a value


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled draft with a NaN in a weight that every token's logits depend on."""
    directory = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(bundled.draft_path(), directory)
    tensors = load_file(directory / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("ln_f.bias")]
    tensors[name][0] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("how", [["--stream"], ["--no-stream"], ["--json"], ["--stats"], ["-n", "2"]])
def test_a_model_without_a_distribution_is_exit_code_1(broken_model: Path, how: list[str]) -> None:
    code, out, err = invoke("generate", PROMPT, "--model", str(broken_model), "--max-new-tokens", "4", *how)
    last = err.splitlines()[-1]
    assert code == 1
    assert last.startswith("specengine: the target's logits hold a NaN"), err
    assert ("(sample 0, 1 of 2)" in last) == (how == ["-n", "2"])
    if how == ["--json"]:
        assert err.count("\n") == 1
        assert json.loads(out)["outputs"][0]["finish_reason"] == "error"


def test_one_of_several_samples_that_failed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = specengine.generate(PROMPT, max_new_tokens=2, n=3, temperature=1.0, seed=1)
    outputs = [*result.outputs]
    outputs[1] = replace(outputs[1], finish_reason="error", error="no distribution")
    monkeypatch.setattr(specengine.Engine, "generate", lambda *_, **__: replace(result, outputs=outputs))
    code, out, err = invoke("generate", PROMPT, "-n", "3")
    assert (code, out.count("\n") > 2) == (1, True)
    assert err.splitlines()[-1] == "specengine: no distribution (sample 1 of 3)"


def test_there_is_nothing_to_profile_in_an_error(broken_model: Path) -> None:
    code, out, err = invoke("profile", PROMPT, "--model", str(broken_model), "--no-trace", "--json")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "the target's logits hold a NaN" in err


# Text that comes in and goes out


def test_json_is_ascii_whatever_it_holds() -> None:
    """So it is JSON on an ASCII standard output too, where other characters would become \\x escapes."""
    prompt = "# naïve ☕ 🙂\n"
    for command in (["generate", prompt, "--max-new-tokens", "2"], ["models"], ["collect-env"]):
        code, out, _ = invoke(*command, "--json")
        assert (code, out.isascii()) == (0, True), command
        shown = json.loads(out)
        assert command[0] != "generate" or shown["prompt"] == prompt


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a\udcff"],
        ["generate", "--prompt", "a\udcff"],
        ["generate", "x", "--stop", "a\udcff"],
        ["generate", "x", "--revision", "a\udcff"],
        ["generate", "x", "--dtype", "a\udcff"],
        ["generate", "x", "--device", "a\udcff"],
        ["generate", "x", "--top-k", "a\udcff"],
        ["generate", "x", "--a\udcff"],
        ["a\udcff"],
        ["profile", "a\udcff"],
    ],
    ids=ascii,
)
def test_an_argument_that_is_no_utf8_is_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Python makes half a surrogate pair of each byte that is none."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert "udcff" in err


def test_a_model_whose_name_is_no_utf8_is_not_there() -> None:
    code, out, err = invoke("generate", "x", "--model", "/nowhere/a\udcff")
    assert (code, out, err.count("\n")) == (1, "", 1), err


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"a\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\nb\r\n", "a\nb"),
        (b"\xef\xbb\xbfa", "a"),
        (b"a\rb\\n", "a\rb\\n"),
        (" é\ufeff".encode(), " é\ufeff"),
    ],
)
def test_stdin_is_read_as_a_text_file(written: bytes, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt on the command line is taken as it is."""
    prompts: list[str] = []
    monkeypatch.setattr(call, "prepare_call", lambda prompt, _: prompts.append(prompt) or stop())
    assert invoke("generate", "-", stdin=written)[0] == 2
    assert invoke("profile", "-", stdin=written)[0] == 2
    assert invoke("generate", "--prompt", "\ufeffa\r\nb\\n\n")[0] == 2
    assert prompts == [meant, meant, "\ufeffa\r\nb\\n\n"]


def test_a_stop_that_is_no_escape_is_refused_with_a_hint() -> None:
    code, _, err = invoke("generate", "x", "--stop", r"\d")
    assert code == 2
    assert r"a backslash itself is \\" in " ".join(err.split())
