"""Another model's vocabulary in terms of the target's: which tokens are the same, and what stands for the others.

Tokens match by the bytes that they stand for, never by id. A draft model is renumbered with this as it is loaded
(`specengine.models.weights`): its table and head get one row for each of the target's ids, in the target's order.
From then on it reads and proposes the target's ids, and nothing is translated while it runs.

Where it has too few of the target's tokens for that, it drafts in tokens of its own, and only text goes between the two
(`specengine.drafters.retokenized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.tokenizer import REPLACEMENT, Tokenizer, Vocabulary, num_usable_ids

# The least share of the target's tokens that a draft must have to be renumbered. What it has not it never proposes, and
# reads as a mean of pieces; but what it proposes is drawn from its law, at the price of its forward alone.
MIN_SHARED = 0.25


Rows = Tensor | GroupedWeight


@dataclass(frozen=True)
class ByText:
    """Too little is shared: num_shared of the target's num_tokens."""

    num_shared: int
    num_tokens: int


@dataclass(frozen=True)
class Translation:
    """A draft's ids for each of the target's.

    shared:  by the target's id, the draft's id of the same token; None: it has none, and never proposes it
    spelled: the draft's own ids of a target's token that it has none for: it is fed the mean of their rows
    """

    shared: tuple[int | None, ...]
    spelled: Mapping[int, tuple[int, ...]]

    @property
    def num_shared(self) -> int:
        """Tokens that both have."""
        return sum(token is not None for token in self.shared)

    def table(self, rows: Tensor) -> Tensor:
        """The draft's table `[V_draft, D]` as the target's ids read it, `[V, D]`."""
        renumbered = numbers(self._gather(rows))
        for token, pieces in self.spelled.items():
            renumbered[token] = rows[list(pieces)].double().mean(dim=0).to(rows.dtype)
        return renumbered

    def head(self, rows: Rows) -> Rows:
        """The draft's head `[V_draft, D]` by the target's ids, `[V, D]`; `head_bias` is to take out the others."""
        return self._gather(rows)

    def head_bias(self) -> Tensor | None:
        """`[V]` fp32 that leaves the shared tokens: 0, and -inf for tokens that the draft has not. None: it has all."""
        if self.num_shared == len(self.shared):
            return None
        return torch.tensor([0.0 if token is not None else float("-inf") for token in self.shared])

    def _gather(self, rows: Rows) -> Rows:
        return rows[
            torch.tensor([0 if token is None else token for token in self.shared], device=rows.device)
        ]


def translate(target: Vocabulary, draft: Vocabulary) -> Translation | ByText | None:
    """What makes a draft speak the target's vocabulary, or None: it does already, or there is nothing to compare but
    sizes, which is `check_compatible`'s."""
    mine, other = target.tokenizer, draft.tokenizer
    if mine is None or other is None or mine.vocabulary_fingerprint == other.vocabulary_fingerprint:
        return None
    num_ids, num_draft_ids = num_usable_ids(target), num_usable_ids(draft)
    as_bytes = mine.spells_bytes and other.spells_bytes
    spellings, draft_spellings = mine.spellings(as_bytes=as_bytes), other.spellings(as_bytes=as_bytes)
    known = {spelling: token for token, spelling in draft_spellings.items() if token < num_draft_ids}
    shared = [known.get(spellings[token]) if token in spellings else None for token in range(num_ids)]
    num_shared = sum(token is not None for token in shared)
    num_tokens = sum(token in spellings for token in range(num_ids))
    if num_shared < MIN_SHARED * num_tokens:
        return ByText(num_shared, num_tokens)
    _pair_ends(shared, mine, other, num_draft_ids)
    missing = [token for token in spellings if token < num_ids and shared[token] is None]
    return Translation(tuple(shared), _spell(missing, mine, other, num_draft_ids))


def _pair_ends(shared: list[int | None], target: Tokenizer, draft: Tokenizer, num_draft_ids: int) -> None:
    """The tokens that end a text mean the same, however they are called."""
    end, draft_end = target.eos_token_id, draft.eos_token_id
    if end is None or draft_end is None or end >= len(shared) or draft_end >= num_draft_ids:
        return
    if shared[end] is None and draft_end not in shared:
        shared[end] = draft_end


def _spell(
    missing: list[int], target: Tokenizer, draft: Tokenizer, num_draft_ids: int
) -> dict[int, tuple[int, ...]]:
    """The draft's ids of the text of each of these tokens. What has no text of its own is an end of text, if any."""
    end = draft.eos_token_id
    instead = (end,) if end is not None and end < num_draft_ids else (0,)
    spelled = {}
    for token in missing:
        text = target.decode((token,))
        ids = draft.encode_piece(text) if REPLACEMENT not in text else ()
        spelled[token] = ids if ids and max(ids) < num_draft_ids else instead
    return spelled
