"""One draw a row from a filtered distribution, by Gumbel race."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import scale_rows
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.statistics import STAT_LOG_NORMALISER, STAT_THRESHOLD


def race(scores: Tensor, seeds: Tensor, positions: Tensor, stream: int, round_base: Tensor) -> Tensor:
    """argmax_v(scores + Gumbel noise) `[R]` int32, lowest id on ties; -inf scores never win."""
    bits = rng.vocabulary_bits(seeds, positions, stream, round_base, scores.shape[1])
    return (scores + rng.gumbel(bits, scores.dtype)).argmax(dim=-1).int()


def sample_rows(
    logits: Tensor,
    stats: Tensor,
    rows: SamplingRows,
    positions: Tensor,
    stream: int,
    round_base: Tensor,
) -> tuple[Tensor, Tensor]:
    """argmax_v(z_v / T + g_v) over the kept tokens (greedy rows: argmax z), and the winner's log-probability.

    logits:     `[R, V]` fp32; not written
    stats:      `[R, 4]` of `filter_rows`
    rows:       `[R]`, of which temperature and seeds are read
    positions:  `[R]` int32, the absolute position of the token being decided
    stream:     a stream of `specengine.rng`
    round_base: `[R]` int32, the fourth counter word
    returns     tokens `[R]` int32, log-probabilities `[R]` fp32 under the filtered distribution (0 if greedy)
    """
    temperature = rows.temperature
    scaled = scale_rows(logits, temperature)
    kept = scaled.masked_fill(scaled < stats[:, STAT_THRESHOLD, None], float("-inf"))
    is_greedy = temperature <= 0
    drawn = race(kept, rows.seeds, positions, stream, round_base)
    tokens = torch.where(is_greedy, scaled.argmax(dim=-1).int(), drawn)
    log_probs = scaled.gather(1, tokens.long()[:, None])[:, 0] - stats[:, STAT_LOG_NORMALISER]
    return tokens, torch.where(is_greedy, torch.zeros_like(log_probs), log_probs)
