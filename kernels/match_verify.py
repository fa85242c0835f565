"""Match verification in one launch: the target's own draw decides, and a draft token survives if it is that draw.

Each program scores one tile of one row, by `sample_rows`'s race; the last program of a sequence compares the rows'
winners with the draft and commits. Reads the rows' logits once, whatever is accepted; see
`specengine.kernels.reference.match_verify`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.noise import key_token
from specengine.kernels.device.race import (
    ERROR,
    NUM_STATS,
    RACE_WARPS,
    TILE,
    check_columns,
    check_drafts,
    check_logits,
    check_small,
    check_verdict,
    draw_key,
    is_last_of,
    take_keys,
)
from specengine.kernels.device.workspace import zeroed
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.rng import STREAM_TARGET

MATCH = tl.constexpr(int(Rule.MATCH))
_STREAM_TARGET = tl.constexpr(STREAM_TARGET)


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


@triton.jit(do_not_specialize=["num_rows"])
def spec_match_verify(
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
    num_draft = load_num_draft(is_running_ptr, rule_ptr, num_draft_ptr, b, MATCH, K)
    if i > num_draft:
        return
    row_start = tl.load(row_start_ptr + b)
    row = clamp_row(row_start + i, num_rows)
    key = draw_key(
        logits_ptr + row * logits_stride,
        stats_ptr + row * NUM_STATS,
        split * TILE,
        tl.load(temperature_ptr + b),
        tl.load(seed_ptr + b),
        tl.load(seq_len_ptr + b) + i,
        _STREAM_TARGET,
        0,
        VOCAB,
        TILE,
    )
    key_ptr += b * (K + 1)
    tl.atomic_max(key_ptr + i, key, sem="relaxed")
    if is_last_of((num_draft + 1) * tl.num_programs(2), counter_ptr + b):
        column = tl.arange(0, BLOCK)
        drawn = key_token(take_keys(key_ptr + column, column <= num_draft))
        is_drafted = column < num_draft
        draft = tl.load(draft_token_ptr + b.to(tl.int64) * K + column, is_drafted, -1)
        num_accepted = tl.min(tl.where(is_drafted & (drawn == draft), BLOCK, column))
        rows = clamp_row(row_start + column, num_rows)
        commit(tokens_ptr, num_accepted_ptr, error_ptr, b, column, drawn, num_accepted, stats_ptr, rows, K)


def check_sequences(
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


def match_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.match_verify`.

    Counts are read on the device: num_draft outside 0 … k and rows outside the logits are taken as the nearest
    that exist. A sequence that is not judged costs nothing, so is padding's value.
    """
    checked = check_sequences(logits, stats, drafts, rows, is_running, verdict)
    count, k = drafts.row_start.numel(), drafts.tokens.shape[-1]
    launch(
        spec_match_verify,
        (count, k + 1, ceil_div(logits.shape[1], TILE)),
        logits,
        logits.stride(0),
        logits.shape[0],
        *checked,
        zeroed(count * (k + 1), torch.int64, logits.device),
        zeroed(count, torch.int32, logits.device),
        K=k,
        VOCAB=logits.shape[1],
        TILE=TILE,
        BLOCK=triton.next_power_of_2(k + 1),
        num_warps=RACE_WARPS,
    )
