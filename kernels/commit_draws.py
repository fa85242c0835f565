"""What the target's draws make of a round, in one launch: match verification and commit, one program a sequence.

Reads k + 1 draws, k drafts and a few numbers a sequence, all before it writes; see
`specengine.kernels.reference.commit_draws`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.commit_round import commit_row
from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.race import check_output, check_small, check_table
from specengine.kernels.match_draws import check_draws, match_row
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.round import NUM_RESULT_COLUMNS
from specengine.kernels.types.rows import SamplingRows


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "seq_len_ptr",
        "num_draft_ptr",
        "is_running_ptr",
        "num_accepted_ptr",
        "error_ptr",
        "tokens_stride",
    ]
)
def spec_commit_draws(
    drawn_ptr,
    drawn_error_ptr,
    num_rows,
    row_start_ptr,
    seq_len_ptr,
    num_draft_ptr,
    draft_tokens_ptr,
    seed_ptr,
    is_running_ptr,
    emitted_ptr,
    num_accepted_ptr,
    error_ptr,
    forced_acceptance,
    tokens_ptr,
    tokens_stride,
    slot_seq_len_ptr,
    length_limit_ptr,
    slots_ptr,
    record_ptr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0)
    is_running = tl.load(is_running_ptr + b) != 0
    slot, start = tl.load(slots_ptr + b), tl.load(seq_len_ptr + b)
    emitted, num_accepted, error, num_draft = match_row(
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
    num_used = tl.where(is_running, num_accepted + 1, 0)
    tl.store(emitted_ptr + b.to(tl.int64) * (K + 1) + column, emitted, column < num_used)
    if is_running:
        tl.store(num_accepted_ptr + b, num_accepted)
        tl.store(error_ptr + b, error)
    commit_row(
        b,
        emitted,
        is_running,
        error != 0,
        num_accepted,
        num_draft,
        slot,
        start,
        tokens_ptr,
        tokens_stride,
        slot_seq_len_ptr,
        length_limit_ptr,
        record_ptr,
        K,
    )


def commit_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    tokens: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    slots: Tensor,
    forced_acceptance: float | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.commit_draws`, and `launch_judge` for values that are out of range."""
    check_table("tokens", tokens)
    count, num_slots, k = drafts.row_start.numel(), tokens.shape[0], drafts.tokens.shape[-1]
    record = torch.empty(count, NUM_RESULT_COLUMNS + k + 1, dtype=torch.int32, device=tokens.device)
    launch(
        spec_commit_draws,
        (count,),
        *check_draws(drawn, drawn_error, drafts, rows, is_running, verdict),
        None if forced_acceptance is None else float(forced_acceptance),
        tokens,
        tokens.stride(0),
        check_output("seq_len", seq_len, (num_slots,), torch.int32),
        check_output("length_limit", length_limit, (num_slots,), torch.int32),
        check_small("slots", slots, (count,), torch.int32),
        record,
        K=k,
        BLOCK=triton.next_power_of_2(k + 1),
        num_warps=1,
    )
    return record
