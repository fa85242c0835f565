"""What the kernels that judge drafts have in common: who is judged, what is written, and the launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.noise import NEGATIVE_INFINITY
from specengine.kernels.device.race import (
    ERROR,
    LOG_NORMALISER,
    NUM_STATS,
    RACE_WARPS,
    THRESHOLD,
    TILE,
    check_columns,
    check_drafts,
    check_logits,
    check_small,
    check_verdict,
    keep,
    scale_row,
)
from specengine.kernels.device.workspace import zeroed
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule

MATCH = tl.constexpr(int(Rule.MATCH))


@triton.jit
def load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, RULE: tl.constexpr, K: tl.constexpr):
    """k_b, held within 0 … K; -1 where RULE does not judge the sequence. Who drafts nothing is MATCH's."""
    num_draft = tl.minimum(tl.maximum(tl.load(num_draft_ptr + b), 0), K)
    rule = tl.where(num_draft > 0, tl.load(rule_ptr + b), MATCH)
    is_judged = (tl.load(is_running_ptr + b) != 0) & (rule == RULE)
    return tl.where(is_judged, num_draft, -1)


@triton.jit
def clamp_row(row, num_rows):
    """A row of the logits, as int64 for offsets."""
    return tl.minimum(tl.maximum(row, 0), num_rows - 1).to(tl.int64)


@triton.jit
def commit(
    tokens_ptr,
    num_accepted_ptr,
    error_ptr,
    b,
    column,
    emitted,
    num_accepted,
    stats_ptr,
    rows,
    K: tl.constexpr,
):
    """Writes the emitted tokens, their number and whether a row that was used is not a distribution.

    column, emitted, rows: `[BLOCK]` 0, 1, …; the token of each column; its row of the statistics
    """
    is_used = column <= num_accepted
    tl.store(tokens_ptr + b.to(tl.int64) * (K + 1) + column, emitted, is_used)
    tl.store(num_accepted_ptr + b, num_accepted)
    is_bad = tl.load(stats_ptr + rows * NUM_STATS + ERROR, is_used, 0.0) != 0.0
    tl.store(error_ptr + b, tl.max(is_bad.to(tl.int32)))


@triton.jit
def token_log_probs(
    logits_ptr, logits_stride, stats_ptr, rows, tokens, is_used, temperature, VOCAB: tl.constexpr
):
    """log p_i(x_i): -inf where a token is not in the vocabulary or not used. All `[BLOCK]`."""
    is_token = is_used & (tokens >= 0) & (tokens < VOCAB)
    logits = tl.load(logits_ptr + rows * logits_stride + tokens, is_token, NEGATIVE_INFINITY)
    kept = keep(scale_row(logits, temperature), tl.load(stats_ptr + rows * NUM_STATS + THRESHOLD))
    return kept - tl.load(stats_ptr + rows * NUM_STATS + LOG_NORMALISER)


def launch_judge(
    kernel: Any,
    logits: Tensor,
    stats: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    *own: Tensor | int | None,
    num_keys: int,
    is_by_row: bool,
    **constants: Any,
) -> None:
    """Launches a kernel that judges: a program for each sequence and tile, or, by row, for each row of it and tile.

    It is given, in this order: the logits, their stride and number of rows, `_check_sequences`'s, its `own`, and two
    zeroed workspaces, of `num_keys` int64 and of one int32 a sequence.

    Counts are read on the device: num_draft outside 0 … k and rows outside the logits are taken as the nearest
    that exist. A sequence that is not judged costs nothing, so is padding's value.
    """
    checked = _check_sequences(logits, stats, drafts, rows, is_running, verdict)
    count, k = drafts.row_start.numel(), drafts.tokens.shape[-1]
    programs = (count, k + 1) if is_by_row else (count,)
    launch(
        kernel,
        (*programs, ceil_div(logits.shape[1], TILE)),
        logits,
        logits.stride(0),
        logits.shape[0],
        *checked,
        *own,
        zeroed(num_keys * count, torch.int64, logits.device),
        zeroed(count, torch.int32, logits.device),
        K=k,
        VOCAB=logits.shape[1],
        **constants,
        TILE=TILE,
        BLOCK=triton.next_power_of_2(k + 1),
        num_warps=RACE_WARPS,
    )


def _check_sequences(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> tuple[Tensor, ...]:
    """All but the logits and the law as a kernel reads and writes them. Raises `ValueError` naming what has another
    shape or type; values cannot be looked at without waiting for the device."""
    check_logits("logits", logits)
    count, k = drafts.row_start.numel(), drafts.tokens.shape[-1]
    if count and not logits.shape[0]:
        raise ValueError(f"logits: no rows for {count} sequences")
    return (
        check_small("stats", stats, (logits.shape[0], NUM_STATS.value), torch.float32),
        *check_drafts(drafts),
        *check_columns(rows, count, "temperature", "seeds", "rule"),
        check_small("is_running", is_running, (count,), torch.int32),
        *check_verdict(verdict, count, k),
    )


def law_arguments(drafts: Drafts) -> tuple[Tensor | int | None, ...]:
    """The drafts' law as a kernel reads it, the strides of its logits behind them; nothing but None of point masses."""
    if drafts.law is None:
        return (None,) * 6
    law, (count, k) = drafts.law, drafts.tokens.shape
    check_logits("draft_logits", law.logits, (count, k))
    has_law = law.has_law
    return (
        check_small("draft_log_probs", law.log_probs, (count, k), torch.float32),
        law.logits,
        law.logits.stride(0),
        law.logits.stride(1),
        check_small("draft_stats", law.stats, (count, k, NUM_STATS.value), torch.float32),
        None if has_law is None else check_small("has_law", has_law, (count,), torch.bool),
    )
