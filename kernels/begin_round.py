"""A round's plan and all that comes before the first layer of its first forward, in one launch: `begin_forward`, which
finds what is fed from the state. See `specengine.kernels.reference.begin_round`.
"""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.begin_forward import Entry, RoundFeed, launch_begin
from specengine.kernels.embed import check_tables
from specengine.kernels.plan_round import check_state
from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.round import RoundPlan
from specengine.kernels.types.rows import SamplingRows


def begin_round(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
    num_fed: int,
    block_size: int,
    rows: SamplingRows,
    token_table: Tensor,
    position_table: Tensor | None,
) -> tuple[RoundPlan, ForwardStart]:
    """See `specengine.kernels.reference.begin_round`. There are num_fed tokens and a logit row for every sequence:
    beyond what is fed, tokens and hidden are left alone, logit_rows are 0 and have keys that some sequence has."""
    if num_fed < 1:
        raise ValueError(f"num_fed: {num_fed} is less than 1")
    check_tables(token_table, position_table)
    count = slots.numel()
    state = check_state(count, seq_len, length_limit, num_speculative, k, draft_positions)
    feed, entry = RoundFeed(state, num_fed), Entry(rows, token_table, position_table)
    start = launch_begin(tokens, block_table, slots, feed, block_size, num_fed * count, count, entry)
    return state.parts(), start
