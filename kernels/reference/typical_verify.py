"""Typical verification, which is lossy: a draft may be the less likely, the less certain the target is."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.reference.match_verify import judged_sequences
from specengine.kernels.reference.rejection_verify import drafted_log_probs
from specengine.kernels.reference.threshold_verify import keep_prefix, target_log_probs
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule


def typical_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """Accepts x_i while p_i(x_i) > min(epsilon, delta exp(-H(p_i))), and then draws from p_n. NOT distributed as plain
    sampling.

    Cai et al. 2024, "Medusa" (arXiv:2401.10774), typical acceptance. p is the target's distribution after every filter,
    H its entropy -sum_v p(v) ln p(v); epsilon is the row's acceptance_threshold, delta its acceptance_delta, both in
    [0, 1]. What is drawn is plain decoding's draw.

    Judges the running sequences whose rule is TYPICAL and that draft something; their T is above 0.

    logits, stats, drafts, rows, is_running, verdict: as in `threshold_verify`
    """
    for b in judged_sequences(Rule.TYPICAL, drafts, rows, is_running):
        log_p = target_log_probs(logits, stats, drafts, rows, b)
        entropy = -torch.where(log_p == float("-inf"), 0.0, log_p.exp() * log_p).sum(dim=1)[:-1]
        bound = torch.log(rows.acceptance_delta[b]) - entropy
        bound = torch.minimum(bound, torch.log(rows.acceptance_threshold[b]))
        keep_prefix(drafted_log_probs(log_p, drafts, b) > bound, log_p, stats, drafts, rows, b, verdict)
