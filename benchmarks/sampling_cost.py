"""What sampling parameters cost: a round of eight rows of the bundled pair with each of them, beside one with none.

    python benchmarks/sampling_cost.py
    python benchmarks/sampling_cost.py --repetitions 15 --results out.jsonl

Every repetition runs each setting once, in turn, on the same prompts, and takes the median of its full rounds (all
rows, all drafts). Reported are medians over the repetitions, the share of a round that a setting adds, and the 95 %
interval of that by the bootstrap over repetitions. Before anything is timed, drafting must change no token of any
setting.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import append_rows, machine_name

from specengine import Engine, SamplingParams, bundled

NUM_TOKENS = 200
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "presence 0.5, frequency 0.3": {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    "repetition 1.3, presence 0.5, frequency 0.3": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "64 bad words of 3 tokens": {"bad_words": [[first, first + 1, first + 2] for first in range(300, 364)]},
    "64 biases": {"logit_bias": dict.fromkeys(range(300, 364), 0.5)},
    "a logits_processor that does nothing": {"logits_processor": lambda token_ids, logits: logits},
}


@dataclass(frozen=True)
class Row:
    """added: to a round with no setting, as a share of it; low, high: 95 % of that."""

    setting: str
    batch_size: int
    k: int
    us_a_round: float
    added: float
    low: float
    high: float


def generate(engine: Engine, prompts: list[str], k: int, asked: dict[str, Any]) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, num_speculative_tokens=k, **asked)
    return [result.token_ids for result in engine.generate(prompts, params)]


def seconds_a_round(engine: Engine, prompts: list[str], k: int, asked: dict[str, Any]) -> float:
    times = engine._rounds.times
    times.clear()
    generate(engine, prompts, k, asked)
    full = [each.device + each.host for each in times if (each.batch_size, each.k) == (len(prompts), k)]
    return statistics.median(full)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the median, by the bootstrap."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def measure(engine: Engine, prompts: list[str], k: int, repetitions: int) -> list[Row]:
    for name, asked in SETTINGS.items():
        drafted, plain = (generate(engine, prompts, each, asked) for each in (k, 0))
        assert drafted == plain, f"{name}: drafting changes the text"
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(repetitions):
        for name, asked in SETTINGS.items():
            seconds[name].append(seconds_a_round(engine, prompts, k, asked))
    rows = []
    for name, taken in seconds.items():
        ratios = [mine / none - 1 for mine, none in zip(taken, seconds["none"], strict=True)]
        median = statistics.median(taken) * 1e6
        rows.append(Row(name, len(prompts), k, median, statistics.median(ratios), *interval(ratios)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    prompts = [entry["prompt"] for entry in bundled.load_prompts()][: given.batch_size]
    with Engine(bundled.target_path(), bundled.draft_path(), dtype=given.dtype) as engine:
        rows = measure(engine, prompts, given.k, given.repetitions)
    print(f"{machine_name()}; {given.batch_size} rows, k = {given.k}, {NUM_TOKENS} new tokens")
    for row in rows:
        print(
            f"{row.setting:<45} {row.us_a_round:8.0f} us  {row.added:+7.1%}  ({row.low:+.1%} to {row.high:+.1%})"
        )
    if given.results is not None:
        append_rows(({"kind": "sampling_cost", **asdict(row)} for row in rows), given.results)


if __name__ == "__main__":
    main()
