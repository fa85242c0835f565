"""MODEL_CARD.md, written from `metrics.json` so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = """\
# The bundled pair

Two small GPT-2-architecture language models of Python source and their tokenizer: a **target** and a **draft** that
agrees with it often enough for speculative decoding to pay. They make `specengine` runnable, testable and measurable
offline. Trained from scratch by `tools/train_bundled_pair.py`; every figure below is written by that script from
`metrics.json`, measured on the exported bf16 weights computed in fp32.

| | target | draft |
|---|---|---|
| features × layers, heads of 64 | {target_shape} | {draft_shape} |
| parameters | {target_total:,} | {draft_total:,} |
| without embeddings | {target_body:,} | {draft_body:,} ({share:.3f} of the target's) |
| context | 1024 | 1024 |
| file size | {target_bytes:.1f} MB | {draft_bytes:.1f} MB |

Byte-level BPE of 4096 entries (`<|endoftext|>` is 0), shared by both; any text round-trips exactly. Tied heads,
`gelu_new`, bf16 safetensors, ordinary Hugging Face directories.

## Data and licence

The `.py` files of the standard library of CPython {python} ({train_files} files, {train_megabytes:.1f} MB,
{train_tokens:,} tokens to train on) and {held_files} files ({held_megabytes:.2f} MB) that are held out, by a hash of
their relative path. Generated tables, non-UTF-8 files and installed packages are left out; test suites are seen once
an epoch, everything else twice. SHA-256 of the data: `{digest}`.
The source is © Python Software Foundation, PSF-2.0 licence: see `NOTICE`. `prompts.jsonl` holds 200 excerpts of
held-out files under the same licence.

## Training

    python tools/train_bundled_pair.py --out specengine/bundled

{processor}, threads: {threads}, torch {torch}, seed {seed}; bf16 autocast; Muon for the layers' matrices,
AdamW for the rest; warm-up, constant rate, linear cool-down with blocks growing from 256 to 1024 tokens.

| | steps | tokens | time | loss |
|---|---|---|---|---|
| target | {target_steps} | {target_seen:,} | {target_minutes:.0f} min | next token |
| draft | {draft_steps} | {draft_seen:,} | {draft_minutes:.0f} min | {draft_loss} |

One pass over the weighted data would be about eleven million tokens: most blocks of the training files were never
seen, hence two close losses below. The times are of a machine shared with other work. Everything random is seeded; the
same command gives the same weights on the same machine with the same library versions and threads.
{note}

## Measured

| | nats/token, training files | held out | perplexity, training files | held out | bits/byte, held out |
|---|---|---|---|---|---|
{loss_rows}

Greedy acceptance of the draft, k = {k}, {num_prompts} held-out prompts × {new_tokens} tokens ({num_rounds} rounds):
**{rate:.3f}** of the drafted tokens are accepted, {length:.2f} tokens a round (1 + accepted).

| position | {position_header} |
|---|{position_rule}
| accepted | {accepted} |
| accepted, if the one before was | {conditional} |

The draft's most likely token is the target's at {agreement:.1%} of all positions of the target's greedy text. In its
first {opening_tokens} tokens alone, before that text begins to repeat itself, {opening_rate:.3f} of the drafted
tokens are accepted. Sampled, a drafted token is accepted with probability (1 − total variation) {sampled}.

## What they are, and are not

They write text that looks like Python: keywords, indentation, signatures, docstrings and `unittest` idioms of the
standard library, for a line or a few. They have seen few tokens and do not know what programs mean: names change, calls
are invented, and greedy text usually ends in a loop within some dozens of tokens. Loops are easy to draft: part of the
greedy acceptance comes from them; the sampled figures are free of that. The models are fixtures for an inference
engine, not assistants: do not run what they write or rely on it. Files of the standard library, comments and authors'
names included, are all they know.

## Sample completions
{samples}
"""


def render(metrics: dict[str, Any], directory: Path) -> str:
    """The model card of the pair in `directory`."""
    training, loss, parameters = metrics["training"], metrics["loss"], metrics["parameters"]
    greedy, opening = metrics["acceptance"]["greedy"], metrics["acceptance"]["greedy_opening"]
    distilled = training["draft"]["distillation_share"]
    positions = range(1, greedy["num_speculative_tokens"] + 1)
    values: dict[str, Any] = {
        "python": training["environment"]["python"],
        "torch": training["environment"]["torch"],
        "processor": training["environment"]["processor"],
        "threads": training["environment"]["threads"],
        "seed": training["environment"]["seed"],
        "digest": training["data_sha256"],
        "note": training.get("note", ""),
        "share": parameters["draft"]["non_embedding"] / parameters["target"]["non_embedding"],
        "draft_loss": f"{1 - distilled:.0%} next token, {distilled:.0%} KL from the target",
        "loss_rows": "\n".join(_loss_row(name, loss[name]) for name in ("target", "draft")),
        "k": greedy["num_speculative_tokens"],
        "num_prompts": greedy["num_prompts"],
        "num_rounds": greedy["num_rounds"],
        "new_tokens": greedy["num_new_tokens"],
        "opening_tokens": opening["num_new_tokens"],
        "opening_rate": opening["acceptance_rate"],
        "rate": greedy["acceptance_rate"],
        "length": greedy["mean_acceptance_length"],
        "agreement": greedy["token_agreement"],
        "position_header": " | ".join(map(str, positions)),
        "position_rule": "---|" * len(positions),
        "accepted": " | ".join(f"{value:.3f}" for value in greedy["accepted_by_position"]),
        "conditional": " | ".join(f"{value:.3f}" for value in greedy["conditional_by_position"]),
        "sampled": " and ".join(
            f"{value:.3f} at {name}"
            for name, value in metrics["acceptance"]["sampled_one_minus_total_variation"].items()
        ),
        "samples": "\n".join(_sample(sample) for sample in metrics["samples"]),
    }
    for part, short in (("train", "train"), ("held_out", "held")):
        data = loss[f"{part}_data"]
        values |= {f"{short}_files": data["files"], f"{short}_megabytes": data["bytes"] / 1e6}
        values[f"{short}_tokens"] = data["tokens"]
    for name in ("target", "draft"):
        values |= _model_values(name, metrics, directory)
    return TEMPLATE.format(**values)


def _model_values(name: str, metrics: dict[str, Any], directory: Path) -> dict[str, Any]:
    parameters, training = metrics["parameters"][name], metrics["training"][name]
    return {
        f"{name}_shape": f"{parameters['features']} × {parameters['layers']}",
        f"{name}_total": parameters["total"],
        f"{name}_body": parameters["non_embedding"],
        f"{name}_bytes": sum(path.stat().st_size for path in (directory / name).iterdir()) / 1e6,
        f"{name}_steps": training["num_steps"],
        f"{name}_seen": training["tokens"],
        f"{name}_minutes": training["seconds"] / 60,
    }


def _loss_row(name: str, loss: dict[str, dict[str, float]]) -> str:
    train, held_out = loss["train"], loss["held_out"]
    return (
        f"| {name} | {train['nats_per_token']:.3f} | {held_out['nats_per_token']:.3f} "
        f"| {train['perplexity']:.2f} | {held_out['perplexity']:.2f} | {held_out['bits_per_byte']:.3f} |"
    )


def _sample(sample: dict[str, str]) -> str:
    how = "greedy" if float(sample["temperature"]) == 0 else f"temperature {sample['temperature']}"
    text = sample["prompt"] + sample["completion"]
    return f"\nTarget, {how}; prompt and completion:\n\n~~~~python\n{text}\n~~~~"
