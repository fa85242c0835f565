"""Match verification: the target's own draw decides; a draft token survives if it is that draw."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine import rng
from specengine.kernels.reference.sample_rows import sample_rows
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.kernels.types.statistics import STAT_ERROR


def match_verify(
    logits: Tensor, stats: Tensor, drafts: Drafts, rows: SamplingRows, is_running: Tensor, verdict: Verdict
) -> None:
    """t_i = the target's draw at row i; n = the first i with x_i != t_i, else k_b; emits x_0 … x_{n-1}, t_n.

    Greedy (T = 0) draws the argmax, otherwise the Gumbel race on stream 0 at position seq_len[b] + i: what is
    emitted is what plain decoding with the same seed emits, whatever was drafted.

    Judges the running sequences whose rule is MATCH, and those that draft nothing.

    logits:     `[R, V]` fp32; not written
    stats:      `[R, 4]` of `filter_rows`
    drafts:     what is judged; their law is not read
    rows:       `[B]`, by sequence
    is_running: `[B]` int32
    verdict:    written for the sequences that are judged
    """
    for b in judged_sequences(Rule.MATCH, drafts, rows, is_running):
        k = int(drafts.num_draft[b])
        of_target = slice(int(drafts.row_start[b]), int(drafts.row_start[b]) + k + 1)
        positions = drafts.seq_len[b] + torch.arange(k + 1, device=logits.device, dtype=torch.int32)
        drawn, _ = sample_rows(
            logits[of_target],
            stats[of_target],
            rows.take(torch.full((k + 1,), b)),
            positions,
            rng.STREAM_TARGET,
            torch.zeros_like(positions),
        )
        is_match = drawn[:k] == drafts.tokens[b, :k]
        n = int(is_match.int().cumprod(dim=0).sum())
        verdict.tokens[b, : n + 1] = drawn[: n + 1]
        verdict.num_accepted[b] = n
        verdict.error[b] = stats[of_target][: n + 1, STAT_ERROR].any().int()


def judged_sequences(rule: Rule, drafts: Drafts, rows: SamplingRows, is_running: Tensor) -> list[int]:
    """The running sequences that a rule judges: those that ask for it; MATCH also those that draft nothing."""
    rules = torch.where(drafts.num_draft > 0, rows.rule, int(Rule.MATCH))
    judged: list[int] = ((rules == rule) & (is_running != 0)).nonzero()[:, 0].tolist()
    return judged
