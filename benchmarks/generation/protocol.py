"""What the benchmark and its worker processes tell each other, one JSON object a line.

A worker is started with a `Setup`, says `{"ready": {...}}` or `{"error": reason}` once, and then answers every `Task`
with `{"answer": Answer}` or `{"error": reason}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

# Where the contestants are; also the order in which they take turns.
MODULES = {
    "ours": "generation.peers.ours",
    "transformers": "generation.peers.huggingface",
    "openvino": "generation.peers.openvino",
    "llama.cpp": "generation.peers.llama",
}


class UnavailableError(Exception):
    """A contestant cannot do this; the message is the reason that its row gives."""


@dataclass(frozen=True)
class Setup:
    """What a contestant loads.

    target, draft: Hugging Face directories; the target may be a GGUF file, the draft a drafter's name
    dtype:         of the target's matrices: "float32", "bfloat16", "int8", "int4"; "auto" is as in the file
    draft_dtype:   the same for the draft's
    speculates:    whether any task will speculate
    cache:         where `prepare` may leave files
    max_seq_len:   prompt and new tokens of the longest task, with room for a draft
    module:        where the contestant is, unless it is one of MODULES
    path, build:   where its package is imported from before all others, and the name of that build
    device:        "cpu" or "cuda"
    max_batch_size, engine: of ours: prompts of the largest batch, and more options of `specengine.Engine`
    """

    contestant: str
    target: str
    draft: str
    dtype: str
    draft_dtype: str
    speculates: bool
    num_threads: int
    max_seq_len: int
    cache: str
    module: str = ""
    path: str = ""
    build: str = ""
    device: str = "cpu"
    max_batch_size: int = 8
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Continue every prompt by `max_new_tokens` tokens, greedily, whatever tokens come.

    num_speculative_tokens: 0 = plain, None = what the contestant does by itself
    is_batch:               all prompts at once, not one after the other
    """

    prompts: list[list[int]]
    max_new_tokens: int
    num_speculative_tokens: int | None = 0
    is_batch: bool = False


@dataclass(frozen=True)
class Counts:
    """Of a speculative answer, over all prompts: target forwards after the first token, tokens drafted and accepted."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.num_rounds + other.num_rounds,
            self.num_drafted + other.num_drafted,
            self.num_accepted + other.num_accepted,
        )


@dataclass(frozen=True)
class Answer:
    """What a contestant generated and how long that took.

    token_ids:      of each prompt
    prompt_seconds: of each prompt, until its first token was there
    decode_seconds: from then to the last token, added up over the prompts
    num_decoded:    tokens that came in `decode_seconds`
    """

    token_ids: list[list[int]]
    prompt_seconds: list[float]
    decode_seconds: float
    num_decoded: int
    counts: Counts | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """While decoding: the prompt and what came with its first token are not in it. None if that was all."""
        return self.num_decoded / self.decode_seconds if self.num_decoded else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Answer:
        counts = values["counts"]
        return cls(**{**values, "counts": Counts(**counts) if counts else None})


class Contestant(Protocol):
    """A loaded engine.

    settings:        how it was set up, in a few words
    instruction_set: what it computes with, by its own account
    """

    settings: str
    instruction_set: str

    def generate(self, task: Task) -> Answer: ...


class Arrivals:
    """The times at which the tokens of one prompt came, from when this was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.counts: list[int] = []

    def add(self, num_tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(num_tokens)

    @property
    def prompt_seconds(self) -> float:
        return self.times[0] - self.start

    def after(self, moment: float) -> tuple[float, int]:
        """(seconds, tokens) from `moment` to the last arrival."""
        count = sum(n for at, n in zip(self.times, self.counts, strict=True) if at > moment)
        return max(0.0, self.times[-1] - moment), count


def answer_one_by_one(
    task: Task, generate_one: Callable[[list[int]], tuple[list[int], Arrivals, Counts | None]]
) -> Answer:
    """The answer of a contestant that takes one prompt after the other."""
    if task.is_batch:
        raise UnavailableError("batches are not measured for peers")
    token_ids, prompt_seconds, decoded, counts = [], [], [], []
    for prompt in task.prompts:
        tokens, arrivals, count = generate_one(prompt)
        token_ids.append(tokens)
        prompt_seconds.append(arrivals.prompt_seconds)
        decoded.append(arrivals.after(arrivals.times[0]))
        counts.append(count)
    known = [count for count in counts if count is not None]
    return Answer(
        token_ids=token_ids,
        prompt_seconds=prompt_seconds,
        decode_seconds=sum(seconds for seconds, _ in decoded),
        num_decoded=sum(number for _, number in decoded),
        counts=sum(known, Counts()) if known else None,
    )


def answer_at_once(token_ids: list[list[int]], arrivals: Arrivals, counts: Counts | None = None) -> Answer:
    """The answer of a contestant whose prompts move on together; what arrives is counted over all of them."""
    seconds, number = arrivals.after(arrivals.times[0])
    return Answer(token_ids, [arrivals.prompt_seconds] * len(token_ids), seconds, number, counts)
