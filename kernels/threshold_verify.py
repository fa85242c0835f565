"""Threshold verification in one launch, which is lossy: a draft that is likely enough is taken for the target's own.

What is accepted depends on k numbers a sequence, which each of its programs finds again; then each scores one tile of
the one row that is drawn from, and the last program commits. See `specengine.kernels.reference.threshold_verify`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.judge import clamp_row, commit, launch_judge, load_num_draft, token_log_probs
from specengine.kernels.device.noise import key_token
from specengine.kernels.device.race import (
    NUM_STATS,
    check_columns,
    draw_key,
    is_last_of,
    take_keys,
)
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.rng import STREAM_TARGET

_THRESHOLD_RULE = tl.constexpr(int(Rule.THRESHOLD))
_STREAM_TARGET = tl.constexpr(STREAM_TARGET)


@triton.jit(do_not_specialize=["num_rows"])
def spec_threshold_verify(
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
    key_ptr,
    counter_ptr,
    K: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b, split = tl.program_id(0), tl.program_id(1)
    num_draft = load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, _THRESHOLD_RULE, K)
    if num_draft < 0:
        return
    temperature, row_start = tl.load(temperature_ptr + b), tl.load(row_start_ptr + b)
    column = tl.arange(0, BLOCK)
    rows = clamp_row(row_start + column, num_rows)
    is_drafted = column < num_draft
    draft = tl.load(draft_token_ptr + b.to(tl.int64) * K + column, is_drafted, -1)
    log_p = token_log_probs(logits_ptr, logits_stride, stats_ptr, rows, draft, is_drafted, temperature, VOCAB)
    is_accepted = is_drafted & (log_p > tl.log(tl.load(acceptance_threshold_ptr + b)))
    n = tl.min(tl.where(is_accepted, BLOCK, column))
    row = clamp_row(row_start + n, num_rows)
    key = draw_key(
        logits_ptr + row * logits_stride,
        stats_ptr + row * NUM_STATS,
        split * TILE,
        temperature,
        tl.load(seed_ptr + b),
        tl.load(seq_len_ptr + b) + n,
        _STREAM_TARGET,
        0,
        VOCAB,
        TILE,
    )
    tl.atomic_max(key_ptr + b, key, sem="relaxed")
    if is_last_of(tl.num_programs(1), counter_ptr + b):
        emitted = tl.where(column < n, draft, key_token(take_keys(key_ptr + b, True)))
        commit(tokens_ptr, num_accepted_ptr, error_ptr, b, column, emitted, n, stats_ptr, rows, K)


def threshold_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.threshold_verify`, and `launch_judge` for values that are out of range."""
    given = (logits, stats, drafts, rows, is_running, verdict)
    own = check_columns(rows, len(rows.seeds), "acceptance_threshold")
    launch_judge(spec_threshold_verify, *given, *own, num_keys=1, is_by_row=False)
