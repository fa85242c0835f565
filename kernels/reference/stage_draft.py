"""Puts one drawn draft of each sequence where the next forward and the verification read it."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.types.statistics import STAT_ERROR


def stage_draft(
    step: int,
    tokens: Tensor,
    slots: Tensor,
    seq_len: Tensor,
    is_drafting: Tensor,
    drawn: Tensor,
    drawn_error: Tensor | None,
    draft_tokens: Tensor,
    num_draft: Tensor,
    log_probs: Tensor | None = None,
    logits: Tensor | None = None,
    stats: Tensor | None = None,
    draft_log_probs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
) -> None:
    """Row r of what was drawn is draft `step` of the r-th sequence that is drafting.

    A draft whose distribution was none (a NaN, say) ends its sequence's proposal before it: num_draft[b] = step.

    tokens:       `[S, n]` int32, written: tokens[slots[b], seq_len[b] + step]
    slots, seq_len, is_drafting: `[B]` int32
    drawn:        `[R]` int32; rows beyond the drafting sequences are not read, here and below
    drawn_error:  `[R]` int32, or None: the error flag of `stats`
    draft_tokens: `[B, k]` int32, column `step` written
    num_draft:    `[B]` int32, lowered to `step` where there was an error
    log_probs `[R]`, logits `[R, V]`, stats `[R, 4]`: what the tokens were drawn from, fp32, kept for rejection
                  sampling in column `step` of draft_log_probs `[B, k]`, draft_logits `[B, k, V]` and draft_stats
                  `[B, k, 4]`; None where nobody needs it
    """
    chosen = is_drafting.nonzero()[:, 0]
    count = chosen.numel()
    error = drawn_error if stats is None else stats[:, STAT_ERROR]
    assert error is not None, "drawn_error and stats are both None"
    tokens[slots[chosen].long(), seq_len[chosen].long() + step] = drawn[:count]
    draft_tokens[chosen, step] = drawn[:count]
    is_bad = error[:count] != 0
    num_draft[chosen[is_bad]] = num_draft[chosen[is_bad]].clamp_max(step)
    kept = ((log_probs, draft_log_probs), (logits, draft_logits), (stats, draft_stats))
    for source, target in kept:
        if source is not None and target is not None:
            target[chosen, step] = source[:count]
