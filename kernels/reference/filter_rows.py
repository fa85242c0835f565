"""Temperature, top-k, top-p and min-p as one threshold a row."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.statistics import STAT_LOG_NORMALISER, STAT_THRESHOLD


def sanitise(logits: Tensor) -> Tensor:
    """NaN -> -inf, +inf -> 3e38: the values every verification op works with."""
    return torch.nan_to_num(logits, nan=float("-inf"), posinf=3e38, neginf=float("-inf"))


def scale_rows(logits: Tensor, temperature: Tensor) -> Tensor:
    """z / T, sanitised after the division; greedy rows (T = 0) are left unscaled."""
    divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    return sanitise(logits / divisor.to(logits.dtype)[:, None])


def filter_rows(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Each row's filtered distribution as (max, threshold, log-normaliser, error).

    Token v is kept iff z_v / T >= threshold (ties at the threshold are kept), and its log-probability is
    z_v / T - log-normaliser. The order is temperature, top-k, top-p (on the mass top-k kept, the smallest
    set of the most likely tokens that reaches top_p), min-p (p_v >= min_p * p_max).

    logits:  `[R, V]` fp32, pad columns -inf; not written
    rows:    `[R]`, of which are read
             temperature: 0 means greedy: no filter, T = 1 in the statistics
             top_k:       0 = off
             top_p:       in (0, 1], 1 = off
             min_p:       in [0, 1], 0 = off
    returns  `[R, 4]` fp32: max, threshold (-inf = keep all), log-normaliser, error (1 where the row
                 holds a NaN or nothing finite, else 0)
    """
    temperature = rows.temperature
    scaled = scale_rows(logits, temperature)
    is_bad = torch.isnan(logits).any(dim=-1) | (scaled == float("-inf")).all(dim=-1)
    maximum = scaled.max(dim=-1).values
    threshold = torch.full_like(maximum, float("-inf"))
    descending = scaled.double().sort(dim=-1, descending=True).values
    for row in range(logits.shape[0]):
        if temperature[row] > 0 and not is_bad[row]:
            threshold[row] = _row_threshold(
                descending[row], int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row])
            )
    kept = scaled.masked_fill(scaled < threshold[:, None], float("-inf"))
    log_normaliser = torch.logsumexp(kept.double(), dim=-1).to(logits.dtype)
    return torch.stack((maximum, threshold, log_normaliser, is_bad.to(logits.dtype)), dim=-1)


def _row_threshold(descending: Tensor, top_k: int, top_p: float, min_p: float) -> float:
    threshold = float("-inf")
    if 0 < top_k < descending.numel():
        threshold = float(descending[top_k - 1])
    if top_p < 1.0:
        kept = descending[descending >= threshold]
        mass_before = kept.softmax(dim=-1).cumsum(dim=-1).roll(1)
        mass_before[0] = 0.0
        threshold = max(threshold, float(kept[mass_before < top_p][-1]))
    if min_p > 0.0:
        # The comparison is on fp32 values: round the bound as the kernels do.
        bound = torch.tensor(float(descending[0]) + float(torch.tensor(min_p).double().log()))
        threshold = max(threshold, float(bound))
    return threshold


def filtered_log_probs(logits: Tensor, temperature: Tensor, stats: Tensor) -> Tensor:
    """log p `[R, V]` of the filtered rows: -inf outside the support. Greedy rows are one-hot at the lowest argmax."""
    scaled = scale_rows(logits, temperature)
    log_probs = scaled - stats[:, STAT_LOG_NORMALISER, None]
    log_probs = log_probs.masked_fill(scaled < stats[:, STAT_THRESHOLD, None], float("-inf"))
    one_hot = torch.full_like(log_probs, float("-inf"))
    one_hot.scatter_(1, scaled.argmax(dim=-1, keepdim=True), 0.0)
    return torch.where(temperature[:, None] > 0, log_probs, one_hot)
