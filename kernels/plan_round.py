"""What a round's forwards feed, in one launch: lanes are sequences, a tile is all their drafts.

Reads four numbers a sequence, writes 4 + 3 k; see `specengine.kernels.reference.plan_round`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.race import check_small
from specengine.kernels.types.round import RoundPlan

# Sequences of a program.
MAX_BLOCK = 32
_NUM_VECTORS = 4
_NUM_MATRICES = 3


@triton.jit(do_not_specialize=["slots_ptr", "num_sequences", "draft_positions"])
def spec_plan_round(
    slots_ptr,
    seq_len_ptr,
    length_limit_ptr,
    num_speculative_ptr,
    plan_ptr,
    num_sequences,
    draft_positions,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_sequence = b < num_sequences
    slot = tl.load(slots_ptr + b, is_sequence, 0).to(tl.int64)
    length = tl.load(seq_len_ptr + slot, is_sequence, 0)
    limit = tl.load(length_limit_ptr + slot, is_sequence, 0)
    wanted = tl.load(num_speculative_ptr + slot, is_sequence, 0)
    is_running = length < limit
    # Limits may be the largest int32.
    room = tl.minimum(limit.to(tl.int64) - length - 1, draft_positions.to(tl.int64) - length + 1)
    num_draft = tl.minimum(tl.maximum(tl.minimum(wanted.to(tl.int64), room), 0), K).to(tl.int32)
    num_draft = tl.where(is_running, num_draft, 0)
    tl.store(plan_ptr + b, length, is_sequence)
    tl.store(plan_ptr + num_sequences + b, is_running.to(tl.int32), is_sequence)
    tl.store(plan_ptr + 2 * num_sequences + b, num_draft, is_sequence)
    tl.store(plan_ptr + 3 * num_sequences + b, length - 1, is_sequence)

    step = tl.arange(0, BLOCK_K)[:, None]
    is_drafting = (step < num_draft[None, :]).to(tl.int32)
    start = length[None, :] + tl.where(step == 0, -2, step - 1)
    tile_ptr = plan_ptr + 4 * num_sequences + step * num_sequences + b[None, :]
    is_planned = (step < K) & is_sequence[None, :]
    tl.store(tile_ptr, start, is_planned)
    tl.store(tile_ptr + K * num_sequences, is_drafting * tl.where(step == 0, 2, 1), is_planned)
    tl.store(tile_ptr + 2 * K * num_sequences, is_drafting, is_planned)


def plan_round(
    slots: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
) -> RoundPlan:
    """See `specengine.kernels.reference.plan_round`. The plan's tensors are parts of one."""
    count, num_slots = slots.numel(), seq_len.numel()
    if k < 0:
        raise ValueError(f"k: {k} is negative")
    plan = torch.empty((_NUM_VECTORS + _NUM_MATRICES * k) * count, dtype=torch.int32, device=slots.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(max(count, 1)))
    launch(
        spec_plan_round,
        (ceil_div(count, block),),
        check_small("slots", slots, (count,), torch.int32),
        check_small("seq_len", seq_len, (num_slots,), torch.int32),
        check_small("length_limit", length_limit, (num_slots,), torch.int32),
        check_small("num_speculative", num_speculative, (num_slots,), torch.int32),
        plan,
        count,
        max(-1, min(draft_positions, 2**31 - 1)),
        K=k,
        BLOCK_B=block,
        BLOCK_K=triton.next_power_of_2(max(k, 1)),
        num_warps=4,
    )
    vectors, matrices = plan[: _NUM_VECTORS * count], plan[_NUM_VECTORS * count :]
    return RoundPlan(
        *vectors.view(_NUM_VECTORS, count).unbind(), *matrices.view(_NUM_MATRICES, k, count).unbind()
    )
