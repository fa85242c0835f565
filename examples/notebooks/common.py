"""What the notebooks share: the models they run on, taking turns, tables, and showing a figure.

Where the Hugging Face Hub (or its cache) has the models that an experiment names, they are taken. Elsewhere stand-ins
are built once, below build/notebooks: the bundled pair, two small models of Python code, widened to the sizes of the
real ones. A widened model computes what the small one computes and costs what the large one costs, so acceptance is
that of a trained pair, and times are those of the sizes; only the text is that of a small model of Python.
"""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Any

from specengine import GenerationResult, bundled
from specengine.measure.statistics import median_interval
from specengine.measure.theory import Costs, equal_acceptance

if TYPE_CHECKING:
    from specengine.measure.figures import Explained

# Tests run every notebook in small: the bundled pair as it is, few tokens, few repeats.
IS_SMALL = bool(os.environ.get("SPECENGINE_NOTEBOOKS_SMALL"))
STAND_INS = Path(__file__).resolve().parents[2] / "build" / "notebooks"

ENGLISH = (
    "The future of artificial intelligence is",
    "In a distant galaxy, a small ship",
    "The most important lesson of history is",
)
# The stand-ins were trained on Python's standard library, and are asked for Python.
PYTHON = (
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
    "import argparse\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser(",
)


def int8_on_cpu() -> str:
    """How a draft's weights are kept where its own dtype is not asked for: in a quarter of float32's bytes, where int8
    can be computed with. It changes what is drafted a little, and what is generated not at all."""
    import torch

    return "auto" if torch.cuda.is_available() else "int8"


def size(full: int, small: int) -> int:
    """A number of tokens, repeats or samples: `small` where a test runs this."""
    return small if IS_SMALL else full


# Models


@dataclass(frozen=True)
class Pair:
    """A target and a draft, for `specengine.Engine(pair.target, pair.draft)`.

    prompts: three that the models have something to say to
    about:   a sentence: what they are
    """

    target: str | Path
    draft: str | Path
    prompts: tuple[str, ...]
    about: str
    is_stand_in: bool

    def _repr_html_(self) -> str:
        return f"<p><strong>This ran on:</strong> {html.escape(self.about)}</p>"

    def __repr__(self) -> str:
        return f"This ran on: {self.about}"


def find_pair(target: str, draft: str) -> Pair:
    """The models of these names from the Hub, or stand-ins of their sizes."""
    missing = "the models are as small as can be" if IS_SMALL else _why_not_from_hub(target, draft)
    if missing is None:
        return Pair(target, draft, ENGLISH, f"{draft} → {target}, from the Hugging Face Hub.", False)
    if IS_SMALL:
        paths = _small_pair(target)
        about = f"the bundled pair, 2.9 and 11.5 million parameters, for {draft} → {target}."
    else:
        target_path, target_size = _build(target, "target")
        drafts_name = f"{draft} for {target}"
        draft_path, draft_size = _build(drafts_name if drafts_name in _shapes() else draft, "draft")
        paths = (target_path, draft_path)
        about = (
            f"stand-ins for {draft} → {target} ({missing}): the bundled pair, two small models of Python code, widened "
            f"without a change to what they compute. Draft: {draft_size}. Target: {target_size}."
        )
    return Pair(*paths, PYTHON, about, True)


def _why_not_from_hub(*names: str) -> str | None:
    """None where the Hub, or its cache, has them all."""
    from huggingface_hub import snapshot_download

    name = names[0]
    try:
        for name in names:
            snapshot_download(name, allow_patterns=["config.json"], etag_timeout=5)
    except Exception as error:  # no network, offline, no such name: errors of several libraries
        return f"{name} could not be had from the Hub, {type(error).__name__}"
    return None


def _shapes() -> dict[str, tuple[Any, str]]:
    """By name of a model: the shape of its stand-in, and a word about it. The largest have a third of the layers, so
    that 8 GB of memory are enough for them in float32; so have their drafts, which keeps the ratio of costs."""
    from specengine.measure.widened import SHAPES, Shape

    third = "a third of the real one's layers"
    return {
        "distilgpt2": (SHAPES["distilgpt2"], "the shape of the real one"),
        "gpt2": (SHAPES["gpt2"], "the shape of the real one"),
        "gpt2-medium": (SHAPES["gpt2-medium"], "the shape of the real one"),
        "gpt2-xl": (Shape(1600, 16, 25), third),
        "gpt2 for gpt2-xl": (Shape(768, 4, 12), third),
        "facebook/opt-1.3b": (Shape(2048, 8, 32, 50272, 2048), third),
        "gpt2 for facebook/opt-1.3b": (Shape(768, 4, 12), third),
        "EleutherAI/pythia-1.4b": (Shape(2048, 8, 32, 50304, 2048), f"{third}, a GPT-2 in architecture"),
        "EleutherAI/pythia-160m": (Shape(768, 4, 12, 50304, 2048), f"{third}, a GPT-2 in architecture"),
    }


