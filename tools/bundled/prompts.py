"""The held-out prompts: 200 pieces of held-out files that start where a reader would start."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer

from .corpus import Document

NUM_PROMPTS = 200
SHORTEST, LONGEST = 16, 200  # tokens
NUM_NON_ASCII = 8
MAX_PER_FILE = 12
SENSIBLE_START = re.compile(
    r"^ {0,4}(def |class |async def |@\w|# \w|\"\"\"|import |from |if |for |while |try:|with )"
)
UNWANTED = re.compile(r"[\w.+-]+@[\w-]+\.\w|password|passwd", re.IGNORECASE)  # addresses and the like

Start = tuple[Document, int, int]  # document, line number from 1, character offset


def starts_of(document: Document) -> list[Start]:
    """Every sensible starting line of a document."""
    starts, offset = [], 0
    for number, line in enumerate(document.text.split("\n"), start=1):
        if SENSIBLE_START.match(line):
            starts.append((document, number, offset))
        offset += len(line) + 1
    return starts


def cut(tokenizer: Tokenizer, text: str, length: int) -> str | None:
    """The first `length` tokens of `text`, or slightly fewer, so that encoding them again gives the same tokens."""
    ids = tokenizer.encode(text[: 12 * length]).ids
    if len(ids) <= length:
        return None
    for count in range(length, max(SHORTEST, length - 8) - 1, -1):
        piece = tokenizer.decode(ids[:count])
        if text.startswith(piece) and tokenizer.encode(piece).ids == ids[:count]:
            return piece
    return None


def _order(starts: list[Start], generator: random.Random) -> list[Start]:
    """Ordinary modules before tests in turn, one file after the other, so that no file dominates."""
    queues: dict[str, list[Start]] = {}
    for start in starts:
        queues.setdefault(start[0].path, []).append(start)
    for queue in queues.values():
        generator.shuffle(queue)
    rounds = [[queue[i] for queue in queues.values() if i < len(queue)] for i in range(MAX_PER_FILE)]
    return [start for row in rounds for start in row]


def choose_prompts(documents: list[Document], tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """200 prompts of 16 to 200 tokens, about a third of them from tests, some with characters beyond ASCII."""
    generator = random.Random(seed)
    held_out = [document for document in documents if document.is_held_out]
    starts = [start for document in held_out for start in starts_of(document)]
    modules = _order([start for start in starts if not start[0].is_test], generator)
    tests = _order([start for start in starts if start[0].is_test], generator)
    foreign = [s for s in _order(starts, generator) if not s[0].text[s[2] : s[2] + 400].isascii()]
    lengths = [SHORTEST + i * (LONGEST - SHORTEST) // (NUM_PROMPTS - 1) for i in range(NUM_PROMPTS)]
    generator.shuffle(lengths)
    wanted = [(foreign, NUM_NON_ASCII), (modules, NUM_PROMPTS * 2 // 3), (tests, NUM_PROMPTS)]
    prompts: list[dict[str, str]] = []
    for candidates, total in wanted:
        _take(prompts, candidates, total, tokenizer, lengths, needs_non_ascii=candidates is foreign)
    if len(prompts) != NUM_PROMPTS:
        raise RuntimeError(f"only {len(prompts)} prompts found")
    return [{"id": f"heldout-{i:03d}", **prompt} for i, prompt in enumerate(prompts)]


def _take(prompts: list[dict[str, str]], candidates: list[Start], total: int, tokenizer: Tokenizer,
          lengths: list[int], *, needs_non_ascii: bool) -> None:  # fmt: skip
    """Append prompts from `candidates` until there are `total`."""
    sources = {prompt["source"] for prompt in prompts}
    for document, number, offset in candidates:
        if len(prompts) >= total:
            return
        source = f"{document.path}:{number}"
        piece = cut(tokenizer, document.text[offset:], lengths[len(prompts)])
        if piece is None or source in sources or UNWANTED.search(piece):
            continue
        if needs_non_ascii and piece.isascii():
            continue
        prompts.append({"source": source, "prompt": piece})
        sources.add(source)


def save_prompts(prompts: list[dict[str, str]], path: Path) -> None:
    """One JSON object a line."""
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_prompts(path: Path) -> list[dict[str, str]]:
    """What `save_prompts` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
