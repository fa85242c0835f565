"""All that comes before a forward's first layer: which tokens it feeds, what enters the layers, what its draws need."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.embed import embed
from specengine.kernels.reference.expand_batch import expand_batch
from specengine.kernels.reference.row_keys import row_keys
from specengine.kernels.types.program import ForwardStart
from specengine.kernels.types.rows import SamplingRows


def begin_forward(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
    rows: SamplingRows,
    token_table: Tensor,
    position_table: Tensor | None,
    *,
    num_tokens: int | None = None,
    num_logit_rows: int | None = None,
    num_more: Tensor | None = None,
) -> ForwardStart:
    """`expand_batch`, then `embed` of its tokens and `row_keys` of its logit rows.

    tokens … num_logits, block_size, num_tokens, num_logit_rows: as in `expand_batch`
    rows:        `[B]`, by sequence
    num_more:    `[B]` int32, added to q_len and to num_logits; None: nothing
    token_table, position_table: as in `embed`
    """
    if num_more is not None:
        q_len, num_logits = q_len + num_more, num_logits + num_more
    where = (tokens, block_table, slots, start, q_len, num_logits, block_size)
    expanded = expand_batch(*where, num_tokens=num_tokens, num_logit_rows=num_logit_rows)
    token_ids, positions, _, q_start, _, logit_rows = expanded
    hidden = embed(token_ids, positions, token_table, position_table)
    return ForwardStart(*expanded, hidden, row_keys(rows, q_start, positions, logit_rows))