def _small_pair(target: str) -> tuple[Path, Path]:
    if "opt" not in target:
        return bundled.target_path(), bundled.draft_path()
    from specengine.measure.renumbered import build_foreign

    path = STAND_INS / "target-renumbered"
    build_foreign(path, None, _bfloat16())
    return path, bundled.draft_path()


def _build(name: str, role: str) -> tuple[Path, str]:
    """The directory of a stand-in, built if it is not there yet, and what it is."""
    from specengine.measure.renumbered import build_foreign
    from specengine.measure.widened import build_widened

    shape, remark = _shapes()[name]
    path = STAND_INS / f"{role}-{name.rpartition('/')[2].replace(' ', '-')}-{shape.num_layers}"
    if "opt" in name and role == "target":
        build_foreign(path, shape, _bfloat16())
        remark += ", an OPT in architecture, under other token ids than the draft's"
    else:
        build_widened(role, shape, path, dtype=_bfloat16())
    return path, f"{shape.num_features} features, {shape.num_layers} layers ({remark})"


def _bfloat16() -> Any:
    import torch

    return torch.bfloat16


# Measuring


def take_turns(
    ways: Mapping[Any, Callable[[], GenerationResult]], repeats: int
) -> dict[Any, list[GenerationResult]]:
    """The results of each way to generate. They take turns, beginning with another one each time, so that what slows
    the machine for a while slows all of them; a first turn warms up and does not count."""
    results: dict[Any, list[GenerationResult]] = {name: [] for name in ways}
    names = list(ways)
    for name in names:
        ways[name]()
    for repeat in range(repeats):
        at = repeat % len(names)
        for name in names[at:] + names[:at]:
            results[name].append(ways[name]())
    return results


def seconds(results: Sequence[GenerationResult]) -> list[float]:
    """From the request to the last token, of each."""
    return [result.metrics.total_time for result in results]


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the interval in which it lies with 95 % (bootstrap)."""
    median, low, high = median_interval(values)
    return f"{median:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def fit_costs(
    plain: Sequence[GenerationResult], speculative: Mapping[int, Sequence[GenerationResult]]
) -> Costs:
    """c and v, the times of a draft step and of a verification in plain rounds: by least squares, a round with k drafts
    takes k c + v. Of texts after one prompt; two values of k at least."""
    plain_round = fmean(result.metrics.decode_time / (len(result.token_ids) - 1) for result in plain)
    rounds = {
        k: fmean(
            result.metrics.decode_time / result.metrics.speculative_decoding.num_rounds for result in results
        )
        / plain_round
        for k, results in speculative.items()
    }
    draft, verify = linear_regression(list(rounds), list(rounds.values()))
    return Costs(draft=max(draft, 0.0), verify=max(verify, 1e-3))


def measured_point(
    k: int, plain: Sequence[GenerationResult], speculative: Sequence[GenerationResult]
) -> tuple[float, int, float]:
    """(α, k, speed-up) of runs, for the figures of the formula: α is the one that explains their tokens a round."""
    tokens = fmean(result.metrics.speculative_decoding.mean_acceptance_length for result in speculative)
    a_token = [
        fmean(result.metrics.decode_time / (len(result.token_ids) - 1) for result in results)
        for results in (plain, speculative)
    ]
    return equal_acceptance(min(tokens, k + 1), k), k, a_token[0] / a_token[1]


# Showing


@dataclass(frozen=True)
class Table:
    """Rows under headings. In a notebook it shows itself."""

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n"
            for row in self.rows
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"

    def __repr__(self) -> str:
        lines = [self.headings, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headings))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def show(drawn: Explained) -> None:
    """A figure with its two sentences. It is an ordinary matplotlib figure, `drawn.figure`."""
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, format="png", dpi=110)
    try:
        from IPython import get_ipython
        from IPython.display import Markdown, display
    except ImportError:
        return
    if get_ipython() is None:  # a plain Python run of the script
        return
    data = {"image/png": buffer.getvalue(), "text/plain": drawn.alternative_text}
    display(data, metadata={"image/png": {"alt": drawn.alternative_text}}, raw=True)
    display(Markdown(f"*{drawn.explanation}*"))
