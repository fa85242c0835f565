"""Train the bundled pair from the standard library's source, or measure it again.

python tools/train_bundled_pair.py --out specengine/bundled              # everything, about an hour on two cores
python tools/train_bundled_pair.py --out /tmp/pair --smoke               # a few minutes: the same path, barely trained
python tools/train_bundled_pair.py --out specengine/bundled --evaluate   # metrics.json and MODEL_CARD.md again
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from bundled import card, corpus, evaluation, prompts, shapes, training, vocabulary
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

log = logging.getLogger("train_bundled_pair")

NUM_LOSS_BLOCKS = 96


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are what the shipped pair was trained with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the pair (specengine/bundled)")
    parser.add_argument("--target-steps", type=int, nargs="+", default=[800], help="ends of its cycles")
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[600], help="ends of its cycles")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(shapes.SHAPES),
        default=list(shapes.SHAPES),
        help="train these only; the draft needs a finished target in --out",
    )
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--state", type=Path, help="directory for training states: an interrupted run goes on"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps: checks the path, not the result")
    parser.add_argument("--evaluate", action="store_true", help="train nothing; measure the pair in --out")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.target_steps = options.draft_steps = [5, 8]
    return options


def build_sampler(documents: list[corpus.Document], tokenizer: Tokenizer, seed: int) -> training.BlockSampler:
    """Training blocks: test files once an epoch, everything else twice."""
    kept = [document for document in documents if not document.is_held_out]
    repeats = [1 if document.is_test else 2 for document in kept]
    arrays = vocabulary.encode_documents(tokenizer, kept)
    log.info("%d files, %d tokens to train on", len(kept), sum(map(len, arrays)))
    return training.BlockSampler(arrays, repeats, seed)


def build_schedule(name: str, options: argparse.Namespace) -> training.Schedule:
    """How each model is trained: the target on the text, the draft one part on that, nine parts on the target."""
    if name == "target":
        schedule = training.Schedule(tuple(options.target_steps), seed=options.seed)
    else:
        schedule = training.Schedule(
            tuple(options.draft_steps), distillation_share=0.9, seed=options.seed + 1
        )
    return dataclasses.replace(schedule, warmup_steps=2) if options.smoke else schedule


def save_model(model: GPT2LMHeadModel, name: str, tokenizer: Tokenizer, directory: Path) -> None:
    """Write one Hugging Face directory, weights and tokenizer."""
    shapes.export_model(model, name, directory)
    vocabulary.save_tokenizer(tokenizer, directory, shapes.CONTEXT)


def train_model(name: str, documents: list[corpus.Document], options: argparse.Namespace) -> None:
    """Train `name` and put it, with its training record, into `--out`. The draft finds its target there."""
    tokenizer = vocabulary.train_tokenizer(documents)
    schedule = build_schedule(name, options)
    device = torch.device(options.device)
    sampler = build_sampler(documents, tokenizer, schedule.seed)
    teacher = shapes.load_exported(options.out / "target") if name == "draft" else None
    model = shapes.build_model(name, options.seed)
    log.info("%s: %s", name, shapes.count_parameters(model))
    seconds = training.train(
        model, sampler, schedule,
        device=device,
        teacher=teacher,
        state_path=options.state / f"{name}.pt" if options.state else None,
    )  # fmt: skip
    tokens = schedule.num_steps * schedule.tokens_per_step
    record = dataclasses.asdict(schedule) | {
        "num_steps": schedule.num_steps,
        "tokens": tokens,
        "seconds": round(seconds),
    }
    with tempfile.TemporaryDirectory(prefix=".training-", dir=options.out.parent) as scratch:
        save_model(model, name, tokenizer, Path(scratch) / name)
        replace_directory(Path(scratch) / name, options.out / name)
    path = options.out / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    common = {"environment": environment(options), "data_sha256": corpus.digest(documents)}
    shapes.write_json(path, {"training": metrics.get("training", {}) | common | {name: record}})


def write_prompts(documents: list[corpus.Document], options: argparse.Namespace) -> None:
    """Choose the held-out prompts and write them into `--out`."""
    tokenizer = Tokenizer.from_file(str(options.out / "target" / "tokenizer.json"))
    chosen = prompts.choose_prompts(documents, tokenizer, options.seed)
    prompts.save_prompts(chosen, options.out / "prompts.jsonl")


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to compare times: versions, processor, threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
    }


def processor_name() -> str:
    """The model name that Linux gives the processor, else what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def evaluate(documents: list[corpus.Document], options: argparse.Namespace) -> None:
    """Measure the pair in `--out`; writes metrics.json (keeping the training record) and MODEL_CARD.md."""
    path = options.out / "metrics.json"
    record = json.loads(path.read_text())["training"]
    if corpus.digest(documents) != record["data_sha256"]:
        log.warning("this standard library is not the one the pair was trained on: held-out files may differ")
    metrics = {"training": record} | evaluation.evaluate_pair(
        options.out,
        documents,
        num_blocks=2 if options.smoke else NUM_LOSS_BLOCKS,
        num_prompts=4 if options.smoke else prompts.NUM_PROMPTS,
        seed=options.seed,
    )
    shapes.write_json(path, metrics)
    (options.out / "MODEL_CARD.md").write_text(card.render(metrics, options.out), encoding="utf-8")


def replace_directory(source: Path, destination: Path) -> None:
    """Put the directory `source` in the place of `destination` by renames."""
    retired = source.with_name(f"retired-{source.name}")
    if destination.exists():
        destination.rename(retired)
    source.rename(destination)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    documents = corpus.load_documents()
    log.info("%d files, digest %s", len(documents), corpus.digest(documents))
    if not options.evaluate:
        for name in options.models:
            train_model(name, documents, options)
        write_prompts(documents, options)
    evaluate(documents, options)


if __name__ == "__main__":
    main()
