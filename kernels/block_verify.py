"""Block verification in one launch: exact speculative sampling that judges the drafts of a round together.

Which prefix is kept depends on sums over the vocabulary, a row each. A program adds up its tile of one row, and holds
the race for the token that would follow if that row's prefix were kept; the last program of a sequence decides and
commits. Sums are integers, so that nobody's order matters. Where the whole draft is kept, which needs no sum, only the
row behind it is read. See `specengine.kernels.reference.block_verify`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.judge import (
    clamp_row,
    commit,
    launch_judge,
    law_arguments,
    load_num_draft,
    token_log_probs,
)
from specengine.kernels.device.noise import NEGATIVE_INFINITY, fast_log, key_token
from specengine.kernels.device.race import (
    LOG_NORMALISER,
    NUM_STATS,
    THRESHOLD,
    TOTAL_UNITS,
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
from specengine.kernels.rejection_verify import accept_uniforms, load_draft_law, load_draft_log_probs
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.rng import STREAM_TARGET

_BLOCK_RULE = tl.constexpr(int(Rule.BLOCK))
_STREAM_TARGET = tl.constexpr(STREAM_TARGET)


@triton.jit
def log_shares(log_ratio, column, num_draft):
    """ln P_i at column i = 0 … num_draft: one addition after the other, so that the bits do not depend on BLOCK."""
    log_ratio = tl.where(log_ratio == log_ratio, log_ratio, NEGATIVE_INFINITY)
    shares = tl.zeros(column.shape, tl.float32)
    share = 0.0
    for i in range(num_draft):
        share = tl.minimum(share + tl.sum(tl.where(column == i, log_ratio, 0.0)), 0.0)
        shares = tl.where(column == i + 1, share, shares)
    return shares


@triton.jit(do_not_specialize=["num_rows"])
def spec_block_verify(
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
    draft_log_prob_ptr,
    draft_logits_ptr,
    draft_sequence_stride,
    draft_logits_stride,
    draft_stats_ptr,
    has_law_ptr,
    key_ptr,
    counter_ptr,
    K: tl.constexpr,
    VOCAB: tl.constexpr,
    DRAFT_VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b, i, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_draft = load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, _BLOCK_RULE, K)
    if i > num_draft:
        return
    temperature, seed, seq_len = tl.load(temperature_ptr + b), tl.load(seed_ptr + b), tl.load(seq_len_ptr + b)
    row_start = tl.load(row_start_ptr + b)
    column = tl.arange(0, BLOCK)
    rows = clamp_row(row_start + column, num_rows)
    is_drafted = column < num_draft
    first_draft = b.to(tl.int64) * K
    draft = tl.load(draft_token_ptr + first_draft + column, is_drafted, -1)
    log_ratio = token_log_probs(
        logits_ptr, logits_stride, stats_ptr, rows, draft, is_drafted, temperature, VOCAB
    )
    log_ratio -= load_draft_log_probs(draft_log_prob_ptr, has_law_ptr, b, first_draft + column, is_drafted)
    log_share = log_shares(log_ratio, column, num_draft)
    # Column i is the test of the prefix of length i.
    u = accept_uniforms(column - 1, seq_len, seed)
    is_whole = (column == num_draft) & (tl.minimum(tl.log(u), 0.0) <= log_share)
    is_all = tl.max(is_whole.to(tl.int32)) != 0
    if is_all & (i < num_draft):
        return

    target_key_ptr = key_ptr + b.to(tl.int64) * 3 * (K + 1)
    residual_key_ptr = target_key_ptr + K + 1
    excess_ptr = residual_key_ptr + K + 1
    row_share = tl.sum(tl.where(column == i, log_share, 0.0))
    if row_share > NEGATIVE_INFINITY:
        row = clamp_row(row_start + i, num_rows)
        row_stats_ptr = stats_ptr + row * NUM_STATS
        lane = first_lane(split * TILE, TILE)
        tokens = stack_tokens(lane)
        score = scale_row(load_tile(logits_ptr + row * logits_stride, lane, VOCAB), temperature)
        score = keep(score, tl.load(row_stats_ptr + THRESHOLD))
        if tl.max(score) > NEGATIVE_INFINITY:
            score -= tl.load(row_stats_ptr + LOG_NORMALISER)
            noise = tile_noise(lane, seq_len + i, _STREAM_TARGET, 0, seed)
            if i < num_draft:
                share = tl.exp(score + row_share)
                drafted = tl.load(draft_token_ptr + first_draft + i)
                weight = tl.where(tokens == drafted, 0.0, share)
                if draft_logits_ptr is not None:
                    log_q = load_draft_law(
                        draft_logits_ptr + b.to(tl.int64) * draft_sequence_stride + i * draft_logits_stride,
                        draft_stats_ptr + (first_draft + i) * NUM_STATS,
                        lane,
                        temperature,
                        DRAFT_VOCAB,
                    )
                    excess = tl.maximum(share - tl.exp(log_q), 0.0)
                    if has_law_ptr is not None:
                        excess = tl.where(tl.load(has_law_ptr + b), excess, weight)
                    weight = excess
                if tl.max(weight) > 0.0:
                    tl.atomic_add(excess_ptr + i, tile_total(weight), sem="relaxed")
                    log_weight = tl.where(
                        weight > 0.0, fast_log(tl.where(weight > 0.0, weight, 1.0)), NEGATIVE_INFINITY
                    )
                    tl.atomic_max(residual_key_ptr + i, winner_key(log_weight + noise, tokens), sem="relaxed")
            score += noise
        tl.atomic_max(target_key_ptr + i, winner_key(score, tokens), sem="relaxed")

    num_programs = tl.where(is_all, 1, num_draft + 1) * tl.num_programs(2)
    if is_last_of(num_programs, counter_ptr + b):
        is_row = column <= num_draft
        target_key = take_keys(target_key_ptr + column, is_row)
        residual_key = take_keys(residual_key_ptr + column, is_row)
        excess = take_keys(excess_ptr + column, is_row).to(tl.float32) / TOTAL_UNITS
        passes = (column < num_draft) & (u * (excess + (1.0 - tl.exp(log_share))) <= excess)
        n = tl.max(tl.where(passes | is_whole, column, 0))
        key = tl.where(residual_key > 0, residual_key, target_key)
        drawn = key_token(tl.sum(tl.where(column == n, key, 0)))
        emitted = tl.where(column < n, draft, drawn)
        commit(tokens_ptr, num_accepted_ptr, error_ptr, b, column, emitted, n, stats_ptr, rows, K)


def block_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.block_verify`, and `launch_judge` for values that are out of range."""
    given = (logits, stats, drafts, rows, is_running, verdict)
    own = law_arguments(drafts)
    draft_vocab = None if drafts.law is None else drafts.law.logits.shape[2]
    launch_judge(
        spec_block_verify,
        *given,
        *own,
        num_keys=3 * (drafts.tokens.shape[-1] + 1),
        is_by_row=True,
        DRAFT_VOCAB=draft_vocab,
    )
