"""Final norm and the language-model head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from specengine.kernels.reference.norm_linear import apply_norm, linear
from specengine.kernels.types.packed import Norm, PackedLinear

PAD_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """The logits' row length: `vocab_size` rounded up to a multiple of 128."""
    return (vocab_size + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE


def head(
    hidden: Tensor,
    norm: Norm,
    weight: PackedLinear,
    vocab_size: int,
    *,
    token_ids: Tensor | None = None,
) -> Tensor:
    """logits = norm(hidden) W^T, columns from `vocab_size` on are -inf.

    hidden:     `[R, D]` fp32
    weight:     D -> at least vocab_size; with token_ids D -> n
    token_ids:  `[n]` int32, ascending: the tokens that the weight's rows are for, and others are -inf; None: row v is
                token v
    vocab_size: the number of real tokens (no larger id is ever emitted)
    returns     `[R, V]` fp32, V = vocab_size rounded up to a multiple of 128
    """
    num_columns = padded_vocab_size(vocab_size)
    logits = linear(apply_norm(hidden, norm), weight)
    if token_ids is not None:
        is_known = token_ids < vocab_size
        spread = logits.new_full((logits.shape[0], num_columns), float("-inf"))
        spread[:, token_ids[is_known].long()] = logits[:, is_known]
        return spread
    return F.pad(logits[:, :vocab_size], (0, num_columns - vocab_size), value=float("-inf"))
