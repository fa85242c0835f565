"""A draft model of another vocabulary: what that costs in acceptance, and GPT-2 drafting for an OPT.

    python benchmarks/foreign_vocabulary.py                          # both parts; the OPT has the shape of opt-1.3b
    python benchmarks/foreign_vocabulary.py --shape opt-125m --repetitions 3
    python benchmarks/foreign_vocabulary.py --parts pair

`pair`: the bundled draft for the bundled target, with one vocabulary; for the same target with all of its ids permuted;
and for that one by text, as drafts are made where hardly a token is shared. Greedy tokens must be those of plain
decoding, and those of the target before its ids were permuted, or nothing is reported.

`opt`: the bundled target widened to the shape of an OPT, in that architecture and with other ids, and the bundled draft
widened to gpt2's: the pair of a lab notebook, at its temperature, draft length, prompts and number of tokens, where a
draft was kept if the target gave it more than 0.1 (`acceptance="threshold"`), beside the two exact modes. OPT may have
GPT-2's activation, and its embeddings and output projections are scaled so that its fixed epsilon means the source's:
it computes the same function. Each mode takes its turn in each repetition, to and fro, plain decoding among them.

How far a mode is from the target's distribution is printed as two numbers. `logprob` is the mean log-probability that
the target (at temperature 1) gives to what was said. `distance` is the total variation between the target's law of the
next token (at the temperature) and the mode's where a draft is made, on average over texts of the target's own: exact
modes have 0, and threshold's is |kept - p| summed and halved, with what it keeps of the draft's law q where
p > 0.1, and p for the rest. Both laws are those of the bundled models, whose functions the widened ones compute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_strategies import interval
from cpu_timing import machine_name
from generation.plan import read_prompts
from measure import ROOT
from pairs import BUNDLED, DTYPES, SHAPES, build_widened

from specengine import Engine, GenerationResult, translation
from specengine.measure.renumbered import OPT_SHAPES, build_foreign

PROMPTS = ("The future of AI", "Machine learning is", "Python programming")
TEMPERATURE, GAMMA, NUM_TOKENS, THRESHOLD = 0.8, 5, 30, 0.1


# -- what is measured -----------------------------------------------------------------------------------------------


@dataclass
class Mode:
    """A way to decode, and what its turns gave. seconds: a number a repetition; results: of all of them."""

    name: str
    engine: Engine
    k: int
    sampling: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    results: list[GenerationResult] = field(default_factory=list)

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int], **more: Any) -> list[GenerationResult]:
        """Each prompt with each seed, one after the other. No two have the same noise at a position."""
        return [
            self.engine.generate(
                prompt,
                num_speculative_tokens=self.k,
                seed=len(prompts) * seed + index,
                **self.sampling,
                **more,
            )
            for index, prompt in enumerate(prompts)
            for seed in seeds
        ]

    def take_turn(self, prompts: Sequence[Any], seeds: Sequence[int], **more: Any) -> None:
        results = self.generate(prompts, seeds, **more)
        self.results += results
        self.seconds.append(sum(result.metrics.decode_time for result in results))

    @property
    def acceptance(self) -> float:
        """Accepted of drafted, over all turns."""
        return self._sum("num_accepted_draft_tokens") / max(1, self._sum("num_draft_tokens"))

    @property
    def standard_error(self) -> float:
        """Of `acceptance`, each result one observation of a ratio."""
        counts = [result.metrics.speculative_decoding for result in self.results]
        residuals = [
            each.num_accepted_draft_tokens - self.acceptance * each.num_draft_tokens for each in counts
        ]
        return math.sqrt(sum(value * value for value in residuals)) / max(1, self._sum("num_draft_tokens"))

    @property
    def mean_length(self) -> float:
        return 1 + self._sum("num_accepted_draft_tokens") / max(1, self._sum("num_rounds"))

    @property
    def tokens_a_second(self) -> float:
        return sum(len(result.token_ids) - 1 for result in self.results) / sum(self.seconds)

    def _sum(self, name: str) -> int:
        return sum(getattr(result.metrics.speculative_decoding, name) for result in self.results)


@contextmanager
def always_by_text() -> Iterator[None]:
    """Engines that are built meanwhile find that no draft shares enough."""
    usual, translation.MIN_SHARED = translation.MIN_SHARED, 2.0
    try:
        yield
    finally:
        translation.MIN_SHARED = usual


def measure_pair(options: argparse.Namespace) -> None:
    """One vocabulary, two, and text."""
    prompts = read_prompts(options.prompts).short
    config = {"num_threads": options.threads, "enable_prefix_cache": False}
    sampled = {"temperature": TEMPERATURE, "acceptance": "rejection"}
    samplings: dict[str, dict[str, Any]] = {
        "greedy": {},
        "T = 0.8, rejection": sampled,
        "T = 0.8, coupled": {**sampled, "acceptance": "coupled"},
    }
    common = {"max_new_tokens": 48, "ignore_eos": True}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        foreign = Path(scratch) / "target"
        order = build_foreign(foreign, None, torch.bfloat16)
        renumbered = [[order[token] for token in prompt] for prompt in prompts]
        one = stack.enter_context(Engine(BUNDLED / "target", BUNDLED / "draft", **config))
        two = stack.enter_context(Engine(foreign, BUNDLED / "draft", **config))
        with always_by_text():
            text = stack.enter_context(Engine(foreign, BUNDLED / "draft", **config))
        cases = {
            "one vocabulary": (one, prompts),
            "two": (two, renumbered),
            "two, by text": (text, renumbered),
        }
        print(f"\nBundled pair, {one.dtype}, k = {options.k}, {len(prompts)} prompts, 48 tokens")
        print("\n| sampling | vocabularies | accepted (± standard error) | mean length | tokens/s |")
        print("|---|---|---:|---:|---:|")
        for label, sampling in samplings.items():
            seeds = range(1, 1 + (options.pair_seeds if sampling else 1))
            modes = {
                name: Mode(name, engine, options.k, {**common, **sampling})
                for name, (engine, _) in cases.items()
            }
            for name, mode in modes.items():
                mode.take_turn(cases[name][1], seeds)
            if not sampling:
                check_greedy(modes, cases, order)
            for name, mode in modes.items():
                print(
                    f"| {label} | {name} | {mode.acceptance:.1%} ± {mode.standard_error:.1%} "
                    f"| {mode.mean_length:.2f} | {mode.tokens_a_second:.0f} |",
                    flush=True,
                )
            one_error, error = modes["one vocabulary"].standard_error, modes["two"].standard_error
            difference = modes["two"].acceptance - modes["one vocabulary"].acceptance
            allowed = 0.02 + 2 * math.hypot(one_error, error) if sampling else 0.0
            if abs(difference) > allowed:
                sys.exit(f"{label}: acceptance differs by {difference:+.1%} between one vocabulary and two")


def check_greedy(modes: dict[str, Mode], cases: dict[str, Any], order: Sequence[int]) -> None:
    """Of each engine the tokens of its plain decoding; of all of them the same tokens."""
    for name, mode in modes.items():
        engine, prompts = cases[name]
        plain = Mode(name, engine, 0, mode.sampling).generate(prompts, [1])
        if [result.token_ids for result in plain] != [result.token_ids for result in mode.results]:
            sys.exit(f"{name}: not the tokens of plain decoding")
    expected = [[order[token] for token in result.token_ids] for result in modes["one vocabulary"].results]
    for name in ("two", "two, by text"):
        if [result.token_ids for result in modes[name].results] != expected:
            sys.exit(f"{name}: not the tokens of the target before its ids were permuted")


def measure_opt(options: argparse.Namespace) -> None:
    """Exact and threshold side by side."""
    dtype, cache = DTYPES[options.dtype], ROOT / "build" / "pairs"
    target = cache / f"foreign-{options.shape}-{options.dtype}"
    order = build_foreign(target, OPT_SHAPES[options.shape], dtype)
    draft = build_widened("draft", SHAPES["gpt2"], cache / f"draft-gpt2-{options.dtype}", dtype=dtype)
    sampling = {"temperature": TEMPERATURE, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    seeds = range(1, 1 + options.seeds)
    with Engine(
        target,
        draft,
        dtype=options.dtype,
        draft_weight_dtype="int8",
        num_threads=options.threads,
        enable_prefix_cache=False,
    ) as engine:
        modes = [Mode("plain", engine, 0, sampling)] + [
            Mode(name, engine, GAMMA, sampling | {"acceptance": name})
            for name in ("rejection", "block", "coupled", "threshold")
        ]
        modes[-1].sampling["acceptance_threshold"] = THRESHOLD
        for mode in modes:
            mode.generate(PROMPTS, [1])  # warm
        for repetition in range(options.repetitions):
            for mode in modes if repetition % 2 == 0 else reversed(modes):
                mode.take_turn(PROMPTS, [seed + repetition * options.seeds for seed in seeds])
            print(f"{repetition + 1} of {options.repetitions}", file=sys.stderr, flush=True)
        said = [logprobs(mode, options.quality_seeds) for mode in modes]
        texts = modes[0].results
    distance = threshold_distance(texts, order)
    print(
        f"\ngpt2 → {options.shape}, {options.dtype}, draft int8, T = {TEMPERATURE}, gamma = {GAMMA}, "
        f"{len(PROMPTS)} prompts, {NUM_TOKENS} tokens, {options.repetitions} repetitions in turn of "
        f"{options.seeds} seeds; logprob from {options.quality_seeds} seeds\n"
    )
    print(
        "| acceptance | accepted | mean length | ms a prompt | × plain (95 %) | logprob (± standard error) | distance |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for mode, (logprob, error) in zip(modes, said, strict=True):
        low, high = interval(modes[0].seconds, mode.seconds)
        seconds = statistics.median(mode.seconds)
        speed = statistics.median(modes[0].seconds) / seconds
        rate = f"{mode.acceptance:.1%}" if mode.k else "–"
        print(
            f"| {mode.name} | {rate} | {mode.mean_length:.2f} "
            f"| {1000 * seconds / (len(PROMPTS) * options.seeds):.0f} | {speed:.2f} ({low:.2f} … {high:.2f}) "
            f"| {logprob:.3f} ± {error:.3f} | {distance if mode.name == 'threshold' else 0.0:.3f} |"
        )


def logprobs(mode: Mode, num_seeds: int) -> tuple[float, float]:
    """What the target thinks of a token that was said, and the standard error, each text one observation. Not timed:
    asking for it is another round."""
    results = mode.generate(PROMPTS, range(1000, 1000 + num_seeds), logprobs=0)
    means = [
        statistics.fmean(entry.logprob for entry in result.outputs[0].logprobs or []) for result in results
    ]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


@torch.no_grad()
def threshold_distance(
    results: Sequence[GenerationResult], order: Sequence[int], *, threshold: float = THRESHOLD
) -> float:
    """The mean total variation of the law of a token that threshold judges, over the places of these texts."""
    old_ids = {new: old for old, new in enumerate(order)}
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32).eval()
        for name in ("target", "draft")
    )
    distances = []
    for result in results:
        text = [old_ids[token] for token in [*result.prompt_token_ids, *result.token_ids]]
        p, q = (
            (
                model(torch.tensor([text])).logits[0, len(result.prompt_token_ids) - 1 : -1].double()
                / TEMPERATURE
            ).softmax(-1)
            for model in (target, draft)
        )
        kept = torch.where(p > threshold, q, 0.0)
        law = kept + (1 - kept.sum(dim=1, keepdim=True)) * p
        distances += ((law - p).abs().sum(dim=1) / 2).tolist()
    return statistics.fmean(distances)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default="pair,opt")
    parser.add_argument("--shape", choices=OPT_SHAPES, default="opt-1.3b", help="of the OPT")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the OPT")
    parser.add_argument("--prompts", type=int, default=8, help="of the bundled pair")
    parser.add_argument("-k", type=int, default=4, help="of the bundled pair")
    parser.add_argument("--pair-seeds", type=int, default=16, help="of the bundled pair")
    parser.add_argument("--seeds", type=int, default=2, help="in a turn of the OPT")
    parser.add_argument("--quality-seeds", type=int, default=32, help="for what the OPT thinks of the texts")
    parser.add_argument("--repetitions", type=int, default=7, help="of the OPT")
    parser.add_argument("--threads", type=int, default=None, help="of an engine; by default its own choice")
    return parser.parse_args()


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", "acceptance=")  # the loss is what is measured
    print(f"{machine_name(options.threads)}, torch {torch.__version__}")
    for name, measure in (("pair", measure_pair), ("opt", measure_opt)):
        if name in options.parts:
            measure(options)


if __name__ == "__main__":
    main()
