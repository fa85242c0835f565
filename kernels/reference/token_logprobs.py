"""Raw log-probabilities: of given tokens and of the most likely ones."""

from __future__ import annotations

import torch
from torch import Tensor

from specengine.kernels.reference.filter_rows import sanitise


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(z)[token], and the `num_top` largest with their ids (ties: lowest id first).

    logits:    `[R, V]` fp32, before temperature and filters; not written
    token_ids: `[R]` int32
    returns    `[R]` fp32, `[R, num_top]` int32, `[R, num_top]` fp32
    """
    clean = sanitise(logits)
    log_probs = clean - torch.logsumexp(clean.double(), dim=-1, keepdim=True).to(logits.dtype)
    chosen = log_probs.gather(1, token_ids.long()[:, None])[:, 0]
    order = clean.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return chosen, order.int(), log_probs.gather(1, order)
