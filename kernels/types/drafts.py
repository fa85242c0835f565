"""What is judged, by which law it was drawn, and what was decided."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DraftLaw(NamedTuple):
    """The law that drafts were really drawn from, after every filter.

    log_probs: `[B, k]` fp32, log q_i(x_i)
    logits:    `[B, k, Vd]` fp32 that x was drawn from
    stats:     `[B, k, 4]` of `filter_rows` on them
    has_law:   `[B]` bool, the sequences whose drafts were drawn from it; the others' are point masses. None: all
    """

    log_probs: Tensor
    logits: Tensor
    stats: Tensor
    has_law: Tensor | None = None


class Drafts(NamedTuple):
    """The drafts x of B sequences, to be judged by rows of the target's. Row row_start[b] + i, i = 0 … num_draft[b],
    decides position seq_len[b] + i of sequence b, where its draft i was to stand.

    row_start: `[B]` int32
    seq_len:   `[B]` int32, committed tokens
    num_draft: `[B]` int32, k_b in 0 … k
    tokens:    `[B, k]` int32, x
    law:       what they were drawn from; None: they are point masses
    """

    row_start: Tensor
    seq_len: Tensor
    num_draft: Tensor
    tokens: Tensor
    law: DraftLaw | None = None


class Staging(NamedTuple):
    """Where draws go as draft `step` of the sequences that draft; see the `stage_draft` op, in its order."""

    step: int
    tokens: Tensor
    slots: Tensor
    seq_len: Tensor
    is_drafting: Tensor
    draft_tokens: Tensor
    num_draft: Tensor


class Verdict(NamedTuple):
    """What was decided of B sequences; written where a sequence was judged, else left alone.

    tokens:       `[B, k + 1]` int32, written up to column num_accepted[b]: the accepted drafts, then the next token
    num_accepted: `[B]` int32
    error:        `[B]` int32, 1 if a row that was used is not a distribution
    """

    tokens: Tensor
    num_accepted: Tensor
    error: Tensor
