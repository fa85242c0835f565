"""Counts what speculation does. A stop inside an accepted run hides what came after it, here too."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from specengine.outputs import SpeculativeDecodingMetrics


def record_rounds(
    metrics: SpeculativeDecodingMetrics, *, num_draft: int, num_accepted: int, num_kept: int, count: int = 1
) -> None:
    """Adds `count` rounds that each judged `num_draft` tokens, accepted a prefix, and of whose tokens `num_kept` were
    kept.

    Without a stop num_kept = num_accepted + 1. With one, drafts beyond it were never needed and do not count,
    and if it falls inside the accepted run the target's own token is trimmed:
    emitted = 1 + accepted + rounds - trimmed.
    """
    is_trimmed = num_kept <= num_accepted
    drafted, accepted = needed_drafts(num_draft, num_accepted, num_kept)
    metrics.num_rounds += count
    metrics.num_trimmed_tokens += count * is_trimmed
    _increase(metrics.num_rounds_by_num_draft, drafted, range(drafted, drafted + 1), count)
    if drafted == 0:
        return
    metrics.num_spec_steps += count
    metrics.num_draft_tokens += count * drafted
    metrics.num_accepted_draft_tokens += count * accepted
    _increase(metrics.acceptance_histogram, accepted, range(accepted, accepted + 1), count)
    _increase(metrics.num_drafted_by_position, drafted - 1, range(drafted), count)
    _increase(metrics.num_accepted_by_position, drafted - 1, range(accepted), count)
    _increase(metrics.rejection_positions, drafted - 1, range(accepted, min(accepted + 1, drafted)), count)


def needed_drafts(num_draft: int, num_accepted: int, num_kept: int) -> tuple[int, int]:
    """Drafts of a round, and those accepted, up to a stop in it: what `record_rounds` counts."""
    return (num_kept, num_kept) if num_kept <= num_accepted else (num_draft, num_accepted)


def merge(parts: Iterable[SpeculativeDecodingMetrics]) -> SpeculativeDecodingMetrics:
    """The sum over several sequences."""
    total = SpeculativeDecodingMetrics()
    for part in parts:
        total.lossless = total.lossless and part.lossless
        total.num_spec_tokens = max(total.num_spec_tokens, part.num_spec_tokens)
        for name in (
            "num_spec_steps",
            "num_rounds",
            "num_draft_tokens",
            "num_accepted_draft_tokens",
            "num_trimmed_tokens",
            "round_seconds",
            "estimated_plain_seconds",
        ):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        for name in (
            "acceptance_histogram",
            "num_drafted_by_position",
            "num_accepted_by_position",
            "rejection_positions",
            "num_rounds_by_num_draft",
        ):
            pairs = zip_longest(getattr(total, name), getattr(part, name), fillvalue=0)
            setattr(total, name, [left + right for left, right in pairs])
    return total


def _increase(counts: list[int], last: int, indices: range, by: int) -> None:
    counts.extend([0] * (last + 1 - len(counts)))
    for index in indices:
        counts[index] += by
