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
    sequence's repetition penalty (Keskar et al., 2019); then of tokens that stand n > 0 times between the prompt and
    this position z becomes z - n f - s, with f and s the frequency and presence penalties (as in OpenAI's API).

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
    history, place = (
        transforms.history[slot].long(),
        torch.arange(transforms.history.shape[1], device=logits.device),
    )
    is_before = place < position[:, None]
    is_generated = is_before & (place >= rows.prompt_length[owner][:, None])
    result = torch.where((_count(history, is_before, vocab_size) > 0) & (penalty != 1), penalised, logits)
    count = _count(history, is_generated, vocab_size)
    frequency, presence = rows.frequency_penalty[owner][:, None], rows.presence_penalty[owner][:, None]
    is_lowered = (count > 0) & ((frequency != 0) | (presence != 0))
    result = torch.where(is_lowered, result - count * frequency - presence, result)
    for entry in range(transforms.token.shape[1]):
        token, value, first, end = (each[slot, entry] for each in transforms[2:6])
        holds = (entry < num_entries) & (first <= position) & (position < end) & (token < vocab_size)
        holds &= _follows(transforms, slot, entry, position)
        place = token.long().clamp_max(vocab_size - 1)[:, None]
        before = result.gather(1, place)
        result.scatter_(1, place, torch.where(holds[:, None], before + value[:, None], before))
    return result


def _follows(transforms: Transforms, slot: Tensor, entry: int, position: Tensor) -> Tensor:
    """Whether each row's entry has its prefix right before the row's position, `[R]` bool."""
    start, length = (each[slot, entry, None] for each in (transforms.prefix_start, transforms.prefix_length))
    offset = torch.arange(transforms.prefix.shape[1], device=slot.device)
    is_part = (offset < length) & (length <= position[:, None])
    wanted = transforms.prefix[slot[:, None], torch.where(is_part, start + offset, 0)]
    found = transforms.history[slot[:, None], torch.where(is_part, position[:, None] - length + offset, 0)]
    return (length[:, 0] <= position) & ((wanted == found) | ~is_part).all(dim=1)


def _count(history: Tensor, is_counted: Tensor, vocab_size: int) -> Tensor:
    """How often each token of the vocabulary stands in a row's `history`, both `[R, L]`, where it counts: `[R, V]`."""
    tokens = torch.where(is_counted & (history < vocab_size), history, vocab_size)
    counts = torch.zeros(len(history), vocab_size + 1, device=history.device)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float32))[:, :vocab_size]
