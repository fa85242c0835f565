"""Everything that is to be measured on a GPU, by one command: the machine, the tests, the microbenchmarks, and the
end-to-end table.

    python benchmarks/gpu.py                                   # everything; each part takes at most eight minutes
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --only machine tests graphs-medium
    python benchmarks/gpu.py --visit 1                         # what to run first, in visits of eight minutes: 1, 2, …
    python benchmarks/gpu.py --device cpu --tiny               # without a GPU: a rehearsal, nothing is measured

A part runs in a process of its own, which is ended at its limit: what goes wrong in one does not reach the others. The
page grows part by part, and rows are in the results file after each. Exits with 0 when all went well, 1 when a part
failed, 2 where a part needs a CUDA device and there is none, or for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_parts import page, parts, runner
from gpu_parts.context import Settings
from gpu_parts.parts import LIMIT_SECONDS, Part

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Of what is known of the machine, what every row carries.
COMMON = ("machine", "host", "driver", "cuda", "triton", "transformers", "commit")
DTYPES = ("float16", "bfloat16", "float32")
REHEARSAL = "a rehearsal, not a measurement"


def main(arguments: list[str] | None = None) -> int:
    # So that a command that is told to end also ends its part.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = parse(arguments)
    if given.list:
        print("\n".join(listing()))
        return 0
    try:
        with work_directory(given) as work:
            return run(given, given.parts, work)
    except KeyboardInterrupt:
        print("gpu.py: interrupted", file=sys.stderr)
        return 130


def run(given: argparse.Namespace, chosen: list[Part], work: Path) -> int:
    """Runs the parts one after the other, prints the page, writes the results; returns the exit status."""
    about = describe()
    is_missing = given.device == "cuda" and not about["has_cuda"]
    settings = Settings(
        device=given.device,
        dtype=given.dtype,
        is_rehearsal=given.tiny,
        limit=given.limit,
        cache=str(given.cache.resolve()),
        work=str(work),
        about=about,
    )
    out = given.out or (results_path(about) if about["has_cuda"] and not given.tiny else None)
    show(page.head(about, is_rehearsal=given.tiny))
    outcomes: list[runner.Outcome] = []
    began = time.monotonic()
    for part in chosen:
        if given.visit is not None:  # its parts share the time of one
            left = given.limit - (time.monotonic() - began)
            settings = replace(settings, limit=max(left, 1.0))
        if part.needs_cuda and is_missing:
            outcome = runner.Outcome(part.name, runner.NEEDS_CUDA)
        else:
            print(f"{part.name}: {part.about}", file=sys.stderr, flush=True)
            outcome = runner.run(part, settings)
            if out is not None:
                write(outcome, about, out, is_rehearsal=given.tiny)
        outcomes.append(outcome)
        show(page.section(outcome))
    show([*page.summary(outcomes), f"logs and traces: {work}", *([] if out is None else [f"rows: {out}"])])
    return exit_status(outcomes)


def show(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


def exit_status(outcomes: list[runner.Outcome]) -> int:
    """0, 1 where a part failed, 2 where parts need a CUDA device; then one line says so."""
    left_out = [outcome.part for outcome in outcomes if outcome.status == runner.NEEDS_CUDA]
    if left_out:
        print(
            f"gpu.py: needs a CUDA device, and there is none; not run: {', '.join(left_out)} "
            "(--device cpu --tiny rehearses)",
            file=sys.stderr,
        )
        return 2
    return int(any(outcome.is_failure for outcome in outcomes))


def describe() -> dict[str, Any]:
    """The machine and the versions, see `gpu_parts.about`."""
    command = [sys.executable, "-m", "gpu_parts.about"]
    output = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    about: dict[str, Any] = json.loads(output.stdout)
    return about


def write(outcome: runner.Outcome, about: dict[str, Any], path: Path, *, is_rehearsal: bool) -> None:
    """Appends a part's rows, the last of which says how it ended."""
    from measure import append_rows

    ended = {
        "kind": "part",
        "status": outcome.status,
        "reason": outcome.reason or None,
        "seconds": round(outcome.seconds, 1),
    }
    common = {name: about[name] for name in COMMON if about.get(name)}
    common |= {"rehearsal": REHEARSAL} if is_rehearsal else {}
    append_rows(
        ({"part": outcome.part, **row, **common} for row in (*outcome.rows, ended)),
        path,
    )


def results_path(about: dict[str, Any]) -> Path:
    """`benchmarks/results/gpu_h100_80gb_hbm3.jsonl`."""
    name = re.sub(r"[^a-z0-9]+", "_", about["machine"].lower().removeprefix("nvidia")).strip("_")
    return RESULTS / f"gpu_{name}.jsonl"


def listing() -> list[str]:
    """A line a part; `--only` takes a group too."""
    width = max(len(part.name) for part in parts.PARTS)
    marks = {part.name: " [only when named]" * part.is_named for part in parts.PARTS}
    groups = ", ".join(dict.fromkeys(part.group for part in parts.PARTS))
    return [
        *(f"{part.name.ljust(width)}  {part.about}{marks[part.name]}" for part in parts.PARTS),
        *(f"visit {index}: {', '.join(visit)}" for index, visit in enumerate(parts.VISITS, start=1)),
        f"groups: {groups}",
    ]


@contextmanager
def work_directory(given: argparse.Namespace) -> Iterator[Path]:
    """Where logs and traces go; what a rehearsal leaves there nobody wants."""
    if given.work is None and given.tiny:
        with tempfile.TemporaryDirectory(prefix="specengine-gpu-") as directory:
            yield Path(directory)
    else:
        yield (given.work or ROOT / "build" / "gpu").resolve()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked arguments; `parts` are those that were chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PART", help="parts or groups, see --list; all by default")
    add(
        "--visit",
        type=int,
        choices=range(1, len(parts.VISITS) + 1),
        help="what to run first, in visits that take no longer than one part may",
    )
    add("--list", action="store_true", help="list the parts")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="rehearse: the bundled pair, few tokens, nothing is measured")
    add("--dtype", choices=DTYPES, help="of the models' weights (default: float16; float32 in a rehearsal)")
    add(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        metavar="SECONDS",
        help="of a part (default: %(default).0f)",
    )
    add("--out", type=Path, metavar="PATH", help="append rows to this file (default: in benchmarks/results/)")
    add(
        "--cache",
        type=Path,
        default=ROOT / "build" / "pairs",
        metavar="PATH",
        help="where widened models are kept",
    )
    add("--work", type=Path, metavar="PATH", help="where logs and traces go (default: build/gpu)")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu needs --tiny: it rehearses, and measures nothing")
    if not 0 < given.limit <= LIMIT_SECONDS:
        parser.error(f"--limit must be above 0 and at most {LIMIT_SECONDS:.0f}, got {given.limit:g}")
    if given.only and given.visit is not None:
        parser.error("--visit has parts of its own: leave --only out")
    names = [name for text in given.only for name in text.split(",")]
    names += parts.VISITS[given.visit - 1] if given.visit is not None else ()
    try:
        chosen = parts.select(names)
    except ValueError as error:
        parser.error(f"--only: {error}")
    given.parts = parts.rehearsed(chosen) if given.tiny else chosen
    if not given.parts:
        parser.error("--only: none of these parts can be rehearsed")
    given.dtype = given.dtype or ("float32" if given.tiny else "float16")
    return given


if __name__ == "__main__":
    sys.exit(main())
