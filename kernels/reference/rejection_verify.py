"""Rejection verification: exact speculative sampling with the residual distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.statistics import STAT_ERROR


def rejection_verify(
    logits: Tensor,
    stats: Tensor,
    row_start: Tensor,
    num_draft: Tensor,
    draft_tokens: Tensor,
    draft_log_probs: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    seq_len: Tensor,
    is_selected: Tensor,
    tokens: Tensor,
    num_accepted: Tensor,
    error: Tensor,
) -> None:
    """Accepts x_i while ln u_i <= log p_i(x_i) - log q_i(x_i); at the first rejection draws from
    max(p_n - q_n, 0), after full acceptance from p_k. The output is distributed as plain sampling.

    Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). The draw is the exponential
    race argmax_v log w_v + g_v on stream 0, which needs no normaliser; a residual that rounds to zero
    everywhere falls back to p. Without draft logits the proposal is a point mass: the residual is p without
    x_n. Where p = q a token is always accepted, where p = 0 never.

    logits:          `[R, V]` fp32; rows row_start[b] + i, i = 0 … num_draft[b], belong to sequence b; not written
    stats:           `[R, 4]` of `filter_rows`
    row_start:       `[B]` int32
    num_draft:       `[B]` int32, k_b in 0 … k
    draft_tokens:    `[B, k]` int32, x
    draft_log_probs: `[B, k]` fp32, log q_i(x_i) under the law x_i was really drawn from
    draft_logits:    `[B, k, Vd]` fp32 that x was drawn from, or None: point mass
    draft_stats:     `[B, k, 4]` of `filter_rows` on the draft's logits, or None
    temperature, seeds: `[B]` fp32 (> 0 where selected), int64
    seq_len:         `[B]` int32, committed tokens: row i decides position seq_len[b] + i; also the round base
    is_selected:     `[B]` bool; the other rows of the outputs are left alone
    tokens, num_accepted, error: as in `match_verify`
    """
    for b in is_selected.nonzero()[:, 0].tolist():
        k = int(num_draft[b])
        rows = slice(int(row_start[b]), int(row_start[b]) + k + 1)
        log_p = filtered_log_probs(logits[rows], temperature[b].expand(k + 1), stats[rows])
        positions = seq_len[b] + torch.arange(k + 1, device=logits.device, dtype=torch.int32)
        base = seq_len[b].expand(k)
        u = rng.uniform(rng.accept_bits(seeds[b].expand(k), positions[:k], base), logits.dtype)
        chosen = draft_tokens[b, :k].long()
        log_ratio = log_p[:k].gather(1, chosen[:, None])[:, 0] - draft_log_probs[b, :k].to(logits.dtype)
        is_accepted = torch.log(u) <= log_ratio
        n = int(is_accepted.int().cumprod(dim=0).sum())
        weight = log_p[n]
        if n < k:
            if draft_logits is None or draft_stats is None:
                log_q = torch.full_like(weight, float("-inf"))
                log_q[chosen[n]] = 0.0
            else:
                log_q = filtered_log_probs(
                    draft_logits[b, n : n + 1], temperature[b : b + 1], draft_stats[b, n : n + 1]
                )[0]
                log_q = F.pad(log_q, (0, max(0, weight.numel() - log_q.numel())), value=float("-inf"))
            weight = residual_log_weights(weight, log_q[: weight.numel()])
        no_base = torch.zeros_like(positions[:1])
        drawn = race(weight[None], seeds[b : b + 1], positions[n : n + 1], rng.STREAM_TARGET, no_base)
        tokens[b, :n] = draft_tokens[b, :n]
        tokens[b, n] = drawn[0]
        num_accepted[b] = n
        error[b] = stats[rows][: n + 1, STAT_ERROR].any().int()


def residual_log_weights(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log max(p - q, 0) `[V]`, or log p where the residual is zero everywhere by rounding."""
    residual = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    return torch.where(residual.sum() > 0, torch.log(residual), log_p)
