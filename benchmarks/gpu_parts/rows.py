"""Rows of the end-to-end table and what they are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from generation.plan import Pair
from generation.protocol import Answer
from generation.rows import Record, equal_share, ratio
from measure import quantiles

from gpu_parts.entrants import System
from gpu_parts.models import Cost, Floor, Workload

# The targets of docs/gpu.md, of an H200: one sequence in fp16, context 512.
TARGET_US = {"gpt2-medium": 375.0, "gpt2-xl": 1150.0}
TARGET_OF_COMPILED = {"gpt2-medium": 1.5}
# To plain, at acceptance .7.
TARGET_OF_PLAIN = {
    ("distilgpt2", "gpt2-medium"): 1.4,
    ("distilgpt2", "gpt2-xl"): 1.6,
    ("gpt2", "gpt2-xl"): 1.7,
}
TARGET_ACCEPTANCE = 0.7


@dataclass(frozen=True)
class Row:
    """One line of the end-to-end table; what was not measured, or is no one's target, is None.

    kind:              "generate", or "forced": acceptance was forced, and what was generated is not the model's output
    pair:              draft→target; in a rehearsal only a name, the bundled pair stands in
    num_speculative_tokens: k; 0 is plain decoding, None what the system chooses
    tokens_per_second: all sequences together; from the first token (in a batch: the last sequence's first) to the
                       last, so that what a draft reads of the prompt is in it
    us_per_token:      of one sequence: seconds over tokens of a sequence
    us_per_round:      of a draft and verify round; plain decoding: of a token
    ratio_to_plain, ratio_to_compiled: of the tokens a second, in the same repetition
    equal_tokens, first_difference: share of tokens that our plain decoding has at the same place; the first place,
                       over all prompts, where one differs
    weights_mb, draft_weights_mb: read for every forward
    bandwidth:         GB/s, measured in the same part: a copy's on a GPU
    floor_us:          weights that a round reads, over the bandwidth
    kv_us:             keys and values that it reads in the middle of decoding, over the bandwidth
    num_phases:        kernels of a round that wait for each other
    overhead_us_per_phase: (us_per_round - floor_us) / num_phases
    here_us:           floor_us and 1.6 µs a phase: the target with this machine's bandwidth
    target_us, target_ratio, target_ratio_to_compiled: those of docs/gpu.md, for an H200; the ratio to plain at .7
    forced_acceptance, is_models_output: whether these are the model's tokens
    """

    kind: str
    pair: str
    batch_size: int
    system: str
    mode: str
    num_speculative_tokens: int | None
    dtype: str
    settings: str
    num_prompts: int
    prompt_tokens: int
    max_new_tokens: int
    repetitions: int
    versions: dict[str, str]
    is_models_output: bool
    forced_acceptance: float | None = None
    tokens_per_second: float | None = None
    us_per_token: dict[str, float] | None = None
    us_per_round: dict[str, float] | None = None
    prompt_ms: float | None = None
    ratio_to_plain: float | None = None
    ratio_to_compiled: float | None = None
    acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None
    equal_tokens: float | None = None
    first_difference: int | None = None
    weights_mb: float | None = None
    draft_weights_mb: float | None = None
    bandwidth: float | None = None
    floor_us: float | None = None
    kv_us: float | None = None
    num_phases: int | None = None
    overhead_us_per_phase: float | None = None
    here_us: float | None = None
    target_us: float | None = None
    target_ratio: float | None = None
    target_ratio_to_compiled: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, those that were not measured left out, but for k: there None says something."""
        values = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None and value != ""
        }
        return {**values, "num_speculative_tokens": self.num_speculative_tokens}


@dataclass(frozen=True)
class Block:
    """What the rows of one batch size have in common.

    plain, compiled: the records that the others are compared with, where there are any
    """

    pair: Pair
    dtype: str
    workload: Workload
    batch_size: int
    target: Cost
    draft: Cost
    bandwidth: float
    plain: Record | None = None
    compiled: Record | None = None


def build_row(record: Record, system: System, block: Block) -> Row:
    """The record's medians, beside what they are compared with."""
    task = record.entry.task
    is_forced = system.forced is not None
    known: dict[str, Any] = {
        "kind": "forced" if is_forced else "generate",
        "pair": str(block.pair),
        "batch_size": block.batch_size,
        "system": system.name,
        "mode": record.entry.mode,
        "num_speculative_tokens": task.num_speculative_tokens,
        "dtype": block.dtype,
        "settings": record.settings,
        "num_prompts": len(task.prompts),
        "prompt_tokens": block.workload.prompt_length,
        "max_new_tokens": task.max_new_tokens,
        "repetitions": len(record.turns),
        "versions": record.versions,
        "is_models_output": not is_forced,
        "forced_acceptance": system.forced,
        "weights_mb": block.target.weight_bytes / 1e6,
        "bandwidth": block.bandwidth,
        "reason": record.reason,
    }
    if not record.turns or record.reason is not None:
        return Row(**known)
    values = measured(record, block)
    us_per_round = values["us_per_round"] and values["us_per_round"]["median"]
    return Row(
        **known,
        **values,
        **floors(record, system, block, us_per_round),
        **said(record, system, block),
        **targets(record, system, block),
    )


