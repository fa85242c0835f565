"""The prompts of a measurement: from a file, or the bundled ones."""

from __future__ import annotations

import json
from pathlib import Path

from specengine import bundled


def read_prompts(path: Path | None, num_prompts: int | None) -> list[str]:
    """The first `num_prompts` of a file, all where that is None; without a file, so many of the bundled 200, spread.

    path: `.jsonl`: a string, or an object with "prompt", a line; else a prompt a line; blank lines do not count

    Raises `ValueError` that names file and line for what is no prompt, and where there are fewer than asked for.
    """
    if path is None:
        prompts = [row["prompt"] for row in bundled.load_prompts()]
        wanted = 3 if num_prompts is None else num_prompts
        step = max(1, len(prompts) // max(1, wanted))
        return _first(prompts[::step], wanted, "the bundled set")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {str(path)!r} is not UTF-8: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt(line, f"{path}:{number}") for number, line in lines]
    else:
        prompts = [line.removesuffix("\r") for _, line in lines]
    return _first(prompts, num_prompts, str(path))


def _first(prompts: list[str], num_prompts: int | None, where: str) -> list[str]:
    wanted = len(prompts) if num_prompts is None else num_prompts
    if not prompts or wanted > len(prompts):
        raise ValueError(f"{where} holds {len(prompts)} prompts, {max(1, wanted)} were asked for")
    return prompts[:wanted]


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: expected a string, or an object with a string "prompt"')
    return prompt
