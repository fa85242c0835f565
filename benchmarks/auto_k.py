"""`num_speculative_tokens="auto"` beside every constant, on text that repeats itself, on code, and with a random draft.

    python benchmarks/auto_k.py                                    # distilgpt2 for gpt2-medium, bf16, int8 draft
    python benchmarks/auto_k.py --batch-sizes 1 8 --repeats 9 --max-new-tokens 2000 --workloads random

All take turns, in another order each time, and must give the tokens of plain decoding. "auto" begins each time without
knowing anything, unless --warm. Reported are medians, and of the ratios of one turn's runs the median with a 95 %
bootstrap interval; then the k of the last run of "auto", round by round.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import append_rows, machine_name
from pairs import build_pair
from safetensors.torch import load_file, save_file

from specengine import Engine
from specengine.adaptive import Chooser

ROOT = Path(__file__).resolve().parent.parent
NUM_DRAWS = 2000
CODE = "def binary_search(items, x):\n    low, high = 0, len(items)\n    while low < high:\n"
FUNCTION = """def read_config(path, defaults=None):
    config = dict(defaults or {})
    with open(path, encoding="utf-8") as file:
        for line in file:
            name, value = line.split("=", 1)
            config[name.strip()] = value.strip()
    return config


"""
# What is continued, and whether the draft is the trained one.
WORKLOADS = {"copy": (FUNCTION * 3, True), "code": (CODE, True), "random": (CODE, False)}


@dataclass(frozen=True)
class Row:
    """Speed of one k, in tokens of all sequences a second of decoding; ratio: of "auto" to it, [low, high] of 95 %."""

    workload: str
    batch_size: int
    num_speculative_tokens: int | str
    num_tokens: int
    repeats: int
    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    mean_num_draft_tokens: float
    mean_acceptance_length: float
    estimated_speedup: float | None


def build_random(draft: Path, out: Path) -> Path:
    """The draft with random weights: same cost, same vocabulary, no idea."""
    if not out.exists():
        shutil.copytree(draft, out)
        generator = torch.Generator().manual_seed(0)
        tensors = load_file(draft / "model.safetensors")
        drawn = {
            name: (0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        save_file(drawn, out / "model.safetensors", metadata={"format": "pt"})
    return out


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the interval that 95 % of the medians of samples with replacement fall into."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(NUM_DRAWS))
    return statistics.median(ratios), medians[NUM_DRAWS // 40], medians[-NUM_DRAWS // 40 - 1]


def run_lengths(ks: Sequence[int]) -> str:
    """4×3 0×2 …: k, and for how many rounds."""
    return " ".join(f"{k}×{len(list(group))}" for k, group in itertools.groupby(ks))


class Contest:
    """One workload at one batch size."""

    def __init__(
        self, engine: Engine, prompt: str, batch_size: int, num_tokens: int, *, is_warm: bool
    ) -> None:
        self._engine = engine
        # Other texts of the same kind: no two rows alike.
        self._prompts = [f"{'#' * (row + 1)}\n{prompt}" if row else prompt for row in range(batch_size)]
        # What does not fit into the context is generated from the prompt again.
        room = engine.max_seq_len - len(engine.tokenizer.encode(self._prompts[-1]))
        passes, rest = divmod(num_tokens, room)
        self._lengths = [room] * passes + [rest] * (rest > 0)
        self._is_warm = is_warm
        self.speeds: dict[int | str, list[float]] = {}
        self.metrics: dict[int | str, Any] = {}
        self.ks: list[int] = []
        self._truth: dict[int, list[list[int]]] = {}

    def run(self, k: int | str) -> None:
        engine = self._engine
        if k == "auto" and not self._is_warm:
            engine._stepper.chooser = Chooser.of(engine._drafter, hides_host=engine.device.type == "cuda")
        engine._rounds.times = rounds = deque(maxlen=None)
        seconds, count = 0.0, 0
        for length in self._lengths:
            results = engine.generate(
                self._prompts, max_new_tokens=length, ignore_eos=True, num_speculative_tokens=k
            )
            tokens = [result.token_ids for result in results]
            if length not in self._truth:
                self._truth[length] = tokens
            assert tokens == self._truth[length], f"k = {k} changed the text"
            # From the first token of any to the last of all.
            times = [result.metrics for result in results]
            seconds += max(each.total_time for each in times)
            seconds -= min(each.total_time - each.decode_time for each in times)
            count += sum(map(len, tokens))
        self.speeds.setdefault(k, []).append(count / seconds)
        self.metrics[k] = results[0].metrics.speculative_decoding
        if k == "auto":
            self.ks = [each.k for each in rounds]


def rows_of(contest: Contest, workload: str, batch_size: int, num_tokens: int) -> list[Row]:
    rows = []
    for k, speeds in contest.speeds.items():
        ratio, low, high = interval(
            [ours / theirs for ours, theirs in zip(contest.speeds["auto"], speeds, strict=True)]
        )
        metrics, speed = contest.metrics[k], statistics.median(speeds)
        means = metrics.mean_num_draft_tokens, metrics.mean_acceptance_length, metrics.estimated_speedup
        rows.append(Row(workload, batch_size, k, num_tokens, len(speeds), speed, ratio, low, high, *means))
    return rows


def print_rows(rows: list[Row], ks: list[int]) -> None:
    first = rows[0]
    print(f"\n{first.workload}, batch {first.batch_size}, {first.num_tokens} tokens")
    for row in sorted(rows, key=lambda row: -row.tokens_per_second):
        speedup = "" if row.estimated_speedup is None else f"  estimated {row.estimated_speedup:.2f}× plain"
        print(
            f"  k = {row.num_speculative_tokens!s:4} {row.tokens_per_second:8.1f} tokens/s"
            f"  auto/this {row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"
            f"  drafts {row.mean_num_draft_tokens:.2f}  length {row.mean_acceptance_length:.2f}{speedup}"
        )
    print(f"  k of auto over time: {run_lengths(ks)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="auto beside every constant k")
    parser.add_argument("--pair", default="distilgpt2:gpt2-medium", help="shapes of draft and target")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft-dtype", default="int8")
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--ks", nargs="+", type=int, default=list(range(9)))
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm", action="store_true", help='"auto" keeps what it learned in earlier turns')
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "pairs")
    parser.add_argument("--results", type=Path, help="a file that rows are appended to")
    options = parser.parse_args()
    draft_shape, target_shape = options.pair.split(":")
    target, draft = build_pair(target_shape, draft_shape, options.out, getattr(torch, options.dtype))
    guess = build_random(draft, draft.with_name(f"random-{draft.name}"))
    order = random.Random(1)
    print(machine_name())
    for is_trained in (True, False):
        chosen = [name for name in options.workloads if WORKLOADS[name][1] == is_trained]
        if not chosen:
            continue
        with Engine(
            target,
            draft if is_trained else guess,
            dtype=options.dtype,
            draft_weight_dtype=options.draft_dtype,
            max_batch_size=max(options.batch_sizes),
            enable_prefix_cache=False,
        ) as engine:
            for name, size in itertools.product(chosen, options.batch_sizes):
                num_tokens = options.max_new_tokens
                contest = Contest(engine, WORKLOADS[name][0], size, num_tokens, is_warm=options.warm)
                contest.run(0)
                contest.speeds.clear()  # the first run warms up
                for _ in range(options.repeats):
                    ks = [*options.ks, "auto"]
                    order.shuffle(ks)
                    for k in ks:
                        contest.run(k)
                rows = rows_of(contest, name, size, num_tokens)
                print_rows(rows, contest.ks)
                if options.results is not None:
                    append_rows(({**asdict(row), "pair": options.pair} for row in rows), options.results)


if __name__ == "__main__":
    main()
