"""`specengine chat`: through a pipe, and with real keys at a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from chat_templates import CHATML, save_chat_model
from typer.testing import CliRunner

import specengine
from specengine.cli import app

OPTIONS = {"max_new_tokens": 6, "ignore_eos": True, "draft_model": "suffix"}
FLAGS = ["--max-new-tokens", "6", "--ignore-eos", "--draft-model", "suffix"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model", max_positions=1 << 16)


def talk(model: Path, *lines: str, flags: list[str] = FLAGS) -> tuple[int, str, str]:
    typed = "".join(f"{line}\n" for line in lines)
    result = CliRunner().invoke(app, ["chat", "--model", str(model), *flags], input=typed)
    return result.exit_code, result.stdout, result.stderr


def answers(model: Path, *messages: str, system: str = "", **options: object) -> list[str]:
    """What the library says to each message in turn."""
    said: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    texts = []
    for message in messages:
        said.append({"role": "user", "content": message})
        text = specengine.chat(said, model=model, **{**OPTIONS, **options}).text
        said.append({"role": "assistant", "content": text})
        texts.append(text)
    return texts


def test_lines_from_a_pipe_are_turns(model: Path) -> None:
    code, out, err = talk(model, "Hi!", "", "And now?")
    assert code == 0
    assert out == "".join(f"{text}\n" for text in answers(model, "Hi!", "And now?"))
    assert re.fullmatch(
        r"6 tokens; first token after \d+\.\d\d s, then \d+ tokens/s; .*prompt of \d+ tokens, 0 of them reused.*\n"
        r"6 tokens; first token .*prompt of \d+ tokens, [1-9]\d* of them reused.*\n",
        err,
    )


def test_every_command(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "Hi!",
        "/regenerate",
        "/system Be brief.",
        "More",
        "/reset",
        '"""a',
        "/b",
        'c"""',
        f"/save {file}",
    ]
    code, out, err = talk(model, *lines, "/quit", "never read", flags=[*FLAGS, "--no-stats"])
    assert code == 0
    first = answers(model, "Hi!")
    assert "at temperature 0 the answer is the same again" in err
    more = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": first[0]},
        {"role": "user", "content": "More"},
    ]
    second = specengine.chat(more, model=model, **OPTIONS).text
    third = answers(model, "a\n/b\nc", system="Be brief.")
    assert out == "".join(f"{text}\n" for text in [*first, *first, second, *third])
    saved = json.loads(file.read_text())
    assert [each["content"] for each in saved["messages"]] == ["Be brief.", "a\n/b\nc", *third]
    assert saved["model"] == str(model)


def test_another_answer_has_another_seed(model: Path) -> None:
    sampled = [*FLAGS, "--temperature", "1", "--seed", "3", "--no-stats"]
    _, out, err = talk(model, "Hi!", "/regenerate", flags=sampled)
    expected = [answers(model, "Hi!", temperature=1.0, seed=seed)[0] for seed in (3, 4)]
    assert out == "".join(f"{text}\n" for text in expected)
    assert expected[0] != expected[1]
    assert err == ""


def test_json_is_a_line_an_answer(model: Path) -> None:
    code, out, err = talk(model, "Hi!", "More", flags=[*FLAGS, "--json"])
    assert (code, err) == (0, "")
    said = [json.loads(line) for line in out.splitlines()]
    assert [each["text"] for each in said] == answers(model, "Hi!", "More")
    assert all(each["draft_model"] == "suffix" for each in said)


def test_what_the_model_advises_is_told(tmp_path: Path) -> None:
    advice = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 3}
    model = save_chat_model(tmp_path / "m", generation=advice)
    flags = ["--ignore-eos", "--json", "--seed", "1"]
    _, out, err = talk(model, "Hi!", flags=flags)
    assert err == "from generation_config.json: temperature=0.5, max_new_tokens=3\n"
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 3
    _, out, err = talk(model, "Hi!", flags=[*flags, "--no-generation-config"])
    assert err == ""
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 1024
    _, out, err = talk(model, "Hi!", flags=[*flags, "--max-new-tokens", "5"])
    assert err == "from generation_config.json: temperature=0.5\n"
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 5


