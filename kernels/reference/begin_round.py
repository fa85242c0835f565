"""What a round feeds, and the start of its first forward."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.begin_forward import begin_forward
from specengine.kernels.reference.plan_round import plan_round
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
    """`plan_round`, then `begin_forward` of the last num_fed committed tokens of every sequence that drafts, or, where
    k is 0, that runs; the logits of the last one are wanted.

    tokens, block_table, block_size, rows, token_table, position_table: as in `begin_forward`
    slots, seq_len, length_limit, num_speculative, k, draft_positions:  as in `plan_round`
    num_fed: 1 or more; each of these sequences has as many tokens
    """
    plan = plan_round(slots, seq_len, length_limit, num_speculative, k, draft_positions)
    wanted = plan.is_drafting[0] if k else plan.is_running
    where = (tokens, block_table, slots, plan.seq_len - num_fed, num_fed * wanted, wanted, block_size)
    return plan, begin_forward(*where, rows, token_table, position_table)
