"""The programs of examples/: each runs as it stands, and says what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What each must print, as patterns.
SHOWN = {
    "quickstart": [r"60 tokens in (\d|[1-3]\d) forwards of the target", r"[2-5]\.\d\d tokens a round"],
    "streaming": [r"^\[import\]", r"40 tokens in (\d|[12]\d) events, [1-9]\d* of them drafted"],
    "own_models": [r"k = 0: 48 forwards of the target\nk = 4: ([1-9]|[1-3]\d) forwards of the target"],
    "batch": [r"'import os\\n': 20 tokens", r"'# A list of numbers\\n': 24 tokens", "each is the same alone"],
    "seeds_and_exactness": [
        "greedy: the same bits",
        "seed 7: the same bits",
        "4 seeds: 4 texts",
        "without a seed: lossless True, seed reported True",
        "acceptance='threshold': lossless False",
    ],
    "custom_drafter": [r"[1-9]\d* drafted tokens were accepted, and the text is the same"],
    "logits_processor": [r"40 calls for 40 tokens, [1-9]\d* of them drafted"],
    "lookup_for_edits": [
        r"ngram: [1-5]\d forwards of the target instead of 80",
        r"suffix: [1-5]\d forwards of the target instead of 80",
    ],
    "metrics_and_figures": [
        r"accepted, if all before were: (\d+% ){5}\d+%",
        r"best for a draft step of 0\.2 plain steps: k = [1-6], ",
        "First rejected draft of a round: Bars:",
    ],
    "threaded_loop": ["ended early by: abort", r"(: 30 tokens\n.*){4}", "closed"],
}
# What is given to some, and what they then leave in the folder that they run in: the others leave nothing.
ARGUMENTS = {"own_models": ["--prompt", "import re\n"], "metrics_and_figures": ["."]}
WRITTEN = {
    "metrics_and_figures": {"acceptance-by-position.png", "rejection-positions.png", "speed-up-by-k.png"}
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_and_shows_what_it_is_for(name: str, tmp_path: Path) -> None:
    """From elsewhere, as a user would, and with one thread beside other tests."""
    environment = {**os.environ, "SPECENGINE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        [*command, *ARGUMENTS.get(name, [])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    missing = [pattern for pattern in SHOWN[name] if not re.search(pattern, done.stdout, re.MULTILINE)]
    assert missing == [], done.stdout
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN.get(name, set())
