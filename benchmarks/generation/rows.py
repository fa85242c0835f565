"""What was measured of an entry, and the row that it becomes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from generation.plan import Entry, Options
from generation.protocol import Answer


@dataclass(frozen=True)
class Turn:
    """One answer, and what was true of the machine just before it."""

    answer: Answer
    bandwidth: float  # GB/s


@dataclass
class Record:
    """An entry's turns, one a repetition, and what its row says besides.

    target_bytes, draft_bytes: weights that a forward reads
    reason: why there are no turns
    """

    entry: Entry
    settings: str = ""
    instruction_set: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    target_bytes: float = 0.0
    draft_bytes: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    reason: str | None = None

    @property
    def has_started(self) -> bool:
        """Whether there was a contestant to ask."""
        return bool(self.versions)


@dataclass(frozen=True)
class Row:
    """One line of the table and of the results file; what was not measured is None.

    instruction_set:  what the contestant computes with, by its own account
    prompt_ms:        until the first token, the median of the prompts
    tokens_per_second: decoding only, the first token not counted
    ratio_to_plain:   to our plain decoding, of the same repetition (for a prefill: of its time)
    equal_tokens:     share of the tokens that our plain decoding has at the same place
    weights_mb:       of the target, read for every forward
    bandwidth_share:  weight bytes read a second, by the count of forwards, of what `read_all` reads
    """

    pair: str
    dtype: str
    contestant: str
    kind: str
    mode: str
    settings: str
    instruction_set: str
    num_speculative_tokens: int | None
    batch_size: int
    num_prompts: int
    prompt_tokens: int
    max_new_tokens: int
    repetitions: int
    num_threads: int
    weights_mb: float
    versions: dict[str, str]
    prompt_ms: float | None = None
    tokens_per_second: float | None = None
    ratio_to_plain: float | None = None
    acceptance_rate: float | None = None
    mean_acceptance_length: float | None = None
    equal_tokens: float | None = None
    read_bandwidth: float | None = None
    bandwidth_share: float | None = None
    is_best: bool = False
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, those that were not measured left out."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None and value != ""
        }


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of our tokens that are the same at the same place."""
    same = sum(
        a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=False)
    )
    return same / sum(map(len, ours))


def bytes_per_token(record: Record, answer: Answer) -> float | None:
    """Weight bytes read for a decoded token; None for a speculative answer whose forwards nobody counted."""
    entry = record.entry
    if entry.kind == "batch":
        return record.target_bytes / len(entry.task.prompts)
    if entry.is_plain:
        return record.target_bytes
    if answer.counts is None or not answer.num_decoded:
        return None
    read = answer.counts.num_rounds * record.target_bytes + answer.counts.num_drafted * record.draft_bytes
    return read / answer.num_decoded


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(record: Record, baseline: Record | None, speed: Callable[[Answer], float | None]) -> float | None:
    """The median over repetitions of this entry's speed over the baseline's."""
    if baseline is None:
        return None
    turns = zip(record.turns, baseline.turns, strict=False)
    pairs = [(speed(turn.answer), speed(other.answer)) for turn, other in turns]
    return median([mine / other for mine, other in pairs if mine is not None and other is not None])


def build_row(
    record: Record, pair: str, dtype: str, options: Options, plain: Record | None, prefill: Record | None
) -> Row:
    """The record's medians. `plain` and `prefill`, of the same prompt, are ours."""
    entry, task = record.entry, record.entry.task
    known = {
        "pair": pair,
        "dtype": dtype,
        "contestant": entry.contestant,
        "kind": entry.kind,
        "mode": entry.mode if record.has_started else "all",
        "settings": record.settings,
        "instruction_set": record.instruction_set,
        "num_speculative_tokens": task.num_speculative_tokens,
        "batch_size": len(task.prompts) if task.is_batch else 1,
        "num_prompts": len(task.prompts),
        "prompt_tokens": max(map(len, task.prompts)),
        "max_new_tokens": task.max_new_tokens,
        "repetitions": len(record.turns),
        "num_threads": options.num_threads,
        "weights_mb": record.target_bytes / 1e6,
        "versions": record.versions,
        "reason": record.reason,
    }
    if not record.turns or record.reason is not None:
        return Row(**known)
    measured = prefill_values(record, prefill) if entry.kind == "prefill" else decode_values(record, plain)
    answers = [turn.answer for turn in record.turns]
    return Row(
        **known,
        **measured,
        prompt_ms=median([statistics.median(answer.prompt_seconds) * 1e3 for answer in answers]),
        read_bandwidth=median([turn.bandwidth for turn in record.turns]),
    )


def prefill_values(record: Record, prefill: Record | None) -> dict[str, Any]:
    return {"ratio_to_plain": ratio(record, prefill, lambda answer: 1 / answer.prompt_seconds[0])}


def decode_values(record: Record, plain: Record | None) -> dict[str, Any]:
    is_batch = record.entry.kind == "batch"
    last = record.turns[-1].answer
    counts = last.counts if not record.entry.is_plain else None
    return {
        "tokens_per_second": median([turn.answer.tokens_per_second for turn in record.turns]),
        "ratio_to_plain": ratio(record, plain, lambda answer: answer.tokens_per_second),
        "acceptance_rate": counts.num_accepted / counts.num_drafted
        if counts and counts.num_drafted
        else None,
        "mean_acceptance_length": 1 + counts.num_accepted / counts.num_rounds
        if counts and counts.num_rounds
        else None,
        "equal_tokens": equal_share(plain.turns[0].answer.token_ids, last.token_ids)
        if plain is not None and plain.turns and not is_batch
        else None,
        "bandwidth_share": median([bandwidth_share(record, turn) for turn in record.turns]),
    }


def bandwidth_share(record: Record, turn: Turn) -> float | None:
    read, speed = bytes_per_token(record, turn.answer), turn.answer.tokens_per_second
    return None if read is None or speed is None else read * speed / (turn.bandwidth * 1e9)
