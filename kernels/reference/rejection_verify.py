"""Rejection verification: exact speculative sampling with the residual distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.match_verify import judged_sequences
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.drafts import DraftLaw, Drafts, Verdict
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
        k = int(drafts.num_draft[b])
        temperature, seeds = rows.temperature[b : b + 1], rows.seeds[b : b + 1]
        of_target = slice(int(drafts.row_start[b]), int(drafts.row_start[b]) + k + 1)
        log_p = filtered_log_probs(logits[of_target], temperature.expand(k + 1), stats[of_target])
        is_accepted = torch.log(accept_uniforms(drafts, seeds, b, logits.dtype)) <= log_ratios(
            log_p, drafts, b
        )
        n = int(is_accepted.int().cumprod(dim=0).sum())
        weight = log_p[n]
        if n < k:
            weight = residual_log_weights(weight, draft_log_probs(drafts, b, temperature, logits)[n])
        position = drafts.seq_len[b : b + 1] + n
        drawn = race(weight[None], seeds, position, rng.STREAM_TARGET, torch.zeros_like(position))
        commit(verdict, b, drafts.tokens[b, :n], drawn[0], stats[of_target])


def law_of(drafts: Drafts, b: int) -> DraftLaw | None:
    """What the drafts of sequence b were drawn from; None: they are point masses."""
    law = drafts.law
    return None if law is None or (law.has_law is not None and not law.has_law[b]) else law


def accept_uniforms(drafts: Drafts, seeds: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """u_i `[k_b]` of sequence b, whose seed is seeds `[1]`."""
    k = int(drafts.num_draft[b])
    positions = drafts.seq_len[b] + torch.arange(k, device=seeds.device, dtype=torch.int32)
    return rng.uniform(rng.accept_bits(seeds.expand(k), positions, drafts.seq_len[b].expand(k)), dtype)


def log_ratios(log_p: Tensor, drafts: Drafts, b: int) -> Tensor:
    """log p_i(x_i) - log q_i(x_i) `[k_b]` of sequence b. log_p: `[k_b + 1, V]`"""
    law, drafted = law_of(drafts, b), drafted_log_probs(log_p, drafts, b)
    return drafted if law is None else drafted - law.log_probs[b, : drafted.numel()].to(log_p.dtype)


def drafted_log_probs(log_p: Tensor, drafts: Drafts, b: int) -> Tensor:
    """log p_i(x_i) `[k_b]` of sequence b. log_p: `[k_b + 1, V]`"""
    k = int(drafts.num_draft[b])
    return log_p[:k].gather(1, drafts.tokens[b, :k].long()[:, None])[:, 0]


def draft_log_probs(drafts: Drafts, b: int, temperature: Tensor, logits: Tensor) -> Tensor:
    """log q_i `[k_b, V]` of sequence b, as wide as the target's logits; of a point mass, 0 at its token."""
    k, vocab_size, law = int(drafts.num_draft[b]), logits.shape[1], law_of(drafts, b)
    if law is None:
        log_q = logits.new_full((k, vocab_size), float("-inf"))
        return log_q.scatter_(1, drafts.tokens[b, :k].long()[:, None], 0.0)
    log_q = filtered_log_probs(law.logits[b, :k], temperature.expand(k), law.stats[b, :k])
    return F.pad(log_q, (0, max(0, vocab_size - log_q.shape[1])), value=float("-inf"))[:, :vocab_size]


def commit(verdict: Verdict, b: int, accepted: Tensor, next_token: Tensor, stats: Tensor) -> None:
    """Writes what was decided of sequence b: accepted drafts `[n]`, and the token that follows. stats: its rows'"""
    n = accepted.numel()
    verdict.tokens[b, :n] = accepted
    verdict.tokens[b, n] = next_token
    verdict.num_accepted[b] = n
    verdict.error[b] = stats[: n + 1, STAT_ERROR].any().int()


def residual_log_weights(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log max(p - q, 0) `[V]`, or log p where the residual is zero everywhere by rounding."""
    residual = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    return torch.where(residual.sum() > 0, torch.log(residual), log_p)
