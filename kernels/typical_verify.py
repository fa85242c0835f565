"""Typical verification in one launch, which is lossy: a draft may be the less likely, the less certain the target is.

A program adds up its tile's part of one row's entropy, in integers, and holds the race for the token that would follow
if that row's draft were the first to fail; the last program of a sequence decides and commits. Rows before the first
draft that needs an entropy are not read. See `specengine.kernels.reference.typical_verify`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.judge import clamp_row, commit, launch_judge, load_num_draft, token_log_probs
from specengine.kernels.device.noise import NEGATIVE_INFINITY, key_token
from specengine.kernels.device.race import (
    LOG_NORMALISER,
    NUM_STATS,
    THRESHOLD,
    TOTAL_UNITS,
    check_columns,
    first_lane,
    is_last_of,
    keep,
    load_tile,
    scale_row,
    stack_tokens,
    take_keys,
    tile_noise,
    tile_total,
    winner_key,
)
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.rng import STREAM_TARGET

_TYPICAL = tl.constexpr(int(Rule.TYPICAL))
_STREAM_TARGET = tl.constexpr(STREAM_TARGET)


@triton.jit(do_not_specialize=["num_rows"])
def spec_typical_verify(
    logits_ptr,
    logits_stride,
    num_rows,
    stats_ptr,
    row_start_ptr,
    seq_len_ptr,
    num_draft_ptr,
    draft_token_ptr,
    temperature_ptr,
    seed_ptr,
    rule_ptr,
    is_running_ptr,
    tokens_ptr,
    num_accepted_ptr,
    error_ptr,
    acceptance_threshold_ptr,
    acceptance_delta_ptr,
    key_ptr,
    counter_ptr,
    K: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b, i, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_draft = load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, _TYPICAL, K)
    if i > num_draft:
        return
    temperature, row_start = tl.load(temperature_ptr + b), tl.load(row_start_ptr + b)
    column = tl.arange(0, BLOCK)
    rows = clamp_row(row_start + column, num_rows)
    is_drafted = column < num_draft
    draft = tl.load(draft_token_ptr + b.to(tl.int64) * K + column, is_drafted, -1)
    log_p = token_log_probs(logits_ptr, logits_stride, stats_ptr, rows, draft, is_drafted, temperature, VOCAB)
    is_likely = is_drafted & (log_p > tl.log(tl.load(acceptance_threshold_ptr + b)))
    first = tl.min(tl.where(is_likely, BLOCK, column))
    if i < first:
        return

    key_ptr += b.to(tl.int64) * 2 * (K + 1)
    entropy_ptr = key_ptr + K + 1
    row = clamp_row(row_start + i, num_rows)
    row_stats_ptr = stats_ptr + row * NUM_STATS
    lane = first_lane(split * TILE, TILE)
    score = scale_row(load_tile(logits_ptr + row * logits_stride, lane, VOCAB), temperature)
    score = keep(score, tl.load(row_stats_ptr + THRESHOLD))
    if tl.max(score) > NEGATIVE_INFINITY:
        if i < num_draft:
            surprise = tl.load(row_stats_ptr + LOG_NORMALISER) - score
            surprise = tl.where(score > NEGATIVE_INFINITY, surprise, 0.0)
            share = tl.where(score > NEGATIVE_INFINITY, tl.exp(-surprise), 0.0)
            tl.atomic_add(entropy_ptr + i, tile_total(share * tl.maximum(surprise, 0.0)), sem="relaxed")
        score += tile_noise(lane, tl.load(seq_len_ptr + b) + i, _STREAM_TARGET, 0, tl.load(seed_ptr + b))
    tl.atomic_max(key_ptr + i, winner_key(score, stack_tokens(lane)), sem="relaxed")

    if is_last_of((num_draft + 1 - first) * tl.num_programs(2), counter_ptr + b):
        is_row = (column >= first) & (column <= num_draft)
        keys = take_keys(key_ptr + column, is_row)
        entropy = take_keys(entropy_ptr + column, is_row).to(tl.float32) / TOTAL_UNITS
        is_typical = is_drafted & (log_p > tl.log(tl.load(acceptance_delta_ptr + b)) - entropy)
        n = tl.min(tl.where(is_likely | is_typical, BLOCK, column))
        drawn = key_token(tl.sum(tl.where(column == n, keys, 0)))
        emitted = tl.where(column < n, draft, drawn)
        commit(tokens_ptr, num_accepted_ptr, error_ptr, b, column, emitted, n, stats_ptr, rows, K)


def typical_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.typical_verify`, and `launch_judge` for values that are out of range."""
    given = (logits, stats, drafts, rows, is_running, verdict)
    own = check_columns(rows, len(rows.seeds), "acceptance_threshold", "acceptance_delta")
    launch_judge(
        spec_typical_verify, *given, *own, num_keys=2 * (drafts.tokens.shape[-1] + 1), is_by_row=True
    )
