"""End-to-end generation with the widened pairs, ours and the peers', in turn on the same machine and prompts.

    make bench-generate
    python benchmarks/bench_generate.py --pairs distilgpt2:gpt2-medium --dtypes bf16 --markdown

For every pair and dtype each contestant lives in a process of its own, and every repetition gives each of them a turn
with every prompt: plain decoding, batches (ours), speculative decoding with several draft lengths, and the first
token after longer prompts. Prompt time
(until the first token) and decode time are apart. A contestant that is not installed, does not survive a short trial,
or cannot do something has a row with the reason. llama.cpp is built for this processor, once, in minutes
(`generation/llama_builds.py`). Ours must generate the tokens of our plain decoding however it decodes, or nothing is
reported.

All of it takes hours on two cores, most of that the slowest contestants'; `--prompts 4 --repetitions 2` a third.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch  # noqa: F401 - before specengine's extension, which needs its libraries
from generation import contest, table
from generation.plan import DTYPES, MODES, PAIRS, PROMPT_LENGTH, Options, Pair, read_prompts
from generation.protocol import MODULES
from generation.rows import Row
from measure import ROOT, Report, append_rows, machine_name
from pairs import SHAPES

CACHE = ROOT / "build" / "pairs"
MAX_NEW_TOKENS, MAX_NUM_SPECULATIVE_TOKENS = 700, 64
MAX_PREFILL_LENGTH = 1023  # and a new token: GPT-2 has 1,024 positions
Item = TypeVar("Item")


def main() -> int:
    # So that a terminated benchmark also closes its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options, arguments = parse()
    try:
        rows = run(options, arguments)
    except contest.NotExactError as error:
        print(f"bench_generate.py: ours is not exact: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_generate.py: interrupted", file=sys.stderr)
        return 130
    show(rows, options, is_markdown=arguments.markdown)
    return 0


def run(options: Options, arguments: argparse.Namespace) -> list[Row]:
    """The rows of all pairs and dtypes; each block's are appended to `--results` when it is done."""
    prompts = read_prompts(options.num_prompts, options.batch_sizes, options.prefill_lengths)
    report = Report(options.num_threads)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for pair in options.pairs:
        for dtype in options.dtypes:
            block = contest.run(
                pair, dtype, options, prompts, report=report, cache=arguments.cache.resolve(), say=say
            )
            rows += block
            if arguments.results is not None:
                append_rows((row.to_json() for row in block), arguments.results)
    return rows


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def show(rows: list[Row], options: Options, *, is_markdown: bool) -> None:
    bandwidths = sorted(row.read_bandwidth for row in rows if row.read_bandwidth is not None)
    machine = machine_name(options.num_threads)
    if bandwidths:
        machine += f"; reads {bandwidths[0]:.0f} to {bandwidths[-1]:.0f} GB/s"
    description = (
        f"{options.num_prompts} prompts of {PROMPT_LENGTH} tokens, {options.max_new_tokens} new tokens, greedy; "
        f"medians of {options.repetitions} repetitions in turn; {date.today()}"
    )
    if is_markdown:
        print("\n".join(table.markdown(rows, machine, description)))
    else:
        print("\n".join([machine, description, *table.text(rows)]))


def parse(arguments: list[str] | None = None) -> tuple[Options, argparse.Namespace]:
    """The checked options, and where files go."""
    parser = argparse.ArgumentParser(
        description="End-to-end generation, ours and the peers', in turn.",
        formatter_class=Defaults,
    )
    defaults = Options()  # as texts, which are then read like a user's
    add = parser.add_argument
    draft_length = between(1, MAX_NUM_SPECULATIVE_TOKENS)
    add("--pairs", type=listed(pair), default=joined(PAIRS), help="draft:target, comma-separated")
    add("--dtypes", type=listed(chosen(DTYPES)), default=joined(DTYPES), help="of the target's weights")
    add("--contestants", type=listed(chosen(MODULES)), default=joined(MODULES), help="who takes part")
    add(
        "--modes",
        type=listed(chosen(dict.fromkeys(MODES))),
        default=joined(MODES),
        help="what they do; without plain there is nothing to compare with",
    )
    add("--k", type=listed(draft_length), default=joined(defaults.k), help="our draft lengths")
    add(
        "--peer-k",
        type=listed(draft_length),
        default=joined(defaults.peer_k),
        help="the peers' draft lengths",
    )
    add(
        "--draft-dtype",
        choices=["int8", "int4", "same"],
        default="int8",
        help="the draft's, where it can be chosen",
    )
    add(
        "--batch-sizes",
        type=listed(between(1, 1000)),
        default=joined(defaults.batch_sizes),
        metavar="N,...",
        help="prompts that ours decodes at once; a row each",
    )
    add(
        "--prefill-lengths",
        type=listed(between(1, MAX_PREFILL_LENGTH)),
        default=joined(defaults.prefill_lengths),
        metavar="N,...",
        help="tokens of the prompts that are timed to their first token; a row each, of everybody",
    )
    add("--prompts", type=between(1, 1000), default=defaults.num_prompts, metavar="N", help="how many")
    add(
        "--max-new-tokens",
        type=between(2, MAX_NEW_TOKENS),
        default=defaults.max_new_tokens,
        metavar="N",
        help="of each prompt, end-of-text ignored",
    )
    add(
        "--repetitions",
        type=between(1, 1000),
        default=defaults.repetitions,
        metavar="N",
        help="turns of each",
    )
    add("--threads", type=between(1, 1024), default=len(os.sched_getaffinity(0)), metavar="N", help="of each")
    add("--results", type=file_path, metavar="PATH", help="append the rows to this file, as JSON lines")
    add("--cache", type=Path, default=CACHE, metavar="PATH", help="where models are written")
    add("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args(arguments)
    try:
        read_prompts(given.prompts, given.batch_sizes)
    except ValueError as error:
        parser.error(str(error))
    return build_options(given), given


def build_options(given: argparse.Namespace) -> Options:
    return Options(
        pairs=given.pairs,
        dtypes=tuple(DTYPES.get(name, name) for name in given.dtypes),
        contestants=tuple(name for name in MODULES if name in given.contestants),
        modes=given.modes,
        k=given.k,
        peer_k=given.peer_k,
        batch_sizes=given.batch_sizes,
        prefill_lengths=given.prefill_lengths,
        draft_dtype=None if given.draft_dtype == "same" else given.draft_dtype,
        num_prompts=given.prompts,
        max_new_tokens=given.max_new_tokens,
        repetitions=given.repetitions,
        num_threads=given.threads,
    )


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults stand in the help where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def joined(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def listed(one: Callable[[str], Item]) -> Callable[[str], tuple[Item, ...]]:
    """Comma-separated values, each once."""

    def read(text: str) -> tuple[Item, ...]:
        return tuple(dict.fromkeys(one(part.strip()) for part in text.split(",")))

    return read


def chosen(names: dict[str, Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


def between(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, got {value}")
        return value

    return read


def file_path(text: str) -> Path:
    """Where rows go, which nobody wants to hear of after the last turn."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory")
    return path


def pair(text: str) -> Pair:
    draft, separator, target = text.replace("→", ":").partition(":")
    for name in (draft, target):
        if not separator or name not in SHAPES:
            shapes = ", ".join(SHAPES)
            raise argparse.ArgumentTypeError(f"{text!r} is not draft:target with two of {shapes}")
    return Pair(draft, target)


if __name__ == "__main__":
    sys.exit(main())
