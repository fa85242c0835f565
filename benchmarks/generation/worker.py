"""A contestant's own process: `python -m generation.worker load|prepare SETUP`, then tasks on stdin, a line each.

Ends when stdin does. Whatever a library prints goes to stderr; stdout carries answers only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from types import ModuleType
from typing import Any, TextIO

from generation.protocol import MODULES, Contestant, Setup, Task


def private_stdout() -> TextIO:
    """The real stdout, which from now on only this file writes to."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def versions(module: ModuleType) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in module.DISTRIBUTIONS}


def say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def reason(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def serve(contestant: Contestant, answers: TextIO) -> None:
    for line in sys.stdin:
        say(answers, answer(contestant, Task(**json.loads(line))))


def answer(contestant: Contestant, task: Task) -> dict[str, Any]:
    try:
        return {"answer": contestant.generate(task).to_json()}
    except Exception as error:  # a row gives the reason, the other contestants go on
        return {"error": reason(error)}


def main() -> None:
    action, setup = sys.argv[1], Setup(**json.loads(sys.argv[2]))
    answers = private_stdout()
    if setup.path:
        sys.path.insert(0, setup.path)
    try:
        module = importlib.import_module(setup.module or MODULES[setup.contestant])
        if action == "prepare":
            module.prepare(setup)
            say(answers, {"ready": {}})
            return
        contestant = module.load(setup)
    except Exception as error:  # not installed, or it cannot do this
        say(answers, {"error": reason(error)})
        return
    about = {"settings": contestant.settings, "instruction_set": contestant.instruction_set}
    say(answers, {"ready": {**about, "versions": versions(module)}})
    serve(contestant, answers)


if __name__ == "__main__":
    main()
