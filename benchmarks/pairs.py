"""Widen a small trained GPT-2 to a real size (`specengine.measure.widened`).

python benchmarks/pairs.py --shape gpt2-medium --from target --dtype bfloat16 --out /tmp/gpt2-medium
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specengine.measure.widened import BUNDLED, DTYPES, MARKER, SHAPES, Shape, build_pair, build_widened

__all__ = ["BUNDLED", "DTYPES", "MARKER", "SHAPES", "Shape", "build_pair", "build_widened"]


def main(arguments: list[str] | None = None) -> None:
    """Command line: widen one model."""
    parser = argparse.ArgumentParser(description="Widen a small trained GPT-2 to a real size.")
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--from", dest="source", default="target", help="target, draft, or a GPT-2 directory")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        print(build_widened(options.source, options.shape, options.out, dtype=DTYPES[options.dtype]))
    except ValueError as error:
        sys.exit(f"pairs.py: {error}")


if __name__ == "__main__":
    main()
