"""Match verification in one launch: the target's own draw decides, and a draft token survives if it is that draw.

Each program scores one tile of one row, by `sample_rows`'s race; the last program of a sequence compares the rows'
winners with the draft and commits. Reads the rows' logits once, whatever is accepted; see
`specengine.kernels.reference.match_verify`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.judge import MATCH, clamp_row, commit, launch_judge, load_num_draft
from specengine.kernels.device.noise import key_token
from specengine.kernels.device.race import (
    NUM_STATS,
    draw_key,
    is_last_of,
    take_keys,
)
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.rng import STREAM_TARGET

_STREAM_TARGET = tl.constexpr(STREAM_TARGET)


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


def match_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """See `specengine.kernels.reference.match_verify`, and `launch_judge` for values that are out of range."""
    given = (logits, stats, drafts, rows, is_running, verdict)
    launch_judge(spec_match_verify, *given, num_keys=drafts.tokens.shape[-1] + 1, is_by_row=True)