def test_a_conversation_that_outgrows_the_context(tmp_path: Path) -> None:
    """Whole turns are left out from the front, the system's message never; what cannot fit at all is refused."""
    model = save_chat_model(tmp_path / "m", max_positions=256)
    file = tmp_path / "talk.json"
    lines = [f"{number} {'x' * 30}" for number in range(4)]
    code, _, err = talk(model, *lines, f"/save {file}", flags=[*FLAGS, "--system", "Be brief."])
    assert code == 0
    assert re.search(r"outgrew the context of 256 tokens: its \d+ oldest messages are left out", err)
    saved = json.loads(file.read_text())["messages"]
    assert [each["role"] for each in saved] == ["system", *["user", "assistant"] * ((len(saved) - 1) // 2)]
    assert len(saved) < 9
    assert saved[-2]["content"] == lines[-1]
    code, out, err = talk(model, "x" * 999, flags=FLAGS)
    assert (code, out) == (2, "")
    assert "which leaves no room for a new one in a context of 256" in err


@pytest.mark.parametrize(
    ("flags", "lines", "code", "said"),
    [
        (["-n", "2"], ["Hi!"], 2, "n must be 1 in a conversation, got 2"),
        ([], ["/helo"], 2, "/helo is no command: /help,"),
        ([], ["/regenerate"], 2, "nothing was answered yet"),
        ([], ["Hi!", "/save"], 2, "/save needs a file"),
        ([], ["/save /no/such/directory/x"], 1, "No such file"),
        (["--chat-template", "{% for"], ["Hi!"], 1, "chat_template: the chat template is no valid template"),
        (["--chat-template", "{{ raise_exception('no') }}"], ["Hi!"], 1, "the chat template refuses: no"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, flags: list[str], lines: list[str], code: int, said: str
) -> None:
    found, _, err = talk(model, *lines, flags=[*FLAGS, "--no-stats", *flags])
    assert found == code
    assert said in err
    assert err.count("\n") == 1


def test_a_model_that_does_not_chat_is_refused() -> None:
    result = CliRunner().invoke(app, ["chat"], input="Hi!\n")
    assert result.exit_code == 1
    assert "has no chat template" in result.stderr


class Terminal:
    """A process whose controlling terminal this is: what is sent are keys."""

    def __init__(self, *command: str) -> None:
        self._here, there = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specengine", *command],
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(there)

    def read_until(self, pattern: str, seconds: float = 60.0) -> str:
        """What is shown up to there."""
        shown, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, shown, re.DOTALL):
            ready, _, _ = select.select([self._here], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} was not shown, but {shown[-500:]!r}"
            shown += os.read(self._here, 65536).decode(errors="replace")
        return shown

    def send(self, keys: str) -> None:
        os.write(self._here, keys.encode())

    def end(self, key: str) -> int:
        """The exit code after a key at the prompt, which ends with an empty line. Pressed again where it came before
        the line editor was listening."""
        for _ in range(60):
            self.send(key)
            with contextlib.suppress(AssertionError):
                self.read_until("\n", seconds=1.0)
                return self.process.wait(60)
        raise AssertionError("it did not end")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._here)


def test_control_c_stops_an_answer_and_a_second_one_leaves(model: Path, tmp_path: Path) -> None:
    """What was said by then is kept, and the conversation goes on from it; what is wrong ends nothing."""
    file = tmp_path / "talk.json"
    strict = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + CHATML
    flags = ["--ignore-eos", "--max-new-tokens", "60000", "--chat-template", strict]
    terminal = Terminal("chat", "--model", str(model), *flags)
    try:
        assert "/help for help" in terminal.read_until("> ")
        terminal.send("/helo\n")
        terminal.read_until(r"/helo is no command.*> ")
        terminal.send("bad\n")
        terminal.read_until(r"refuses: no.*> ")
        terminal.send("Hi!\n")
        terminal.read_until(r"Hi!\r\n.{40}")
        terminal.send("\x03")
        terminal.read_until(r"stopped\r\n> ")
        terminal.send("And now?\n")
        terminal.read_until(r"now\?\r\n.{40}")
        terminal.send("\x03")
        terminal.read_until(r"stopped\r\n> ")
        terminal.send(f"/save {file}\n")
        terminal.read_until(r"wrote 4 messages to .*> ")
        saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
        assert [each["role"] for each in saved] == ["user", "assistant"] * 2
        assert all(each["content"] for each in saved)
        terminal.send("/help\n")
        assert "/regenerate" in terminal.read_until(r"leaves.*> ")
        assert terminal.end("\x03") == 130
    finally:
        terminal.close()


@pytest.mark.slow
def test_control_d_leaves(model: Path) -> None:
    terminal = Terminal("chat", "--model", str(model), *FLAGS)
    try:
        terminal.read_until("> ")
        terminal.send("Hi!\n")
        terminal.read_until(r"tokens/s.*> ")
        assert terminal.end("\x04") == 0
    finally:
        terminal.close()
