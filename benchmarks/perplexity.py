"""What storing the weights in fewer bits costs: perplexity on text that the model has not seen.

    python benchmarks/perplexity.py                 # the bundled target on the held-out files of the standard library
    python benchmarks/perplexity.py --model path/to/model --text-file some.txt --results out.jsonl

Every storage reads the same blocks of consecutive tokens, each with an empty cache; the first token of a block is not
predicted.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import append_rows, machine_name

from specengine import Engine, SamplingParams, bundled

ROOT = Path(__file__).resolve().parent.parent
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "int8", "int8_group", "int4_min", "int4")


@dataclass(frozen=True)
class Row:
    """perplexity = exp(nats_per_token); change: of the perplexity, relative to the first dtype's."""

    model: str
    weight_dtype: str
    num_tokens: int
    nats_per_token: float
    perplexity: float
    change: float


def held_out_text() -> str:
    """The standard library's files that the bundled pair was not trained on."""
    sys.path.insert(0, str(ROOT / "tools"))
    from bundled.corpus import load_documents  # type: ignore[import-not-found]

    return "\n".join(document.text for document in load_documents() if document.is_held_out)


def mean_loss(engine: Engine, blocks: list[list[int]]) -> tuple[float, int]:
    """Nats per predicted token, and how many were predicted."""
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for block in blocks:
        entries = engine.generate(block, params).prompt_logprobs[1:]
        total -= sum(entry.logprob for entry in entries)
        count += len(entries)
    return total / count, count


def measure(model: str, text: str, num_blocks: int, block_size: int, dtypes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for dtype in dtypes:
        with Engine(model, weight_dtype=dtype, dtype="float32", enable_prefix_cache=False) as engine:
            size = min(block_size, engine.max_seq_len - 1)
            ids = engine.tokenizer.encode(text)
            starts = range(0, len(ids) - size, max(size, len(ids) // num_blocks))
            nats, count = mean_loss(engine, [ids[at : at + size] for at in starts][:num_blocks])
        perplexity = math.exp(nats)
        base = rows[0].perplexity if rows else perplexity
        rows.append(Row(Path(model).name, dtype, count, nats, perplexity, perplexity / base - 1))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Perplexity by the storage of the weights.")
    parser.add_argument("--model", default=str(bundled.target_path()))
    parser.add_argument("--text-file", type=Path, help="default: the held-out files of the standard library")
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--block-size", type=int, default=1023)
    parser.add_argument("--dtypes", nargs="+", default=list(WEIGHT_DTYPES), choices=WEIGHT_DTYPES)
    parser.add_argument("--results", type=Path, help="append JSON lines here")
    options = parser.parse_args(arguments)
    if options.blocks < 1 or options.block_size < 2:
        parser.error("--blocks must be at least 1 and --block-size at least 2")
    text = held_out_text() if options.text_file is None else options.text_file.read_text(encoding="utf-8")
    rows = measure(options.model, text, options.blocks, options.block_size, options.dtypes)
    print(f"{machine_name()}; {rows[0].model}, {rows[0].num_tokens} tokens")
    for row in rows:
        print(
            f"{row.weight_dtype:10} {row.nats_per_token:.4f} nats  ppl {row.perplexity:.3f}  {row.change:+.3%}"
        )
    if options.results is not None:
        append_rows(map(asdict, rows), options.results)


if __name__ == "__main__":
    main()
