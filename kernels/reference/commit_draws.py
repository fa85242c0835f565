"""Match verification of draws that the target has made already, and the commit of what it emits."""

from __future__ import annotations

from torch import Tensor

from specengine.kernels.reference.commit_round import commit_round
from specengine.kernels.reference.match_draws import match_draws
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import SamplingRows


def commit_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    tokens: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    slots: Tensor,
    forced_acceptance: float | None = None,
) -> Tensor:
    """`match_draws`, then `commit_round` of its verdict, from drafts.seq_len on.

    drawn … verdict, forced_acceptance: as in `match_draws`
    tokens, seq_len, length_limit, slots: as in `commit_round`, the first three written
    returns       the record of `commit_round`; its tokens of a sequence that does not run are anything
    """
    match_draws(drawn, drawn_error, drafts, rows, is_running, verdict, forced_acceptance)
    state = (tokens, seq_len, length_limit)
    judged = (verdict.tokens, verdict.num_accepted, drafts.num_draft, verdict.error)
    return commit_round(*state, slots, drafts.seq_len, is_running, *judged)
