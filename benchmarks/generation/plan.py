"""Which contestants do what, with which prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairs import BUNDLED
from tokenizers import Tokenizer

from generation.protocol import MODULES, Task

OURS = "ours"
PROMPT_LENGTH = 100
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 18 / 32}
Q8_0_BYTES = 34 / 32  # llama.cpp's 8 bits: an fp16 scale for 32 weights
DRAFT_ROOM = 64
MODES = ("plain", "batch", "speculative", "prefill")


@dataclass(frozen=True)
class Pair:
    """Two GPT-2 shapes, written `draft:target`."""

    draft: str
    target: str

    def __str__(self) -> str:
        return f"{self.draft}→{self.target}"


PAIRS = (Pair("distilgpt2", "gpt2-medium"), Pair("gpt2", "gpt2-medium"), Pair("gpt2", "gpt2-large"))


@dataclass(frozen=True)
class Options:
    """What is measured; dtypes are "float32", "bfloat16", "int8" and "int4".

    k:               draft lengths of ours
    peer_k:          draft lengths of the peers
    draft_dtype:     of everybody who can choose it; None is the target's
    batch_sizes:     prompts that ours decodes at once
    prefill_lengths: of the prompts after which only the first token is wanted
    """

    pairs: tuple[Pair, ...] = PAIRS
    dtypes: tuple[str, ...] = tuple(DTYPES.values())
    contestants: tuple[str, ...] = tuple(MODULES)
    modes: tuple[str, ...] = MODES
    k: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    peer_k: tuple[int, ...] = (2, 4, 6)
    draft_dtype: str | None = "int8"
    batch_sizes: tuple[int, ...] = (8, 16)
    prefill_lengths: tuple[int, ...] = (256, 1000)
    num_prompts: int = 8
    max_new_tokens: int = 48
    repetitions: int = 3
    num_threads: int = 1

    @property
    def max_seq_len(self) -> int:
        """Of the longest task, with room for drafts beyond its end."""
        return max(PROMPT_LENGTH + self.max_new_tokens + DRAFT_ROOM, max(self.prefill_lengths) + 1)


@dataclass(frozen=True)
class Entry:
    """A row to be: a contestant and its task.

    kind: "generate", "batch" (all prompts at once) or "prefill" (one token after a longer prompt)
    """

    contestant: str
    kind: str
    task: Task = field(repr=False)

    @property
    def is_plain(self) -> bool:
        return self.task.num_speculative_tokens == 0

    @property
    def is_baseline(self) -> bool:
        """Our plain decoding, which the others are compared with."""
        return self.contestant == OURS and self.kind == "generate" and self.is_plain

    @property
    def mode(self) -> str:
        if self.kind == "prefill":
            return f"prefill, {len(self.task.prompts[0])} tokens"
        batch = f", batch {len(self.task.prompts)}" if self.kind == "batch" else ""
        if self.is_plain:
            return f"plain{batch}"
        k = self.task.num_speculative_tokens
        return f"speculative{batch}, " + ("its choice" if k is None else f"k={k}")


@dataclass(frozen=True)
class Prompts:
    """Token ids, the same for everybody. Of `short` and the batches, each is part of those that are larger.

    batches: smaller ones first
    long:    shorter ones first
    """

    short: list[list[int]]
    batches: list[list[list[int]]]
    long: list[list[int]]


def draft_lengths(contestant: str, options: Options) -> tuple[int | None, ...]:
    """`transformers`, the slowest, also drafts as it does by itself, and else only the middle one of the lengths."""
    if contestant == OURS:
        return options.k
    if contestant == "transformers":
        return (None, options.peer_k[len(options.peer_k) // 2])
    return options.peer_k


def build_entries(options: Options, prompts: Prompts) -> list[Entry]:
    """Everything that is measured of one pair and dtype, in the order of turns.

    What is compared most takes turns side by side: the bandwidth of a shared machine moves within minutes.
    """
    length = options.max_new_tokens
    plain = [Entry(name, "generate", Task(prompts.short, length)) for name in options.contestants]
    speculative = [
        Entry(name, "generate", Task(prompts.short, length, k))
        for name in options.contestants
        for k in draft_lengths(name, options)
    ]
    batch = [Entry(OURS, "batch", Task(batch, length, is_batch=True)) for batch in prompts.batches]
    prefill = [
        Entry(name, "prefill", Task([prompt], 1)) for prompt in prompts.long for name in options.contestants
    ]
    by_mode = {
        "plain": plain,
        "batch": batch if OURS in options.contestants else [],
        "speculative": speculative,
        "prefill": prefill,
    }
    return [entry for mode in MODES if mode in options.modes for entry in by_mode[mode]]


def read_prompts(
    num_prompts: int, batch_sizes: Sequence[int] = (), prefill_lengths: Sequence[int] = ()
) -> Prompts:
    """From held-out Python files: the first PROMPT_LENGTH tokens of excerpts that have as many, taken evenly over
    the file; a long prompt is the beginning of all those, one after the other. Raises `ValueError` where there are
    too few."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "target" / "tokenizer.json"))
    with (BUNDLED / "prompts.jsonl").open(encoding="utf-8") as file:
        encoded = [tokenizer.encode(json.loads(line)["prompt"]).ids for line in file]
    pool = enough = [ids[:PROMPT_LENGTH] for ids in encoded if len(ids) >= PROMPT_LENGTH]
    for name, count in (("--prompts", num_prompts), *(("--batch-sizes", size) for size in batch_sizes)):
        if not 1 <= count <= len(enough):
            raise ValueError(f"{name} must be between 1 and {len(enough)}, got {count}")
    nested = {}
    for size in sorted({num_prompts, *batch_sizes}, reverse=True):
        nested[size] = pool = spread(pool, size)
    joined = [token for prompt in enough for token in prompt]
    return Prompts(
        short=nested[num_prompts],
        batches=[nested[size] for size in sorted(batch_sizes)],
        long=[joined[:length] for length in sorted(prefill_lengths)],
    )


def spread(items: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` of the items, evenly spaced, the first one included."""
    return [items[index * len(items) // count] for index in range(count)]


def streamed_weights(config: Mapping[str, Any]) -> int:
    """Weights that one forward over one token reads: the matrices of the layers and the head."""
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    return int(config["n_layer"] * (4 * width * width + 2 * width * inner) + config["vocab_size"] * width)


def weight_bytes(directory: Path, dtype: str, contestant: str) -> float:
    """Bytes of those weights as the contestant stores them."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    is_q8_0 = contestant == "llama.cpp" and dtype == "int8"
    return streamed_weights(config) * (Q8_0_BYTES if is_q8_0 else BYTES_PER_WEIGHT[dtype])
