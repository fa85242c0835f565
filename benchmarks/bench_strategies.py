"""Ways to draft on the bundled target at a real size, in turn, where most of what is written was given, or half of it.

    python benchmarks/bench_strategies.py
    python benchmarks/bench_strategies.py --strategies ngram,suffix,distilgpt2 --k 4,8,16 --dtype float32
    python benchmarks/bench_strategies.py --texts mixed --strategies suffix,distilgpt2,distilgpt2+suffix

Of the texts "copy" each begins as an edit of given code: the code, then its beginning once more with a name changed,
and the model goes on. Between these, "mixed" has as many that are new: a beginning, and what is drawn
behind it. Each repetition gives every strategy with every draft length a turn with every text, to and fro, plain
decoding among them. Decoding is timed, from the first token to the last. All tokens must be those of plain decoding,
or nothing is reported. A speed-up is the median over the repetitions, beside the 95 % interval of a bootstrap of them.

A strategy is a drafter's name, or a shape: the bundled draft widened to it, in int8; or a list of these, joined by "+".
With "suffix:history" every repetition finds the answers of those before it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ROOT, machine_name
from pairs import DTYPES, SHAPES, build_widened

from specengine import Engine, GenerationResult, SamplingParams

NUM_RESAMPLES = 10_000
PLAIN = "plain"
CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        self.history.append(("withdraw", amount))
        return self.balance
"""


# Drawn, so that it does not come to repeat itself.
PROSE = (
    '"""Read and write settings.',
    'def parse_date(text):\n    """Return',
    "class Server:\n    def __init__(self, address",
)
PROSE_SAMPLING = {"temperature": 0.8, "seed": 1}


class Text(NamedTuple):
    """A text's beginning, and how it goes on."""

    prompt: str
    sampling: dict[str, Any]


@dataclass
class Entry:
    """A strategy with a draft length, and what its turns gave: seconds a repetition, and counts of the last one."""

    strategy: str
    k: int | str
    engine: Engine
    seconds: list[float] = field(default_factory=list)
    results: list[GenerationResult] = field(default_factory=list)

    def take_turn(self, texts: list[Text], max_new_tokens: int) -> None:
        given = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "num_speculative_tokens": self.k}
        self.results = [
            self.engine.generate(prompt, SamplingParams(**given, **sampling)) for prompt, sampling in texts
        ]
        self.seconds.append(sum(result.metrics.decode_time for result in self.results))

    def tokens(self) -> list[list[int]]:
        return [result.token_ids for result in self.results]


def write_texts(kind: str) -> list[Text]:
    """An edit at different places: what it was given once more, as far as the line before. In turn with new texts if
    `kind` says so."""
    texts = []
    for old, new, stop in (
        ("amount", "value", "    def deposit"),
        ("balance", "total", "        if amount <= 0"),
        ("history", "log", "    def withdraw"),
    ):
        edited = CODE.replace(old, new)
        texts.append(Text(f"{CODE}\n\n{edited[: edited.index(stop)]}", {}))
    if kind == "copy":
        return texts
    return [
        text for prose, copy in zip(PROSE, texts, strict=True) for text in (Text(prose, PROSE_SAMPLING), copy)
    ]


def build_entries(options: argparse.Namespace, stack: ExitStack) -> Iterator[Entry]:
    dtype, cache = DTYPES[options.dtype], ROOT / "build" / "pairs"
    target = build_widened(
        "target", SHAPES[options.shape], cache / f"target-{options.shape}-{options.dtype}", dtype=dtype
    )
    for strategy in (PLAIN, *options.strategies):
        parts: list[str | Path] = [] if strategy == PLAIN else [*strategy.split("+")]
        drafts = [part for part in parts if part in SHAPES]
        for place, part in enumerate(parts):
            if part in drafts:
                path = cache / f"draft-{part}-{options.dtype}"
                parts[place] = build_widened("draft", SHAPES[str(part)], path, dtype=dtype)
        engine = stack.enter_context(
            Engine(
                target,
                parts or None,
                dtype=options.dtype,
                draft_weight_dtype="int8" if drafts else "auto",
                num_threads=options.threads,
                enable_prefix_cache=False,
            )
        )
        for k in [0] if strategy == PLAIN else options.k:
            yield Entry(strategy, k, engine)


def check_exact(entries: list[Entry]) -> None:
    expected = entries[0].tokens()
    for entry in entries:
        if entry.tokens() != expected:
            sys.exit(f"{entry.strategy}, k = {entry.k}: the tokens are not those of plain decoding")


def interval(plain: list[float], ours: list[float]) -> tuple[float, float]:
    """95 % of the speed-ups of medians of resampled repetitions; a repetition's turns stay together."""
    chance = random.Random(0)
    repetitions = list(zip(plain, ours, strict=True))
    ratios = []
    for _ in range(NUM_RESAMPLES):
        sample = chance.choices(repetitions, k=len(repetitions))
        ratios.append(
            statistics.median(pair[0] for pair in sample) / statistics.median(pair[1] for pair in sample)
        )
    cuts = statistics.quantiles(ratios, n=40)
    return cuts[0], cuts[-1]


def describe(entry: Entry, plain: Entry) -> str:
    """A row of the table."""
    num_tokens = sum(len(tokens) - 1 for tokens in entry.tokens())
    seconds = statistics.median(entry.seconds)
    low, high = interval(plain.seconds, entry.seconds)
    counts = [result.metrics.speculative_decoding for result in entry.results]
    num_drafted, num_accepted, num_rounds = (
        sum(getattr(count, name) for count in counts)
        for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_rounds")
    )
    rate = f"{num_accepted / num_drafted:.1%}" if num_drafted else "–"
    return (
        f"| {entry.strategy} | {entry.k} | {num_tokens / seconds:.1f} "
        f"| {statistics.median(plain.seconds) / seconds:.2f} ({low:.2f} … {high:.2f}) "
        f"| {rate} | {1 + num_accepted / num_rounds:.2f} |"
    )


def read_ks(text: str) -> list[int | str]:
    return [int(k) if k.isdigit() else k for k in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default="ngram,suffix")
    parser.add_argument("--texts", choices=("copy", "mixed"), default="copy")
    parser.add_argument("--k", type=read_ks, default="4,8,16", help='numbers, or "auto"')
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None, help="of an engine; by default its own choice")
    return parser.parse_args()


def main() -> None:
    options = parse()
    texts = write_texts(options.texts)
    with ExitStack() as stack:
        entries = list(build_entries(options, stack))
        for entry in entries:
            entry.take_turn(texts, max_new_tokens=8)  # warm
            entry.seconds.clear()
        for repetition in range(options.repetitions):
            for entry in entries if repetition % 2 == 0 else reversed(entries):
                entry.take_turn(texts, options.max_new_tokens)
            check_exact(entries)
            print(f"{repetition + 1} of {options.repetitions}", file=sys.stderr, flush=True)
        print(
            f"{machine_name(options.threads)}; {options.shape}, {options.dtype}, torch {torch.__version__}; ",
            end="",
        )
        print(
            f"{len(texts)} texts ({options.texts}), {options.max_new_tokens} tokens, "
            f"{options.repetitions} repetitions in turn\n"
        )
        print("| strategy | k | tokens/s | × plain (95 %) | accepted | tokens a round |")
        print("|---|---:|---:|---:|---:|---:|")
        for entry in entries:
            print(describe(entry, entries[0]))


if __name__ == "__main__":
    main()
