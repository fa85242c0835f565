"""Figures of a finished pair, measured on the exported weights in fp32: loss, acceptance, sample completions."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from . import corpus, shapes, vocabulary
from .prompts import load_prompts

log = logging.getLogger(__name__)

NUM_SPECULATIVE_TOKENS = 4
NUM_NEW_TOKENS = 64
NUM_OPENING_TOKENS = 16  # before greedy text has begun to repeat itself
BATCH_SIZE = 40
TEMPERATURES = (0.8, 1.0)
SAMPLE_PROMPTS = (  # none ends in white space: in this vocabulary a line break and its indentation are one token
    "def binary_search(items, x):",
    "    def test_close(self):\n        f = open(",
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self, items=()):',
)


def evaluate_pair(
    directory: Path, documents: list[corpus.Document], *, num_blocks: int, num_prompts: int, seed: int
) -> dict[str, Any]:
    """Everything below, as it goes into `metrics.json`, on `num_blocks` of 1024 tokens and the first prompts."""
    tokenizer = Tokenizer.from_file(str(directory / "target" / "tokenizer.json"))
    models = {name: shapes.load_exported(directory / name) for name in shapes.SHAPES}
    prompts = [tokenizer.encode(entry["prompt"]).ids for entry in load_prompts(directory / "prompts.jsonl")][
        :num_prompts
    ]
    parameters = {name: shapes.count_parameters(model) for name, model in models.items()}
    loss = evaluate_losses(models, tokenizer, documents, num_blocks, seed)
    log.info("loss %s", loss)
    acceptance = evaluate_acceptance(models["target"], models["draft"], prompts, seed)
    log.info("acceptance %s", acceptance)
    samples = complete(models["target"], tokenizer, seed)
    return {"parameters": parameters, "loss": loss, "acceptance": acceptance, "samples": samples}


def evaluate_losses(
    models: dict[str, GPT2LMHeadModel],
    tokenizer: Tokenizer,
    documents: list[corpus.Document],
    num_blocks: int,
    seed: int,
) -> dict[str, Any]:
    """Nats per token, perplexity and bits per byte of each model on files it was trained on and files it was not."""
    figures: dict[str, Any] = {name: {} for name in models}
    for part, is_held_out in (("train", False), ("held_out", True)):
        chosen = [document for document in documents if document.is_held_out == is_held_out]
        arrays = vocabulary.encode_documents(tokenizer, chosen)
        num_bytes = sum(len(document.text.encode()) for document in chosen)
        num_tokens = sum(map(len, arrays))
        blocks = sample_blocks(arrays, num_blocks, seed)
        for name, model in models.items():
            nats = mean_loss(model, blocks)
            figures[name][part] = {
                "nats_per_token": round(nats, 4),
                "perplexity": round(math.exp(nats), 2),
                "bits_per_byte": round(nats / math.log(2) * num_tokens / num_bytes, 4),
            }
        figures[f"{part}_data"] = {"files": len(chosen), "bytes": num_bytes, "tokens": num_tokens}
    return figures


def sample_blocks(arrays: list[np.ndarray], num_blocks: int, seed: int) -> torch.Tensor:
    """`[num_blocks, 1025]` int64: a fixed draw of consecutive blocks of the documents, joined in a shuffled order."""
    generator = np.random.default_rng(seed)
    stream = np.concatenate([arrays[i] for i in generator.permutation(len(arrays))])
    starts = np.arange(0, len(stream) - shapes.CONTEXT - 1, shapes.CONTEXT)
    chosen = generator.permutation(starts)[:num_blocks]
    return torch.from_numpy(np.stack([stream[s : s + shapes.CONTEXT + 1] for s in chosen]).astype(np.int64))


@torch.inference_mode()
def mean_loss(model: GPT2LMHeadModel, blocks: torch.Tensor) -> float:
    """Mean next-token loss in nats over `[N, T + 1]` tokens."""
    total = 0.0
    for rows in blocks.split(4):
        logits = model(rows[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / blocks[:, 1:].numel()


@torch.inference_mode()
def continue_rows(
    model: GPT2LMHeadModel, prompts: list[list[int]], count: int, *, temperature: float, seed: int
) -> torch.Tensor:
    """`[B, longest + count]` ids, left-padded with 0: the model's own continuation, not stopped at end-of-text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = padding_mask(prompts, width)
    generator = torch.Generator().manual_seed(seed)
    cache, inputs = None, ids
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        step = model(
            inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, last = step.past_key_values, step.logits[:, -1]
        if temperature == 0.0:
            inputs = last.argmax(-1, keepdim=True)
        else:
            inputs = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
        ids, mask = torch.cat([ids, inputs], 1), torch.cat([mask, torch.ones_like(inputs)], 1)
    return ids


def padding_mask(prompts: list[list[int]], width: int) -> torch.Tensor:
    """`[B, width]` int64, 1 where a left-padded row holds a real token."""
    return torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@torch.inference_mode()
def continuation_logits(
    model: GPT2LMHeadModel, ids: torch.Tensor, prompts: list[list[int]], count: int
) -> torch.Tensor:
    """`[B, count, V]`: the logits that predict the last `count` tokens of left-padded `ids`."""
    mask = torch.cat(
        [padding_mask(prompts, ids.shape[1] - count), torch.ones(len(prompts), count, dtype=torch.long)], 1
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=count + 1
    ).logits
    return logits[:, :-1]


def evaluate_acceptance(
    target: GPT2LMHeadModel, draft: GPT2LMHeadModel, prompts: list[list[int]], seed: int
) -> dict[str, Any]:
    """Greedy acceptance by position at k = 4, and the expected acceptance of sampled tokens, over all prompts.

    The draft is teacher-forced on the target's own continuation: as long as its proposals are accepted they equal
    that continuation, so its next proposal is its most likely token there.
    """
    batches = [prompts[i : i + BATCH_SIZE] for i in range(0, len(prompts), BATCH_SIZE)]
    count = NUM_NEW_TOKENS + NUM_SPECULATIVE_TOKENS
    matches, overlaps = [], {temperature: [] for temperature in TEMPERATURES}
    for index, batch in enumerate(batches):
        ids = continue_rows(target, batch, count, temperature=0.0, seed=0)
        proposals = continuation_logits(draft, ids, batch, count).argmax(-1)
        matches.append(proposals == ids[:, -count:])
        for temperature in TEMPERATURES:
            ids = continue_rows(target, batch, NUM_NEW_TOKENS, temperature=temperature, seed=seed + index)
            probs = [
                (continuation_logits(model, ids, batch, NUM_NEW_TOKENS) / temperature).softmax(-1)
                for model in (target, draft)
            ]
            overlaps[temperature].append(torch.minimum(*probs).sum(-1))
    greedy = {
        "greedy": speculate(torch.cat(matches), NUM_NEW_TOKENS),
        "greedy_opening": speculate(torch.cat(matches), NUM_OPENING_TOKENS),
    }
    sampled = {f"T={t}": round(torch.cat(rows).mean().item(), 4) for t, rows in overlaps.items()}
    return greedy | {"sampled_one_minus_total_variation": sampled}


def speculate(matches: torch.Tensor, count: int) -> dict[str, Any]:
    """Replay greedy rounds over the first `count` of `[B, >= count + k]`: is the draft's token the target's there?"""
    drafted, accepted = [0] * NUM_SPECULATIVE_TOKENS, [0] * NUM_SPECULATIVE_TOKENS
    num_rounds = 0
    for row in matches.tolist():
        place = 0
        while place < count:
            num_rounds += 1
            num_accepted = next(
                (i for i in range(NUM_SPECULATIVE_TOKENS) if not row[place + i]), NUM_SPECULATIVE_TOKENS
            )
            for i in range(NUM_SPECULATIVE_TOKENS):
                drafted[i] += i <= num_accepted
                accepted[i] += i < num_accepted
            place += num_accepted + 1
    total = sum(accepted)
    return {
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "num_prompts": len(matches),
        "num_new_tokens": count,
        "num_rounds": num_rounds,
        "acceptance_rate": round(total / (NUM_SPECULATIVE_TOKENS * num_rounds), 4),
        "mean_acceptance_length": round(1 + total / num_rounds, 4),
        "accepted_by_position": [round(a / num_rounds, 4) for a in accepted],
        "conditional_by_position": [round(a / max(1, d), 4) for a, d in zip(accepted, drafted, strict=True)],
        "token_agreement": round(matches[:, :count].float().mean().item(), 4),
    }


def complete(model: GPT2LMHeadModel, tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """Three completions of 80 tokens: one greedy, two at temperature 0.7."""
    samples = []
    for index, prompt in enumerate(SAMPLE_PROMPTS):
        ids, temperature = tokenizer.encode(prompt).ids, 0.7 if index else 0.0
        row = continue_rows(model, [ids], 80, temperature=temperature, seed=seed)[0, len(ids) :].tolist()
        if vocabulary.END_OF_TEXT_ID in row:
            row = row[: row.index(vocabulary.END_OF_TEXT_ID)]
        samples.append(
            {"prompt": prompt, "completion": tokenizer.decode(row), "temperature": str(temperature)}
        )
    return samples
