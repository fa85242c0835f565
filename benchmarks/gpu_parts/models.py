"""The models of a part, its prompts, and what a forward must at least cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from generation.plan import BUNDLED, Pair, weight_bytes
from pairs import build_pair
from tokenizers import Tokenizer

from gpu_parts.context import Context

# Kernels that wait for each other, as tests/test_round_launches.py counts them: of a layer, of a forward beside its
# layers, and of a round beside its forwards.
PHASES_PER_LAYER, PHASES_PER_FORWARD, PHASES_PER_ROUND = 5, 2, 1
US_PER_PHASE = 1.6


@dataclass(frozen=True)
class Workload:
    """What is generated. Real ones have a context of 512 tokens in the middle of decoding, as the targets have.

    num_prompts: that follow each other where one sequence decodes alone
    repetitions: turns of each system; of one whose turn takes long, slow_repetitions
    k:           our draft lengths, alone; batches have `batch_k`
    forced:      rates of forced acceptance
    pause:       seconds before a turn: who had the last one goes to sleep
    """

    prompt_length: int = 448
    max_new_tokens: int = 128
    num_prompts: int = 4
    repetitions: int = 7
    slow_repetitions: int = 2
    k: tuple[int, ...] = (2, 3, 4, 6, 8)
    batch_k: tuple[int, ...] = (2, 4)
    assisted_k: int = 4
    forced: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9, 1.0)
    pause: float = 0.1

    @property
    def max_seq_len(self) -> int:
        """With room for drafts beyond the end."""
        return self.prompt_length + self.max_new_tokens + 64

    @property
    def middle_context(self) -> float:
        return self.prompt_length + self.max_new_tokens / 2


REAL = Workload()
TINY = Workload(
    prompt_length=24,
    max_new_tokens=6,
    num_prompts=1,
    repetitions=1,
    k=(2,),
    batch_k=(2,),
    assisted_k=2,
    forced=(0.0, 1.0),
    pause=0.0,
)


def workload(context: Context) -> Workload:
    return TINY if context.settings.is_rehearsal else REAL


def build_models(context: Context) -> tuple[Pair, Path, Path]:
    """(pair, target, draft): the bundled pair at the sizes of the part's pair; as it is in a rehearsal."""
    if context.settings.is_rehearsal:
        return Pair("bundled draft", "bundled target"), BUNDLED / "target", BUNDLED / "draft"
    draft, _, target = context.arguments["pair"].partition(":")
    pair = Pair(draft, target)
    context.say(f"writing {pair}, where it is not there yet")
    dtype = getattr(torch, context.settings.dtype)
    return pair, *build_pair(pair.target, pair.draft, context.settings.cache, dtype)


def read_prompts(count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens: held-out Python files one after the other, cut; no text is in two."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "target" / "tokenizer.json"))
    with (BUNDLED / "prompts.jsonl").open(encoding="utf-8") as file:
        ids = [token for line in file for token in tokenizer.encode(json.loads(line)["prompt"]).ids]
    assert count * length <= len(ids), f"{count} prompts of {length} tokens, {len(ids)} tokens"
    return [ids[index * length :][:length] for index in range(count)]


@dataclass(frozen=True)
class Cost:
    """What a forward of a model cannot do without.

    weight_bytes: read whatever the number of rows
    kv_bytes:     of one token, read for every token of the context of every sequence
    num_phases:   kernels that wait for each other
    """

    weight_bytes: float
    kv_bytes: float
    num_phases: int

    @classmethod
    def read(cls, directory: Path, dtype: str) -> Cost:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        itemsize = getattr(torch, dtype).itemsize
        return cls(
            weight_bytes=weight_bytes(directory, dtype, "ours"),
            kv_bytes=2.0 * config["n_layer"] * config["n_embd"] * itemsize,
            num_phases=PHASES_PER_LAYER * config["n_layer"] + PHASES_PER_FORWARD,
        )


@dataclass(frozen=True)
class Floor:
    """Of a round, in µs, with the bandwidth of this machine. `target_us` is what that and 1.6 µs a phase come to."""

    weights_us: float
    kv_us: float
    num_phases: int

    @classmethod
    def of(cls, forwards: Iterable[Cost], *, num_tokens: float, bandwidth: float) -> Floor:
        """Of these forwards, one after the other.

        num_tokens: in the contexts of all sequences
        bandwidth:  GB/s
        """
        every = list(forwards)
        return cls(
            weights_us=sum(cost.weight_bytes for cost in every) / bandwidth / 1e3,
            kv_us=sum(cost.kv_bytes for cost in every) * num_tokens / bandwidth / 1e3,
            num_phases=sum(cost.num_phases for cost in every) + PHASES_PER_ROUND,
        )

    @property
    def target_us(self) -> float:
        return self.weights_us + self.num_phases * US_PER_PHASE

    def overhead_us(self, measured_us: float) -> float:
        """Of a phase: what was measured beyond the weights' bytes."""
        return (measured_us - self.weights_us) / self.num_phases
