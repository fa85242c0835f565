"""What a round's forwards feed, in one launch: lanes are sequences, a tile is all their drafts.

Reads four numbers a sequence, writes 4 + 3 k; see `specengine.kernels.reference.plan_round`.
"""

from __future__ import annotations

from typing import NamedTuple

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


@triton.jit
def load_plan(
    slots, is_sequence, seq_len_ptr, length_limit_ptr, num_speculative_ptr, draft_positions, K: tl.constexpr
):
    """Of the sequences in some slots, `[N]` each: committed tokens, whether they run, and how many they may draft."""
    slots = slots.to(tl.int64)
    length = tl.load(seq_len_ptr + slots, is_sequence, 0)
    limit = tl.load(length_limit_ptr + slots, is_sequence, 0)
    wanted = tl.load(num_speculative_ptr + slots, is_sequence, 0)
    is_running = length < limit
    # Limits may be the largest int32.
    room = tl.minimum(limit.to(tl.int64) - length - 1, draft_positions.to(tl.int64) - length + 1)
    num_draft = tl.minimum(tl.maximum(tl.minimum(wanted.to(tl.int64), room), 0), K).to(tl.int32)
    return length, is_running, tl.where(is_running, num_draft, 0)


@triton.jit
def store_plan(
    plan_ptr,
    b,
    is_sequence,
    num_sequences,
    length,
    is_running,
    num_draft,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `load_plan` gave of sequences b, and what follows from it for every forward."""
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
    slots = tl.load(slots_ptr + b, is_sequence, 0)
    length, is_running, num_draft = load_plan(
        slots, is_sequence, seq_len_ptr, length_limit_ptr, num_speculative_ptr, draft_positions, K
    )
    store_plan(plan_ptr, b, is_sequence, num_sequences, length, is_running, num_draft, K, BLOCK_K)


class RoundState(NamedTuple):
    """What kernels find a plan from, and where they write it.

    tensors:         seq_len, length_limit and num_speculative, as in the op `plan_round`
    plan:            `[(4 + 3 k) B]` int32, the plan's parts one after the other, written
    k:               the most drafts of any sequence
    draft_positions: positions that the draft model has, as 32 bits
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    plan: Tensor
    k: int
    draft_positions: int

    def parts(self) -> RoundPlan:
        """The plan's, once it is written."""
        count = self.plan.numel() // (_NUM_VECTORS + _NUM_MATRICES * self.k)
        vectors, matrices = self.plan[: _NUM_VECTORS * count], self.plan[_NUM_VECTORS * count :]
        return RoundPlan(
            *vectors.view(_NUM_VECTORS, count).unbind(),
            *matrices.view(_NUM_MATRICES, self.k, count).unbind(),
        )


def check_state(
    count: int,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
) -> RoundState:
    """The state, and room for the plan of `count` sequences. Raises `ValueError` naming what is wrong."""
    if k < 0:
        raise ValueError(f"k: {k} is negative")
    num_slots = seq_len.numel()
    tensors = (
        check_small("seq_len", seq_len, (num_slots,), torch.int32),
        check_small("length_limit", length_limit, (num_slots,), torch.int32),
        check_small("num_speculative", num_speculative, (num_slots,), torch.int32),
    )
    plan = torch.empty((_NUM_VECTORS + _NUM_MATRICES * k) * count, dtype=torch.int32, device=seq_len.device)
    return RoundState(tensors, plan, k, max(-1, min(draft_positions, 2**31 - 1)))


def plan_round(
    slots: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
) -> RoundPlan:
    """See `specengine.kernels.reference.plan_round`. The plan's tensors are parts of one."""
    count = slots.numel()
    state = check_state(count, seq_len, length_limit, num_speculative, k, draft_positions)
    block = min(MAX_BLOCK, triton.next_power_of_2(max(count, 1)))
    launch(
        spec_plan_round,
        (ceil_div(count, block),),
        check_small("slots", slots, (count,), torch.int32),
        *state.tensors,
        state.plan,
        count,
        state.draft_positions,
        K=k,
        BLOCK_B=block,
        BLOCK_K=triton.next_power_of_2(max(k, 1)),
        num_warps=4,
    )
    return state.parts()