def measured(record: Record, block: Block) -> dict[str, Any]:
    """Times and counts."""
    answers = [turn.answer for turn in record.turns]
    speeds = [answer.tokens_per_second for answer in answers if answer.tokens_per_second]
    rounds = [seconds_per_round(answer, record, block.batch_size) for answer in answers]
    values: dict[str, Any] = {
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "us_per_token": in_us([block.batch_size / speed for speed in speeds]),
        "us_per_round": in_us([seconds for seconds in rounds if seconds is not None]),
        "prompt_ms": statistics.median(statistics.median(answer.prompt_seconds) for answer in answers) * 1e3,
        "ratio_to_plain": ratio(record, block.plain, lambda answer: answer.tokens_per_second),
        "ratio_to_compiled": ratio(record, block.compiled, lambda answer: answer.tokens_per_second),
    }
    counts = answers[-1].counts if not record.entry.is_plain else None
    if counts is not None and counts.num_rounds:
        values["mean_acceptance_length"] = 1 + counts.num_accepted / counts.num_rounds
    if counts is not None and counts.num_drafted:
        values["acceptance_rate"] = counts.num_accepted / counts.num_drafted
    return values


def floors(record: Record, system: System, block: Block, us_per_round: float | None) -> dict[str, Any]:
    """What a round cannot do without; phases are those of our kernels."""
    floor = floor_of(record, block)
    if floor is None:
        return {}
    values = {
        "floor_us": floor.weights_us,
        "kv_us": floor.kv_us,
        "draft_weights_mb": None if record.entry.is_plain else block.draft.weight_bytes / 1e6,
    }
    if not system.is_ours:
        return values
    return {
        **values,
        "num_phases": floor.num_phases,
        "here_us": floor.target_us,
        "overhead_us_per_phase": None if us_per_round is None else floor.overhead_us(us_per_round),
    }


def in_us(seconds: list[float]) -> dict[str, float] | None:
    return asdict(quantiles(seconds)) if seconds else None


def seconds_per_round(answer: Answer, record: Record, batch_size: int) -> float | None:
    """Plain: of a token of every sequence. Speculative: by the rounds that the counted tokens took."""
    if not answer.num_decoded:
        return None
    if record.entry.is_plain:
        return answer.decode_seconds * batch_size / answer.num_decoded
    counts = answer.counts
    if counts is None or not counts.num_rounds:
        return None
    num_tokens = sum(len(tokens) - 1 for tokens in answer.token_ids)
    num_rounds = counts.num_rounds * answer.num_decoded / num_tokens / batch_size
    return answer.decode_seconds / num_rounds


def floor_of(record: Record, block: Block) -> Floor | None:
    """Of a round of one target forward and k of the draft; None where the system chooses how much it drafts."""
    k = record.entry.task.num_speculative_tokens
    if k is None:
        return None
    num_tokens = block.workload.middle_context * block.batch_size
    forwards = [block.target, *[block.draft] * k]
    return Floor.of(forwards, num_tokens=num_tokens, bandwidth=block.bandwidth)


def said(record: Record, system: System, block: Block) -> dict[str, Any]:
    """How much of it our plain decoding says too. Of forced tokens nothing is to be said."""
    if block.plain is None or not block.plain.turns or system.forced is not None:
        return {}
    ours, theirs = block.plain.turns[0].answer.token_ids, record.turns[-1].answer.token_ids
    return {"equal_tokens": equal_share(ours, theirs), "first_difference": first_difference(ours, theirs)}


def first_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int | None:
    """The first place, over all prompts, where the tokens are not the same."""
    places = [
        next((at for at, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return min((place for place in places if place is not None), default=None)


def targets(record: Record, system: System, block: Block) -> dict[str, Any]:
    """Only of ours; the times and the ratio to the compiled baseline only where one sequence decodes in fp16."""
    if not (system.is_ours and system.has_graphs):
        return {}
    target = block.pair.target
    if not record.entry.is_plain:
        is_comparable = block.batch_size == 1 and system.forced in (None, TARGET_ACCEPTANCE)
        return {"target_ratio": TARGET_OF_PLAIN.get((block.pair.draft, target))} if is_comparable else {}
    if block.batch_size != 1 or block.dtype != "float16":
        return {}
    return {
        "target_us": TARGET_US.get(target),
        "target_ratio_to_compiled": TARGET_OF_COMPILED.get(target),
    }
