"""Threshold verification, which is lossy: a draft that is likely enough is taken for the target's own."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.filter_rows import filtered_log_probs
from specengine.kernels.reference.match_verify import judged_sequences
from specengine.kernels.reference.rejection_verify import commit, drafted_log_probs
from specengine.kernels.reference.sample_rows import race
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule


def threshold_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """Accepts x_i while p_i(x_i) > threshold, and then draws from p_n. NOT distributed as plain sampling: likely tokens
    come as often as the draft says, not as the target says.

    p is the target's distribution after every filter, the threshold the row's acceptance_threshold in [0, 1]: with 0
    whatever p does not exclude is accepted, with 1 nothing, and what is drawn is plain decoding's draw (stream 0).

    Judges the running sequences whose rule is THRESHOLD and that draft something; their T is above 0.

    logits, stats, drafts, rows, is_running, verdict: as in `match_verify`; the law of the drafts is not read
    """
    for b in judged_sequences(Rule.THRESHOLD, drafts, rows, is_running):
        log_p = target_log_probs(logits, stats, drafts, rows, b)
        is_accepted = drafted_log_probs(log_p, drafts, b) > torch.log(rows.acceptance_threshold[b])
        keep_prefix(is_accepted, log_p, stats, drafts, rows, b, verdict)


def target_log_probs(logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, b: int) -> Tensor:
    """log p_i `[k_b + 1, V]` of sequence b."""
    start, count = int(drafts.row_start[b]), int(drafts.num_draft[b]) + 1
    of_target = slice(start, start + count)
    return filtered_log_probs(logits[of_target], rows.temperature[b].expand(count), stats[of_target])


def keep_prefix(
    is_accepted: Tensor,
    log_p: Tensor,
    stats: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    b: int,
    verdict: Verdict,
) -> None:
    """Commits the drafts up to the first that is not accepted `[k_b]`, and a draw from p behind them."""
    n = int(is_accepted.int().cumprod(dim=0).sum())
    position = drafts.seq_len[b : b + 1] + n
    no_base = torch.zeros_like(position)
    drawn = race(log_p[n : n + 1], rows.seeds[b : b + 1], position, rng.STREAM_TARGET, no_base)
    commit(verdict, b, drafts.tokens[b, :n], drawn[0], stats[int(drafts.row_start[b]) :])
