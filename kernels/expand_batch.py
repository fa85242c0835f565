"""From lengths to a ragged batch in one launch: `begin_forward` without embedding and keys."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.begin_forward import Feed, launch_begin


def expand_batch(
    tokens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    start: Tensor,
    q_len: Tensor,
    num_logits: Tensor,
    block_size: int,
    *,
    num_tokens: int | None = None,
    num_logit_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `specengine.kernels.reference.expand_batch`.

    num_tokens, num_logit_rows: T and R where the host knows them, or upper bounds; without them the sums are read
                                from the device, which waits for it. Beyond the sums logit_rows are 0, so that they
                                can be used as indices, and the tokens are left alone
    """
    where = (tokens, block_table, slots, Feed(start, q_len, num_logits), block_size)
    return launch_begin(*where, num_tokens, num_logit_rows, None).expanded
