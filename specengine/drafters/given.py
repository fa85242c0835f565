"""What a caller's drafter has proposed, as the engine wants it: cut and converted, or refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specengine.drafters.base import DraftProposal
from specengine.runtime.state import RunningBatch

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NUM_STATS = 4


def take_proposal(proposal: object, batch: RunningBatch, *, name: str, vocab_size: int) -> DraftProposal:
    """The proposal on the batch's device, tokens and counts int32, the law fp32, cut to what each row may draft.

    Raises `TypeError` for what is no proposal, `ValueError` for one that cannot be; both name the drafter.
    """
    who = f"drafter {name!r}"
    if not isinstance(proposal, DraftProposal):
        raise TypeError(f"{who}: propose must return a DraftProposal, got {reprlib.repr(proposal)}")
    device = batch.slots.device
    tokens = _tensor(f"{who}: tokens", proposal.tokens, _INTEGERS, device)
    num_tokens = _tensor(f"{who}: num_tokens", proposal.num_tokens, _INTEGERS, device)
    if tokens.dim() != 2 or tokens.shape[0] != batch.size or num_tokens.shape != (batch.size,):
        raise ValueError(
            f"{who}: tokens must be [{batch.size}, k] and num_tokens [{batch.size}], "
            f"got {list(tokens.shape)} and {list(num_tokens.shape)}"
        )
    width = tokens.shape[1]
    if bool(((num_tokens < 0) | (num_tokens > width)).any()):
        raise ValueError(
            f"{who}: num_tokens must be 0 … {width}, the width of tokens, got {num_tokens.tolist()}"
        )
    taken = min(width, batch.k)
    tokens, num_tokens = tokens[:, :taken], torch.minimum(num_tokens.int(), batch.max_draft)
    is_used = torch.arange(taken, device=device) < num_tokens[:, None]
    is_outside = ((tokens < 0) | (tokens >= vocab_size)) & is_used
    if bool(is_outside.any()):
        raise ValueError(
            f"{who} proposed token id {int(tokens[is_outside][0])}, outside 0 … {vocab_size - 1}"
        )
    # What nobody reads of the tokens may be anything, and too large for 32 bits.
    plain = DraftProposal(torch.where(is_used, tokens, 0).int(), num_tokens)
    return _with_law(plain, proposal, is_used, width, who)


def _with_law(
    plain: DraftProposal, proposal: DraftProposal, is_used: Tensor, width: int, who: str
) -> DraftProposal:
    """The plain proposal with the law of the given one, if it has any."""
    given = (proposal.log_probs, proposal.logits, proposal.stats)
    if len({part is None for part in given}) > 1:
        raise ValueError(f"{who}: log_probs, logits and stats must be given together or not at all")
    count, taken = is_used.shape
    if proposal.logits is None or not taken:
        return plain
    device = is_used.device
    log_probs, logits, stats = (
        _tensor(f"{who}: {label}", part, _FLOATS, device).float()
        for label, part in zip(("log_probs", "logits", "stats"), given, strict=True)
    )
    vocab = logits.shape[-1] if logits.dim() else 0
    shapes = ((count, width), (count, width, vocab), (count, width, _NUM_STATS))
    found = (log_probs.shape, logits.shape, stats.shape)
    if found != shapes or not vocab:
        raise ValueError(
            f"{who}: log_probs, logits and stats must be [{count}, {width}], [{count}, {width}, V] and "
            f"[{count}, {width}, {_NUM_STATS}], got {', '.join(str(list(shape)) for shape in found)}; a law for "
            "some rows only is given by has_law, or DraftProposal.combine"
        )
    has_law = None
    if proposal.has_law is not None:
        has_law = _tensor(f"{who}: has_law", proposal.has_law, (torch.bool, *_INTEGERS), device) != 0
        if has_law.shape != (count,):
            raise ValueError(f"{who}: has_law must be [{count}], got {list(has_law.shape)}")
        is_used = is_used & has_law[:, None]
    log_probs, logits, stats = log_probs[:, :taken], logits[:, :taken], stats[:, :taken]
    _check_numbers(who, is_used, log_probs, logits, stats)
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    return replace(plain, log_probs=log_probs, logits=logits, stats=stats, has_law=has_law)


def _check_numbers(who: str, is_used: Tensor, log_probs: Tensor, logits: Tensor, stats: Tensor) -> None:
    """-inf stands for probability 0: in logits, never as what a proposed token was drawn with."""
    is_wrong = ~log_probs.isfinite()
    if bool((is_wrong & is_used).any()):
        raise ValueError(
            f"{who}: log_probs of proposed tokens must be finite, got {float(log_probs[is_wrong & is_used][0])}"
        )
    for label, values in (("logits", logits), ("stats", stats)):
        is_wrong = (values.isnan() | (values == float("inf"))) & is_used[:, :, None]
        if bool(is_wrong.any()):
            raise ValueError(f"{who}: {label} must not hold {float(values[is_wrong][0])}")


def _tensor(what: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device) -> Tensor:
    """A tensor of one of these types, on `device`."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout != torch.strided:
        shown = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else reprlib.repr(value)
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{what} must be a tensor of {names}, got {shown}")
    try:
        return value.detach().to(device)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{what} cannot be moved from {value.device} to {device}: {error}") from error
