"""Ways to draft beside plain decoding: what is accepted, and what that brings. The table of docs/strategies.md.

    python benchmarks/drafters.py self:1 self:4 self:6                     # for the bundled target
    python benchmarks/drafters.py self:8 path/to/draft --model path/to/model --dtype bfloat16 -k 3 --repetitions 7

A drafter is whatever `draft_model` takes. Prompts are those of `bench_generate.py`, one after the other; in every
repetition each drafter takes its turn, plain decoding right beside it, and greedy tokens must be equal.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - before specengine's extension, which needs its libraries
from cpu_timing import machine_name
from generation.plan import read_prompts

from specengine import Engine, GenerationResult, bundled


@dataclass
class Tried:
    """A drafter's numbers. speed: plain decoding's time over its own, a number a repetition."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    speed: list[float] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else 1.0

    def count(self, results: Sequence[GenerationResult]) -> None:
        for counts in (result.metrics.speculative_decoding for result in results):
            self.num_rounds += counts.num_rounds
            self.num_drafted += counts.num_draft_tokens
            self.num_accepted += counts.num_accepted_draft_tokens


def decode(
    engine: Engine, prompts: list[list[int]], k: int, seeds: Sequence[int], **sampling: Any
) -> list[GenerationResult]:
    return [
        engine.generate(prompt, num_speculative_tokens=k, seed=seed, **sampling)
        for seed in seeds
        for prompt in prompts
    ]


def seconds(results: Sequence[GenerationResult]) -> float:
    return sum(result.metrics.decode_time for result in results)


def measure(
    model: str,
    drafters: Sequence[str],
    prompts: list[list[int]],
    k: int,
    *,
    repetitions: int,
    seeds: Sequence[int],
    sampling: dict[str, Any],
    config: dict[str, Any],
) -> dict[str, Tried]:
    """What became of each drafter's turns. config: the engines' options."""
    tried = {drafter: Tried() for drafter in drafters}
    with ExitStack() as stack:
        engines = {each: stack.enter_context(Engine(model, each, **config)) for each in drafters}
        for _ in range(repetitions):
            for drafter, engine in engines.items():
                plain, drafted = (decode(engine, prompts, each, seeds, **sampling) for each in (0, k))
                if "temperature" not in sampling:
                    texts = [[result.token_ids for result in results] for results in (plain, drafted)]
                    assert texts[0] == texts[1], f"{drafter}: not the tokens of plain decoding"
                tried[drafter].count(drafted)
                tried[drafter].speed.append(seconds(plain) / seconds(drafted))
    return tried


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each way to draft accepts, and what it brings.")
    parser.add_argument("drafters", nargs="*", help="default: the bundled draft model")
    parser.add_argument("--model", default=str(bundled.target_path()))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-weight-dtype", default="auto")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--acceptance", default="rejection", help="above temperature 0")
    parser.add_argument("--seeds", type=int, default=1, help="above temperature 0: with each from 1 on")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args(arguments)
    sampling: dict[str, Any] = {"max_new_tokens": given.max_new_tokens, "ignore_eos": True}
    if given.temperature:
        sampling |= {"temperature": given.temperature, "acceptance": given.acceptance}
    tried = measure(
        given.model,
        given.drafters or [str(bundled.draft_path())],
        read_prompts(given.prompts).short,
        given.k,
        repetitions=given.repetitions,
        seeds=range(1, 1 + (given.seeds if given.temperature else 1)),
        sampling=sampling,
        config={"dtype": given.dtype, "draft_weight_dtype": given.draft_weight_dtype},
    )
    print(f"{machine_name()}; {Path(given.model).name}, {given.dtype}, k = {given.k}")
    print(
        "| drafter | acceptance rate | mean acceptance length | × to plain (least, most) |\n|---|---:|---:|---:|"
    )
    for drafter, numbers in tried.items():
        name = Path(drafter).name if Path(drafter).exists() else drafter
        low, high = min(numbers.speed), max(numbers.speed)
        print(
            f"| {name} | {numbers.acceptance_rate:.1%} | {numbers.mean_acceptance_length:.2f} "
            f"| {statistics.median(numbers.speed):.2f} ({low:.2f}, {high:.2f}) |"
        )


if __name__ == "__main__":
    main()
