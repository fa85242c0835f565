"""Match verification of draws that the target has made already, in one launch, one program a sequence.

Reads k + 1 draws and k drafts a sequence and no logits; see `specengine.kernels.reference.match_draws`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.noise import philox_lanes
from specengine.kernels.device.race import check_output, check_small
from specengine.kernels.match_verify import clamp_row
from specengine.rng import STREAM_ACCEPT

_STREAM_ACCEPT = tl.constexpr(STREAM_ACCEPT)
_TWO_POW_MINUS_32 = tl.constexpr(2.0**-32)


@triton.jit
def exact_uniform(bits):
    """`rng.uniform`, rounded once: its fp32 from uint32 r."""
    return ((bits.to(tl.float64) + 0.5) * _TWO_POW_MINUS_32).to(tl.float32)


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
    num_draft_ptr,
    draft_tokens_ptr,
    is_running_ptr,
    tokens_ptr,
    num_accepted_ptr,
    error_ptr,
    forced_acceptance,
    seed_ptr,
    seq_len_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0)
    if tl.load(is_running_ptr + b) == 0:
        return
    num_draft = tl.minimum(tl.maximum(tl.load(num_draft_ptr + b), 0), K)
    column = tl.arange(0, BLOCK)
    is_drafted = column < num_draft
    rows = clamp_row(tl.load(row_start_ptr + b) + column, num_rows)
    drawn = tl.load(drawn_ptr + rows, column <= num_draft, 0)
    draft = tl.load(draft_tokens_ptr + b.to(tl.int64) * K + column, is_drafted, -1)
    if forced_acceptance is None:
        is_kept = drawn == draft
    else:
        seed, seq_len = tl.load(seed_ptr + b), tl.load(seq_len_ptr + b)
        bits, _, _, _ = philox_lanes(column * 0, seq_len + column, _STREAM_ACCEPT, seq_len, seed)
        is_kept = exact_uniform(bits) < forced_acceptance
    num_accepted = tl.min(tl.where(is_drafted & is_kept, BLOCK, column))
    is_used = column <= num_accepted
    emitted = tl.where(column < num_accepted, draft, drawn)
    tl.store(tokens_ptr + b.to(tl.int64) * (K + 1) + column, emitted, is_used)
    tl.store(num_accepted_ptr + b, num_accepted)
    is_bad = tl.load(drawn_error_ptr + rows, is_used, 0) != 0
    tl.store(error_ptr + b, tl.max(is_bad.to(tl.int32)))


def match_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    row_start: Tensor,
    num_draft: Tensor,
    draft_tokens: Tensor,
    is_running: Tensor,
    tokens: Tensor,
    num_accepted: Tensor,
    error: Tensor,
    forced_acceptance: float | None = None,
    seeds: Tensor | None = None,
    seq_len: Tensor | None = None,
) -> None:
    """See `specengine.kernels.reference.match_draws`, and `match_verify` for values that are out of range."""
    rows, count, k = drawn.numel(), row_start.numel(), draft_tokens.shape[-1]
    if count and not rows:
        raise ValueError(f"drawn: no rows for {count} sequences")
    if forced_acceptance is None:
        seeds = seq_len = None
    else:
        if seeds is None or seq_len is None:
            missing = "seeds" if seeds is None else "seq_len"
            raise ValueError(f"{missing}: forced_acceptance draws by seeds and seq_len")
        seeds = check_small("seeds", seeds, (count,), torch.int64)
        seq_len = check_small("seq_len", seq_len, (count,), torch.int32)
        forced_acceptance = float(forced_acceptance)
    launch(
        spec_match_draws,
        (count,),
        check_small("drawn", drawn, (rows,), torch.int32),
        check_small("drawn_error", drawn_error, (rows,), torch.int32),
        rows,
        check_small("row_start", row_start, (count,), torch.int32),
        check_small("num_draft", num_draft, (count,), torch.int32),
        check_small("draft_tokens", draft_tokens, (count, k), torch.int32),
        check_small("is_running", is_running, (count,), torch.int32),
        check_output("tokens", tokens, (count, k + 1), torch.int32),
        check_output("num_accepted", num_accepted, (count,), torch.int32),
        check_output("error", error, (count,), torch.int32),
        forced_acceptance,
        seeds,
        seq_len,
        K=k,
        BLOCK=triton.next_power_of_2(k + 1),
        num_warps=1,
    )
