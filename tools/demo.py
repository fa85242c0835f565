"""Generates plainly and speculatively, and compares every bit.

    make demo
    python tools/demo.py --model bundled --max-new-tokens 200 --repeats 9

SmolLM2, a small real model, answers and edits, and drafts by looking up what was said before. It is fetched, once,
into the user's cache; where it cannot be, the bundled pair completes Python.

Exits with 1 if a single token or a single bit of a log-probability differs.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from specengine import Engine, GenerationResult, SamplingParams, bundled
from specengine.cli.exits import complain
from specengine.cli.terminal import legend, paint, wants_color
from specengine.errors import FetchError
from specengine.fetch import fetch
from specengine.fetched import KNOWN_MODELS
from specengine.runtime.text import TokenPainter

COMPLETIONS = {
    "binary search": 'def binary_search(items, x):\n    """Return the index of x in items, or -1."""\n',
    "a class": 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
    "a script": "import argparse\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "sampled": "def read_config(path, encoding='utf-8'):\n",
}
BEES = """\
The honey bee lives in colonies of up to sixty thousand bees. A colony has one queen, who lays up to two thousand eggs \
a day, and many workers, who gather nectar and pollen, feed the young and guard the hive. In winter the bees stay in \
the hive, form a cluster around the queen and live on the honey that they stored in summer."""
CODE = """\
```python
def read_config(path):
    config = {}
    with open(path) as file:
        for line in file:
            name, value = line.split("=")
            config[name] = value
    return config
```"""
QUESTIONS = {
    "a question": "Why is the sky blue?",
    "code": "Write a Python function that reverses a string.",
    "an edit": f"Add a docstring to this function. Write the whole function.\n\n{CODE}",
    "a summary": f"Summarize this text:\n\n{BEES}",
    "sampled": "Tell me a short story about a fox.",
}
HEADINGS = ("", "tokens/s", "speed-up", "acceptance\nrate", "mean\nlength", "target\nforwards", "identical")
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
# The whole demo stays under a minute on two cores.
TIMING_BUDGET_S = 18.0


@dataclass(frozen=True)
class Subject:
    """What is shown: a model, what drafts for it, and prompts by name; questions are written out by its template."""

    model: Path
    draft: str | Path
    max_new_tokens: int
    prompts: dict[str, str]
    has_questions: bool


@dataclass
class Case:
    """One prompt, and what its runs gave: (plain, speculative) pairs.

    shown: what a person is shown of the prompt
    """

    name: str
    shown: str
    prompt: list[int]
    params: SamplingParams
    speeds: list[tuple[float, float]] = field(default_factory=list)
    plain: GenerationResult | None = None
    speculative: GenerationResult | None = None
    is_identical: bool = True


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(highlight=False)
    subject = choose(options.model)
    device = {"device": options.device, "backend": options.backend}
    with Engine(subject.model, subject.draft, **device) as engine:
        console.print(
            f"target [b]{subject.model.name}[/b], draft [b]{Path(subject.draft).name}[/b], "
            f"{engine.weight_dtype}, {engine.device.type}, backend {engine.backend_name}"
        )
        cases = build_cases(engine, subject, options.max_new_tokens)
        warm_up(engine, cases[0])
        for case in cases:
            show(engine, case, is_colored=wants_color(options.color, sys.stdout))
        for case in cases:
            compare(engine, case)
        measure(engine, cases, options.repeats)
    console.print(table(cases))
    is_identical = all(case.is_identical for case in cases)
    verdict = "yes" if is_identical else "NO"
    console.print(f"identical: [b]{verdict}[/b] (every token and every bit of its log-probability, all runs)")
    return 0 if is_identical else 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plain against speculative decoding.")
    parser.add_argument(
        "--model",
        choices=["auto", "smollm2", "bundled"],
        default="auto",
        help="auto: SmolLM2 where it is or can be fetched, else the bundled pair",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="of each prompt; default: 160, of the bundled pair 96"
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved timed runs of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto")
    return parser.parse_args(arguments)


def choose(model: str) -> Subject:
    """SmolLM2 if it can be had and nothing else is asked for; says so where it cannot."""
    if model == "bundled":
        return bundled_pair()
    try:
        return smollm2(fetch(KNOWN_MODELS["smollm2"], say=complain))
    except FetchError as error:
        if model != "auto":
            raise
        complain(f"{error}\nspecengine: the bundled pair is shown instead")
        return bundled_pair()


def bundled_pair() -> Subject:
    return Subject(bundled.target_path(), bundled.draft_path(), 96, COMPLETIONS, has_questions=False)


def smollm2(path: Path) -> Subject:
    """Drafts by lookup: answers repeat the question they are about, and themselves."""
    return Subject(path, "suffix", 160, QUESTIONS, has_questions=True)


def build_cases(engine: Engine, subject: Subject, max_new_tokens: int | None) -> list[Case]:
    assert engine.tokenizer is not None, "all that is shown has a tokenizer"
    cases = []
    for name, text in subject.prompts.items():
        sampling = SAMPLED if name == "sampled" else {}
        params = SamplingParams(max_new_tokens=max_new_tokens or subject.max_new_tokens, **sampling)
        if subject.has_questions:
            prompt = engine.apply_chat_template([{"role": "user", "content": text}])
            cases.append(Case(name, f"{text}\n\n", prompt, params))
        else:
            cases.append(Case(name, text, engine.tokenizer.encode(text), params))
    return cases


def warm_up(engine: Engine, case: Case) -> None:
    for num_speculative_tokens in (0, "auto"):
        run(engine, case, num_speculative_tokens, max_new_tokens=8)


def run(engine: Engine, case: Case, num_speculative_tokens: int | str, **changes: object) -> GenerationResult:
    params = replace(case.params, num_speculative_tokens=num_speculative_tokens, **changes)
    result = engine.generate(case.prompt, params)
    assert isinstance(result, GenerationResult), "one prompt gives one result"
    return result


def show(engine: Engine, case: Case, *, is_colored: bool) -> None:
    """Streams the speculative completion."""
    sampled = (
        ", ".join(f"{name} {value}" for name, value in SAMPLED.items())
        if case.name == "sampled"
        else "greedy"
    )
    heading = f"\n--- {case.name} ({sampled})"
    write(f"{heading}   {legend()}\n" if is_colored else f"{heading}\n")
    write(f"\x1b[2m{case.shown}\x1b[0m" if is_colored else case.shown)
    assert engine.tokenizer is not None, "all that is shown has a tokenizer"
    painter = TokenPainter(engine.tokenizer, case.prompt)
    for event in engine.stream(case.prompt, case.params):
        for piece, source in painter.split(event):
            write(paint(piece, source) if is_colored else piece)
    write("\n")


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def compare(engine: Engine, case: Case) -> None:
    """One run of each kind with log-probabilities; every bit must agree."""
    case.plain = run(engine, case, 0, logprobs=0)
    case.speculative = run(engine, case, "auto", logprobs=0)
    case.is_identical = bits(case.plain) == bits(case.speculative)


def bits(result: GenerationResult) -> list[tuple[int, bytes]]:
    entries = result.outputs[0].logprobs
    assert entries is not None and len(entries) == len(result.token_ids), "every token has a log-probability"
    return [
        (token_id, struct.pack("<d", entry.logprob))
        for token_id, entry in zip(result.token_ids, entries, strict=True)
    ]


def measure(engine: Engine, cases: list[Case], repeats: int) -> None:
    """Timed runs, plain and speculative in turn, so that both see the same machine."""
    started = time.perf_counter()
    for _ in range(repeats):
        for case in cases:
            plain, speculative = run(engine, case, 0), run(engine, case, "auto")
            case.speeds.append((plain.metrics.tokens_per_second, speculative.metrics.tokens_per_second))
            case.is_identical &= plain.token_ids == speculative.token_ids == case_tokens(case)
        if time.perf_counter() - started > TIMING_BUDGET_S:
            return


def case_tokens(case: Case) -> list[int]:
    assert case.plain is not None, "compare() comes before measure()"
    return case.plain.token_ids


def table(cases: list[Case]) -> Table:
    repeats = len(cases[0].speeds)
    title = f"\nplain → speculative, medians of {repeats} interleaved runs"
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in HEADINGS:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for case in cases:
        result.add_row(*row(case))
    return result


def row(case: Case) -> list[str]:
    assert case.plain is not None and case.speculative is not None, "compare() comes before table()"
    plain = median(speed for speed, _ in case.speeds)
    speculative = median(speed for _, speed in case.speeds)
    speculation = case.speculative.metrics.speculative_decoding
    return [
        case.name,
        f"{plain:.0f} → {speculative:.0f}",
        f"{median(fast / slow for slow, fast in case.speeds):.2f}×",
        f"{speculation.draft_acceptance_rate:.1%}",
        f"{speculation.mean_acceptance_length:.2f}",
        f"{case.plain.metrics.num_target_forwards} → {case.speculative.metrics.num_target_forwards}",
        "yes" if case.is_identical else "NO",
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
