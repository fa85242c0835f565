"""What a token, a draft and a round should cost on an H200: a model made of compiled kernels, not a measurement.

    python benchmarks/gpu_model.py                       # gpt2-medium, gpt2-xl and the draft, a line a kernel
    python benchmarks/gpu_model.py --dtype int8          # with weights of 8 bits, the heads' too
    python benchmarks/gpu_model.py --json model.json     # the same as JSON

Needs no GPU: kernels are compiled for sm_90 and their machine code is read. See docs/gpu.md, "A model of the time".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aot_suite import Storage
    from gpu_costs.rounds import Sum

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # where kernels are compiled without a GPU


def main() -> None:
    from aot_suite import DTYPES
    from gpu_costs.rounds import PROMPT, K, draft_step, plain_token, prompt_layer, speculative_round

    dtypes = {name: DTYPES[name] for name in ("float16", "int8", "int4_min", "int8_group")}
    known: dict[str, Callable[[Storage], Sum]] = {"draft step": draft_step}
    for target in ("gpt2-medium", "gpt2-xl"):
        known[f"{target} token"] = partial(plain_token, target)
        known[f"{target} round"] = partial(speculative_round, target)
        known[f"{target} prompt"] = partial(prompt_layer, target)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write every number")
    parser.add_argument(
        "--only", nargs="+", choices=known, metavar="NAME", default=known, help=", ".join(known)
    )
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="the weights'")
    arguments = parser.parse_args()
    sums = {name: known[name](dtypes[arguments.dtype]) for name in arguments.only}
    print(f"A model of an H200, not a measurement; microseconds; a round has {K} drafts.")
    print(f"A prompt: one layer's part in {PROMPT} tokens, without attention.")
    for name, total in sums.items():
        print(f"\n{name}: {total.us:.0f} ({len(total.costs)} launches, bytes alone {total.floor_us:.0f})")
        print(
            f"{'kernel':24}{'n':>4}{'us':>7}{'floor':>7}{'to copy':>9}{'levels':>7}{'bars':>6}{'shfl':>6}"
            f"{'a block':>9}{'regs':>5}{'KB':>5}{'fit':>4}{'waves':>6}"
        )
        for each, count in total.by_kernel():
            a_block = "-" if each.a_block is None else "{} / {}".format(*each.a_block)
            print(
                f"{each.name.removeprefix('spec_'):24}{count:4}{each.us:7.2f}{each.floor_us:7.2f}"
                f"{each.to_first_copy or 0:9}{each.levels:7}{each.barriers:6}{each.shuffles:6}{a_block:>9}"
                f"{each.registers:5}{each.shared_bytes >> 10:5}{each.resident:4}{each.waves:6}"
            )
    if arguments.json:
        rows = {
            name: {"us": total.us, "kernels": [{**asdict(each), "count": n} for each, n in total.by_kernel()]}
            for name, total in sums.items()
        }
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
