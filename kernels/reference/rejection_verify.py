"""Rejection verification: exact speculative sampling with the residual distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.match_verify import judged_sequences
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.kernels.types.statistics import STAT_ERROR


def rejection_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """Accepts x_i while ln u_i <= log p_i(x_i) - log q_i(x_i); at the first rejection draws from
    max(p_n - q_n, 0), after full acceptance from p_k. The output is distributed as plain sampling.

    Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). The draw is the exponential
    race argmax_v log w_v + g_v on stream 0, which needs no normaliser; a residual that rounds to zero
    everywhere falls back to p. Drafts without a law are point masses: log q_i(x_i) = 0, the residual is p without
    x_n. Where p = q a token is always accepted, where p = 0 never.

    Judges the running sequences whose rule is REJECTION and that draft something; their T is above 0. The round base
    is seq_len[b].

    logits, stats, drafts, rows, is_running, verdict: as in `match_verify`, and the law of the drafts is read
    """
    for b in judged_sequences(Rule.REJECTION, drafts, rows, is_running):
        k, law = int(drafts.num_draft[b]), drafts.law
        if law is not None and law.has_law is not None and not law.has_law[b]:
            law = None
        temperature, seeds = rows.temperature[b : b + 1], rows.seeds[b : b + 1]
        of_target = slice(int(drafts.row_start[b]), int(drafts.row_start[b]) + k + 1)
        log_p = filtered_log_probs(logits[of_target], temperature.expand(k + 1), stats[of_target])
        positions = drafts.seq_len[b] + torch.arange(k + 1, device=logits.device, dtype=torch.int32)
        base = drafts.seq_len[b].expand(k)
        u = rng.uniform(rng.accept_bits(seeds.expand(k), positions[:k], base), logits.dtype)
        chosen = drafts.tokens[b, :k].long()
        log_ratio = log_p[:k].gather(1, chosen[:, None])[:, 0]
        if law is not None:
            log_ratio = log_ratio - law.log_probs[b, :k].to(logits.dtype)
        is_accepted = torch.log(u) <= log_ratio
        n = int(is_accepted.int().cumprod(dim=0).sum())
        weight = log_p[n]
        if n < k:
            if law is None:
                log_q = torch.full_like(weight, float("-inf"))
                log_q[chosen[n]] = 0.0
            else:
                log_q = filtered_log_probs(law.logits[b, n : n + 1], temperature, law.stats[b, n : n + 1])[0]
                log_q = F.pad(log_q, (0, max(0, weight.numel() - log_q.numel())), value=float("-inf"))
            weight = residual_log_weights(weight, log_q[: weight.numel()])
        no_base = torch.zeros_like(positions[:1])
        drawn = race(weight[None], seeds, positions[n : n + 1], rng.STREAM_TARGET, no_base)
        verdict.tokens[b, :n] = drafts.tokens[b, :n]
        verdict.tokens[b, n] = drawn[0]
        verdict.num_accepted[b] = n
        verdict.error[b] = stats[of_target][: n + 1, STAT_ERROR].any().int()


def residual_log_weights(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log max(p - q, 0) `[V]`, or log p where the residual is zero everywhere by rounding."""
    residual = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    return torch.where(residual.sum() > 0, torch.log(residual), log_p)
