"""Block verification: exact speculative sampling that judges the drafts of a round together."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.match_verify import judged_sequences
from specengine.kernels.reference.rejection_verify import (
    accept_uniforms,
    commit,
    draft_log_probs,
    log_ratios,
    residual_log_weights,
)
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule


def block_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """Accepts the longest prefix that passes its own test; what follows is drawn from max(P_n p_n - q_n, 0), after full
    acceptance from p_k. The output is distributed as plain sampling, and on average no verification that is given the
    same drafts accepts more.

    Sun et al. 2025, "Block verification accelerates speculative decoding" (arXiv:2403.10444). With P_0 = 1 and
    P_i = min(1, P_{i-1} p_{i-1}(x_{i-1}) / q_{i-1}(x_{i-1})), the share of the prefix x_0 … x_{i-1} that may be kept,
    and Z_i = sum_v max(P_i p_i(v) - q_i(v), 0): the prefix of length i passes if u_{i-1} <= h_i = Z_i / (Z_i + 1 - P_i)
    (0 / 0 = 1), the whole if u_{k-1} <= P_k. A prefix may pass though a shorter one did not: what counts is the last.

    The u_i, the draw, point masses and a residual that rounds to zero are those of `rejection_verify`, and with k = 1
    so is everything else.

    Judges the running sequences whose rule is BLOCK and that draft something; their T is above 0.

    logits, stats, drafts, rows, is_running, verdict: as in `rejection_verify`
    """
    for b in judged_sequences(Rule.BLOCK, drafts, rows, is_running):
        k = int(drafts.num_draft[b])
        temperature, seeds = rows.temperature[b : b + 1], rows.seeds[b : b + 1]
        of_target = slice(int(drafts.row_start[b]), int(drafts.row_start[b]) + k + 1)
        log_p = filtered_log_probs(logits[of_target], temperature.expand(k + 1), stats[of_target])
        log_q = draft_log_probs(drafts, b, temperature, logits)
        log_share = log_p.new_zeros(k + 1)
        for i, log_ratio in enumerate(log_ratios(log_p, drafts, b)):
            kept = log_share[i] + log_ratio
            log_share[i + 1] = torch.where(kept.isnan(), float("-inf"), kept.clamp_max(0.0))
        share = log_share.exp()
        excess = (torch.exp(log_p[:k] + log_share[:k, None]) - log_q.exp()).clamp_min(0.0).sum(dim=1)
        u = accept_uniforms(drafts, seeds, b, logits.dtype)
        passes = torch.ones(k + 1, dtype=torch.bool, device=logits.device)
        passes[1:k] = u[:-1] * (excess[1:] + (1.0 - share[1:k])) <= excess[1:]
        passes[k] = torch.log(u[-1]) <= log_share[k]
        n = int(passes.nonzero().max())
        weight = log_p[n] if n == k else residual_log_weights(log_p[n] + log_share[n], log_q[n])
        position = drafts.seq_len[b : b + 1] + n
        drawn = race(weight[None], seeds, position, rng.STREAM_TARGET, torch.zeros_like(position))
        commit(verdict, b, drafts.tokens[b, :n], drawn[0], stats[of_target])
