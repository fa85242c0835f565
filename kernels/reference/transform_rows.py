"""What each sequence asks to be done to its logits before anything is drawn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms


def transform_rows(
    logits: Tensor,
    rows: SamplingRows,
    slots: Tensor,
    q_start: Tensor,
    positions: Tensor,
    logit_rows: Tensor,
    transforms: Transforms,
) -> Tensor:
    """z'_v = z_v + the sum of the entries for v that hold at the position that the row decides, in their order.

    Before that, of tokens that stand anywhere before this position z becomes z / p where z >= 0, else z p, with p the
    sequence's repetition penalty (Keskar et al., 2019).

    logits:     `[R, V]` fp32; not written. Row r decides the position after token logit_rows[r] of a ragged batch
    rows:       `[B]`, what each sequence is judged by
    slots:      `[B]` int32, each sequence's row in `transforms`
    q_start:    `[B + 1]` int32, tokens q_start[b] … q_start[b + 1] - 1 belong to sequence b
    positions:  `[T]` int32
    logit_rows: `[R]` int64, ascending
    transforms: the tables; entries for tokens from V on do nothing
    returns     z', `[R, V]` fp32
    """
    owner = torch.searchsorted(q_start, logit_rows.int(), right=True) - 1
    slot, position = slots[owner].long(), positions[logit_rows] + 1
    num_entries, vocab_size = transforms.num_entries[slot], logits.shape[1]
    penalty = rows.repetition_penalty[owner][:, None]
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    history = transforms.history[slot].long()
    is_before = torch.arange(history.shape[1], device=logits.device) < position[:, None]
    seen = torch.where(is_before & (history < vocab_size), history, vocab_size)
    is_seen = torch.zeros(len(slot), vocab_size + 1, dtype=torch.bool, device=logits.device)
    is_seen = is_seen.scatter_(1, seen, True)[:, :vocab_size]
    result = torch.where(is_seen & (penalty != 1), penalised, logits)
    for entry in range(transforms.token.shape[1]):
        token, value, first, end = (each[slot, entry] for each in transforms[2:])
        holds = (entry < num_entries) & (first <= position) & (position < end) & (token < vocab_size)
        place = token.long().clamp_max(vocab_size - 1)[:, None]
        before = result.gather(1, place)
        result.scatter_(1, place, torch.where(holds[:, None], before + value[:, None], before))
    return result
