"""Match verification of draws that the target has made already, in one launch, one program a sequence.

Reads k + 1 draws and k drafts a sequence and no logits; see `specengine.kernels.reference.match_draws`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.judge import clamp_row
from specengine.kernels.device.launch import launch
from specengine.kernels.device.noise import philox_lanes
from specengine.kernels.device.race import check_columns, check_drafts, check_small, check_verdict
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.rng import STREAM_ACCEPT

_STREAM_ACCEPT = tl.constexpr(STREAM_ACCEPT)
_TWO_POW_MINUS_32 = tl.constexpr(2.0**-32)


@triton.jit
def exact_uniform(bits):
    """`rng.uniform`, rounded once: its fp32 from uint32 r."""
    return ((bits.to(tl.float64) + 0.5) * _TWO_POW_MINUS_32).to(tl.float32)


@triton.jit
def match_row(
    b,
    drawn_ptr,
    drawn_error_ptr,
    num_rows,
    row_start_ptr,
    seq_len_ptr,
    num_draft_ptr,
    draft_tokens_ptr,
    seed_ptr,
    forced_acceptance,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What sequence b emits, `[BLOCK]`, how many drafts it accepts, 1 if a row that it used is bad, and its drafts."""
    column = tl.arange(0, BLOCK)
    num_draft = tl.minimum(tl.maximum(tl.load(num_draft_ptr + b), 0), K)
    draft = tl.load(draft_tokens_ptr + b.to(tl.int64) * K + column, column < K, -1)
    rows = clamp_row(tl.load(row_start_ptr + b) + column, num_rows)
    drawn = tl.load(drawn_ptr + rows, column <= num_draft, 0)
    is_bad = tl.load(drawn_error_ptr + rows, column <= num_draft, 0) != 0
    if forced_acceptance is None:
        is_kept = drawn == draft
    else:
        seed, seq_len = tl.load(seed_ptr + b), tl.load(seq_len_ptr + b)
        bits, _, _, _ = philox_lanes(column * 0, seq_len + column, _STREAM_ACCEPT, seq_len, seed)
        is_kept = exact_uniform(bits) < forced_acceptance
    num_accepted = tl.min(tl.where((column < num_draft) & is_kept, BLOCK, column))
    emitted = tl.where(column < num_accepted, draft, drawn)
    error = tl.max(((column <= num_accepted) & is_bad).to(tl.int32))
    return emitted, num_accepted, error, num_draft


@triton.jit(
    do_not_specialize=[
        "num_draft_ptr",
        "is_running_ptr",
        "num_accepted_ptr",
        "error_ptr",
        "seq_len_ptr",
        "num_rows",
    ]
)
def spec_match_draws(
    drawn_ptr,
    drawn_error_ptr,
    num_rows,
    row_start_ptr,
    seq_len_ptr,
    num_draft_ptr,
    draft_tokens_ptr,
    seed_ptr,
    is_running_ptr,
    tokens_ptr,
    num_accepted_ptr,
    error_ptr,
    forced_acceptance,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0)
    if tl.load(is_running_ptr + b) == 0:
        return
    emitted, num_accepted, error, _ = match_row(
        b,
        drawn_ptr,
        drawn_error_ptr,
        num_rows,
        row_start_ptr,
        seq_len_ptr,
        num_draft_ptr,
        draft_tokens_ptr,
        seed_ptr,
        forced_acceptance,
        K,
        BLOCK,
    )
    column = tl.arange(0, BLOCK)
    tl.store(tokens_ptr + b.to(tl.int64) * (K + 1) + column, emitted, column <= num_accepted)
    tl.store(num_accepted_ptr + b, num_accepted)
    tl.store(error_ptr + b, error)


def check_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
) -> tuple[Tensor | int, ...]:
    """The arguments of `match_draws` as its kernel has them, in order."""
    num_rows, count, k = drawn.numel(), drafts.row_start.numel(), drafts.tokens.shape[-1]
    if count and not num_rows:
        raise ValueError(f"drawn: no rows for {count} sequences")
    return (
        check_small("drawn", drawn, (num_rows,), torch.int32),
        check_small("drawn_error", drawn_error, (num_rows,), torch.int32),
        num_rows,
        *check_drafts(drafts),
        *check_columns(rows, count, "seeds"),
        check_small("is_running", is_running, (count,), torch.int32),
        *check_verdict(verdict, count, k),
    )


def match_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    forced_acceptance: float | None = None,
) -> None:
    """See `specengine.kernels.reference.match_draws`, and `launch_judge` for values that are out of range."""
    count, k = drafts.row_start.numel(), drafts.tokens.shape[-1]
    launch(
        spec_match_draws,
        (count,),
        *check_draws(drawn, drawn_error, drafts, rows, is_running, verdict),
        None if forced_acceptance is None else float(forced_acceptance),
        K=k,
        BLOCK=triton.next_power_of_2(k + 1),
        num_warps=1,
    )
