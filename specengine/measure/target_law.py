"""The target's own law of the next token, as exact as its logits: what samples are compared with.

The target, decoding plainly, is led along texts, and what it says of each next token (after penalties, biases, bans and
the caller's own `logits_processor`) becomes a distribution here, in float64 and by filters that share no code with the
engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.measure.runs import generate

Beginning = tuple[int, ...]
# The engine filters in fp32: a token this near to the edge of a filter, relatively, may lie on either side of it.
_EDGE = 1e-4


@dataclass(frozen=True)
class NextLaw:
    """Of one next token.

    probs:   `[V]` float64
    allowed: `[V]` bool: what may be drawn at all, tokens at the very edge of a filter included
    """

    probs: Tensor
    allowed: Tensor

    def place(self, token: int, chance: float, drafted: Mapping[int, int]) -> float | None:
        """Where a token lies in a row of all of them, as a number from 0 to 1; None for one that cannot be.

        It is the mass of those before it and `chance`, uniform in [0, 1), of its own. Of samples of this law that is
        uniform, whatever the law and whatever the order, as long as neither depends on the sample (Rosenblatt 1952).
        First come those that were drafted more often than they are likely: what a drafter adds where it should not
        shows most there. Then the likeliest.

        drafted: how often tokens were drafted here, for other samples
        """
        if not self.allowed[token]:
            return None
        probs, ids = self.probs, torch.arange(len(self.probs))
        excess = torch.zeros_like(probs)
        for draft, count in drafted.items():
            if probs[draft] > 0:
                excess[draft] = count / probs[draft]
        is_equal = excess == excess[token]
        is_likelier = (probs > probs[token]) | ((probs == probs[token]) & (ids < token))
        before = probs[(excess > excess[token]) | (is_equal & is_likelier)].sum()
        return min(max(float(before + chance * probs[token]), 0.0), 1.0)


def next_law(logits: Tensor, params: SamplingParams) -> NextLaw:
    """What is drawn from after temperature, top-k, top-p (on what top-k kept) and min-p; ties are kept together.

    logits: `[V]`, after every transform
    """
    scaled = logits.double() / params.temperature
    probs = scaled.softmax(dim=0)
    if not params.has_filters:
        return NextLaw(probs, probs > 0)
    ranked, order = probs.sort(descending=True)

    def kept(edge: float) -> Tensor:
        keeps = torch.ones_like(ranked, dtype=torch.bool)
        if 0 < params.top_k < len(ranked):
            keeps &= ranked >= ranked[params.top_k - 1] * (1 - edge)
        if params.top_p < 1.0:
            mass = ranked * keeps / (ranked * keeps).sum()
            is_needed = mass.cumsum(dim=0) - mass < params.top_p * (1 + edge)
            keeps &= ranked >= ranked[is_needed].min() * (1 - edge)
        keeps &= ranked >= params.min_p * ranked[0] * (1 - edge)
        return keeps & (ranked > 0)

    filtered, allowed = torch.zeros_like(probs), torch.zeros_like(probs, dtype=torch.bool)
    filtered[order] = ranked * kept(0.0)
    allowed[order] = kept(_EDGE)
    return NextLaw(filtered / filtered.sum(), allowed)


def lead_along(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    texts: Collection[Beginning],
    use: Callable[[Beginning, Tensor], None],
) -> None:
    """Calls `use` with every beginning of every text, once, from nothing to the whole text, and with the target's
    logits `[V]` of the token after it, in its own plain decoding.

    An end (EOS, a stop) does not end a text here: what is compared with this must ignore it.

    Raises `SpecEngineError` where the logits are no distribution.
    """
    seen: set[Beginning] = set()

    def lead(text: Beginning) -> Callable[[list[int], Tensor], Tensor]:
        def process(token_ids: list[int], logits: Tensor) -> Tensor:
            at = len(token_ids) - len(prompt)
            if text[:at] not in seen:
                seen.add(text[:at])
                use(text[:at], logits.cpu())
            led = logits
            if at < len(text):
                led = torch.full_like(logits, float("-inf"))
                led[text[at]] = 0.0
            return led

        return process

    each = [
        replace(
            to_length(params, len(text) + 1),
            temperature=0.0,
            num_speculative_tokens=0,
            acceptance="auto",
            logits_processor=(*params.logits_processor, lead(text)),
        )
        for text in texts
    ]
    generate(engine, [prompt] * len(each), each)


def to_length(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    """The same, but that nothing ends the text before this length, and that only tokens are asked for."""
    return replace(
        params,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(params.min_new_tokens, max_new_tokens),
        stop=None,
        stop_token_ids=None,
        ignore_eos=True,
        logprobs=None,
        prompt_logprobs=None,
        return_rounds=False,
        n=1,
    )
