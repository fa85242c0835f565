"""Rejection verification in one launch: exact speculative sampling with the residual distribution.

What is accepted depends on k numbers a sequence, which each of its programs finds again; then each scores one tile of
the one row that is drawn from, and the last program commits. Two races are held: on the residual, and on the target
itself for a residual that rounds to nothing. Reads one row of logits and of draft logits a sequence; see
`specengine.kernels.reference.rejection_verify`.
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
from specengine.kernels.device.noise import NEGATIVE_INFINITY, fast_log, key_token, philox_lanes, uniform
from specengine.kernels.device.race import (
    LOG_NORMALISER,
    NUM_STATS,
    THRESHOLD,
    first_lane,
    is_last_of,
    keep,
    load_tile,
    scale_row,
    stack_tokens,
    take_keys,
    tile_noise,
    winner_key,
)
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.rng import STREAM_ACCEPT, STREAM_TARGET

_REJECTION = tl.constexpr(int(Rule.REJECTION))
_STREAM_TARGET = tl.constexpr(STREAM_TARGET)
_STREAM_ACCEPT = tl.constexpr(STREAM_ACCEPT)


@triton.jit
def load_draft_log_probs(draft_log_prob_ptr, has_law_ptr, b, offset, is_drafted):
    """log q_i(x_i), at `offset` of the sequence; 0 of a point mass."""
    if draft_log_prob_ptr is None:
        return tl.zeros(offset.shape, tl.float32)
    else:
        log_probs = tl.load(draft_log_prob_ptr + offset, is_drafted, 0.0)
        if has_law_ptr is not None:
            log_probs = tl.where(tl.load(has_law_ptr + b), log_probs, 0.0)
        return log_probs


@triton.jit
def accept_uniforms(index, seq_len, seed):
    """u_i of drafts `index`."""
    bits, _, _, _ = philox_lanes(index * 0, seq_len + index, _STREAM_ACCEPT, seq_len, seed)
    return uniform(bits)


@triton.jit
def load_draft_law(draft_logits_ptr, draft_stats_ptr, lane, temperature, DRAFT_VOCAB: tl.constexpr):
    """A tile's log q of the row of draft logits and of its statistics that the pointers are at."""
    scaled = scale_row(load_tile(draft_logits_ptr, lane, DRAFT_VOCAB), temperature)
    log_q = keep(scaled, tl.load(draft_stats_ptr + THRESHOLD))
    return log_q - tl.load(draft_stats_ptr + LOG_NORMALISER)


@triton.jit
def residual_log_weights(log_p, log_q):
    """log max(p - q, 0)."""
    weight = tl.exp(log_p) - tl.exp(log_q)
    is_left = weight > 0.0
    return tl.where(is_left, fast_log(tl.where(is_left, weight, 1.0)), NEGATIVE_INFINITY)


@triton.jit(do_not_specialize=["num_rows"])
def spec_rejection_verify(
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
    b, split = tl.program_id(0), tl.program_id(1)
    num_draft = load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, _REJECTION, K)
    if num_draft < 0:
        return
    temperature, seed, seq_len = tl.load(temperature_ptr + b), tl.load(seed_ptr + b), tl.load(seq_len_ptr + b)
    column = tl.arange(0, BLOCK)
    rows = clamp_row(tl.load(row_start_ptr + b) + column, num_rows)
    is_drafted = column < num_draft
    first_draft = b.to(tl.int64) * K
    draft = tl.load(draft_token_ptr + first_draft + column, is_drafted, -1)
    log_ratio = token_log_probs(
        logits_ptr, logits_stride, stats_ptr, rows, draft, is_drafted, temperature, VOCAB
    )
    log_ratio -= load_draft_log_probs(draft_log_prob_ptr, has_law_ptr, b, first_draft + column, is_drafted)
    log_u = tl.minimum(tl.log(accept_uniforms(column, seq_len, seed)), 0.0)
    n = tl.min(tl.where(is_drafted & (log_u <= log_ratio), BLOCK, column))

    row = clamp_row(tl.load(row_start_ptr + b) + n, num_rows)
    row_stats_ptr = stats_ptr + row * NUM_STATS
    lane = first_lane(split * TILE, TILE)
    tokens = stack_tokens(lane)
    score = scale_row(load_tile(logits_ptr + row * logits_stride, lane, VOCAB), temperature)
    score = keep(score, tl.load(row_stats_ptr + THRESHOLD))
    target_key_ptr = key_ptr + 2 * b
    residual_key_ptr = target_key_ptr + 1
    if tl.max(score) > NEGATIVE_INFINITY:
        log_p = score - tl.load(row_stats_ptr + LOG_NORMALISER)
        noise = tile_noise(lane, seq_len + n, _STREAM_TARGET, 0, seed)
        if n < num_draft:
            rejected = tl.load(draft_token_ptr + first_draft + n)
            log_weight = tl.where(tokens == rejected, NEGATIVE_INFINITY, log_p)
            if draft_logits_ptr is not None:
                log_q = load_draft_law(
                    draft_logits_ptr + b.to(tl.int64) * draft_sequence_stride + n * draft_logits_stride,
                    draft_stats_ptr + (first_draft + n) * NUM_STATS,
                    lane,
                    temperature,
                    DRAFT_VOCAB,
                )
                residual = residual_log_weights(log_p, log_q)
                if has_law_ptr is None:
                    log_weight = residual
                else:
                    log_weight = tl.where(tl.load(has_law_ptr + b), residual, log_weight)
            if tl.max(log_weight) > NEGATIVE_INFINITY:
                tl.atomic_max(residual_key_ptr, winner_key(log_weight + noise, tokens), sem="relaxed")
        score = log_p + noise
    tl.atomic_max(target_key_ptr, winner_key(score, tokens), sem="relaxed")

    if is_last_of(tl.num_programs(1), counter_ptr + b):
        residual_key, target_key = take_keys(residual_key_ptr, True), take_keys(target_key_ptr, True)
        drawn = key_token(tl.where(residual_key > 0, residual_key, target_key))
        emitted = tl.where(column < n, draft, drawn)
        commit(tokens_ptr, num_accepted_ptr, error_ptr, b, column, emitted, n, stats_ptr, rows, K)


def rejection_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.rejection_verify`, and `launch_judge` for values that are out of range."""
    given = (logits, stats, drafts, rows, is_running, verdict)
    own = law_arguments(drafts)
    draft_vocab = None if drafts.law is None else drafts.law.logits.shape[2]
    launch_judge(spec_rejection_verify, *given, *own, num_keys=2, is_by_row=False, DRAFT_VOCAB=draft_vocab)
