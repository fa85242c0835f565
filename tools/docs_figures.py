"""Draws the figures of docs/ from docs/figures/measured.json, in light and dark, and writes what they hold into the
alternative texts of the pages that show them.

    python tools/docs_figures.py             draw
    python tools/docs_figures.py --measure   run the bundled pair first (a minute), and keep what was counted
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from specengine import Engine, GenerationResult, SamplingParams, bundled
from specengine.measure import figures
from specengine.measure.bench_prompts import read_prompts
from specengine.measure.figures import Explained
from specengine.measure.theory import Costs

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = DOCS / "figures" / "measured.json"
KS = (1, 2, 3, 4, 6, 8, 10)
TEMPERATURES = (0.5, 0.8, 1.2)
NUM_PROMPTS, NEW_TOKENS = 8, 48
K_OF_POSITIONS = 8
# What repeats itself, and what does not.
TEXTS = {
    "repeats itself": "def first(items):\n    return items[0]\n\n" * 4,
    "new text": "class Stack:\n    def push(self, item):\n",
}
COSTS = Costs(draft=0.1, verify=1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of the documentation.")
    parser.add_argument("--measure", action="store_true", help="run the bundled pair first")
    if parser.parse_args().measure:
        DATA.write_text(json.dumps(measure(), indent=1) + "\n", encoding="ascii")
    data = json.loads(DATA.read_text(encoding="ascii"))
    for name, draw in drawings(data).items():
        for style, ending in (("light", ""), ("dark", "-dark")):
            path = DOCS / "figures" / f"{name}{ending}.svg"
            path.write_text(draw(style).svg(), encoding="utf-8")
    texts = alternative_texts(data)
    for page in DOCS.glob("*.md"):
        written = page.read_text(encoding="utf-8")
        described = describe(written, texts)
        if described != written:
            page.write_text(described, encoding="utf-8")


def measure() -> dict[str, Any]:
    """Counts of the bundled pair, fp32: they do not depend on the machine's speed, but for what "auto" chose."""
    acceptance: dict[str, dict[str, list[float]]] = {}
    with Engine(bundled.target_path(), bundled.draft_path(), dtype="float32") as engine:
        prompts = read_prompts(None, NUM_PROMPTS)
        for temperature in TEMPERATURES:
            by_k = acceptance.setdefault(f"{temperature:g}", {})
            for k in KS:
                results = run(engine, prompts, temperature=temperature, num_speculative_tokens=k)
                rates = [each.metrics.speculative_decoding.draft_acceptance_rate for each in results]
                by_k[str(k)] = [round(rate, 4) for rate in rates]
        results = run(engine, prompts, temperature=0.8, num_speculative_tokens=K_OF_POSITIONS)
        counts = [each.metrics.speculative_decoding for each in results]
        chosen = {
            label: [each.num_draft_tokens for each in rounds_of(engine, text)]
            for label, text in TEXTS.items()
        }
    return {
        "acceptance": acceptance,
        "drafted": summed([each.num_drafted_by_position for each in counts]),
        "accepted": summed([each.num_accepted_by_position for each in counts]),
        "rejected": summed([each.rejection_positions for each in counts]),
        "fully_accepted": sum(each.num_spec_steps - sum(each.rejection_positions) for each in counts),
        "chosen": chosen,
    }


def run(engine: Engine, prompts: list[str], **sampling: Any) -> list[GenerationResult]:
    """Every prompt with a seed of its own, and rejection sampling."""
    params = [
        SamplingParams(
            max_new_tokens=NEW_TOKENS, ignore_eos=True, acceptance="rejection", seed=seed, **sampling
        )
        for seed in range(len(prompts))
    ]
    results = engine.generate(prompts, params)
    assert isinstance(results, list), "a list gives a list"
    return results


def rounds_of(engine: Engine, text: str) -> list[Any]:
    """The rounds of a greedy continuation in which the engine chose k."""
    result = engine.generate(text, SamplingParams(max_new_tokens=150, ignore_eos=True, return_rounds=True))
    assert isinstance(result, GenerationResult), "one prompt gives one result"
    rounds = result.outputs[0].rounds
    assert rounds is not None, "they were asked for"
    return rounds


def summed(lists: list[list[int]]) -> list[int]:
    """Position by position."""
    return [
        sum(each[at] for each in lists if at < len(each)) for at in range(max(len(each) for each in lists))
    ]


def drawings(data: dict[str, Any]) -> dict[str, Callable[[Literal["light", "dark"]], Explained]]:
    """What is drawn, by the name of its file."""
    acceptance = {
        float(temperature): {int(k): rates for k, rates in by_k.items()}
        for temperature, by_k in data["acceptance"].items()
    }
    return {
        "speed-up-by-acceptance": lambda style: figures.speed_up_by_acceptance((2, 4, 8), COSTS, style=style),
        "speed-up-by-k": lambda style: figures.speed_up_by_k((0.5, 0.7, 0.8, 0.9), COSTS, style=style),
        "acceptance-by-k": lambda style: figures.acceptance_by_k(acceptance, style=style),
        "acceptance-by-position": lambda style: figures.acceptance_by_position(
            data["drafted"], data["accepted"], data["rejected"], style=style
        ),
        "rejection-positions": lambda style: figures.rejection_positions(
            data["rejected"], data["fully_accepted"], style=style
        ),
        "k-over-time": lambda style: figures.k_over_time(data["chosen"], style=style),
    }


def alternative_texts(data: dict[str, Any]) -> dict[str, str]:
    """By the name of the file, for Markdown."""
    return {
        name: re.sub(r"[\[\]]", "", draw("light").alternative_text) for name, draw in drawings(data).items()
    }


def describe(markdown: str, texts: dict[str, str]) -> str:
    """A page with the alternative texts of its figures."""
    return re.sub(
        r"!\[[^\]]*\]\(figures/([\w-]+)\.svg\)",
        lambda found: f"![{texts[found[1]]}](figures/{found[1]}.svg)",
        markdown,
    )


if __name__ == "__main__":
    main()
