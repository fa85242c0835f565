"""Several drafters at once: every row of a round is drafted for by one of them, or by a model and then a lookup.

Which one that is, and how many of a row's drafts a model makes before a lookup goes on, is read from the sequences
(`Sequence.way`, `Sequence.num_own_drafts`), and chosen elsewhere. A round whose rows agree on one drafter is that
drafter's own, recordings included. Every other round runs from Python: each drafter is asked for its rows, and what
comes back is put together. Where a lookup goes on, the model's drafts have to be read from the device first.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Collection
from contextlib import ExitStack

import torch
from torch import Tensor

from specengine.drafters.base import DraftProposal, DraftSource, RoundDrafter, RowResult, Way
from specengine.drafters.host import HostDrafter
from specengine.runtime.sequence import Sequence
from specengine.runtime.state import BatchState, RunningBatch

_NO_LIMIT = 2**31 - 1


class SeveralDrafters:
    """Drafters as one.

    parts: the drafters, in the list's order
    lookups: by place, those that can be asked at once what they have for a sequence (`HostDrafter.follow`)
    ways:  every part alone, in that order; then every part that drafts with a model, with every `LookupDrafter` behind
           it
    draft_positions: those of the part that drafts in the round that was prepared last; where several do, each keeps to
           its own
    """

    def __init__(self, parts: Collection[RoundDrafter]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.may_run_ahead = all(part.may_run_ahead for part in parts)
        self.draft_positions = _NO_LIMIT
        self._hosts = tuple(part if isinstance(part, HostDrafter) else None for part in parts)
        models = [place for place, host in enumerate(self._hosts) if host is None]
        self.lookups = {
            place: host for place, host in enumerate(self._hosts) if host is not None and host.can_follow
        }
        alone = [Way(place) for place in range(len(self.parts))]
        self.ways = (*alone, *(Way(model, lookup) for model in models for lookup in self.lookups))
        # Of the round that was prepared: who drafts alone; else what was asked of the host's drafters, by rows.
        self._alone: RoundDrafter | None = None
        self._asked: list[tuple[list[int], DraftProposal]] = []

    def prepare(self, batch: RunningBatch, state: BatchState) -> Hashable | None:
        """The part's own where one drafts alone. Else all of them do the host's part, and the round is Python's."""
        place = self._who_drafts_alone(batch)
        if place is not None:
            self._alone = part = self.parts[place]
            self.draft_positions = part.draft_positions
            key = part.prepare(batch, state)
            return None if key is None else (place, key)
        self._alone, self.draft_positions, self._asked = None, _NO_LIMIT, []
        for place, limits in self._shares(batch).items():
            host = self._hosts[place]
            if host is None:
                self.parts[place].prepare(batch.with_limits(limits), state)
            else:
                rows = _rows_of(limits)
                self._asked.append((rows, host.ask(batch.take(rows), state)))
        return None

    def source(self, batch: RunningBatch, state: BatchState) -> DraftSource | None:
        """The part's own where one drafts alone."""
        return None if self._alone is None else self._alone.source(batch, state)

    def propose(self, batch: RunningBatch, state: BatchState) -> DraftProposal:
        """The part's own where one drafts alone; else all proposals, put together."""
        if self._alone is not None:
            return self._alone.propose(batch, state)
        asked, self._asked = self._asked, []
        parts = list(asked)
        shares, drafted = self._shares(batch), {}
        for place, limits in shares.items():
            if self._hosts[place] is None:
                part, within = self.parts[place], batch.with_limits(limits)
                own = state.plan_within_limits(within, draft_positions=part.draft_positions)
                drafted[place] = proposal = part.propose(own, state)
                rows = _rows_of(limits)
                parts.append((rows, proposal.take(rows)))
        tails = self._look_up_tails(batch, shares, drafted)
        if len(parts) == 1 and len(parts[0][0]) == batch.size:
            merged = parts[0][1]
        else:
            merged = DraftProposal.combine(batch.size, parts, device=batch.slots.device)
        merged = merged.widened(max([start + len(tokens) for _, start, tokens in tails], default=0))
        for row, start, tokens in tails:
            drafts = _append(merged, row, start, tokens)
            first = batch.lengths[row] + start
            batch.tokens[batch.host_slots[row], first : first + len(tokens)] = drafts
        if asked:  # models have staged their own
            state.stage(batch, merged.tokens)
        return merged

    def who_drafts(self, batch: RunningBatch) -> list[list[int]]:
        """For each row, and each draft that it may have, the place of the part that makes it."""
        shares, found = self._shares(batch), []
        for row, ((number, _), limit) in enumerate(zip(batch.ways, batch.draft_limits, strict=True)):
            part, tail = self.ways[number]
            num_own = shares[part][row] if part in shares else 0
            found.append([part] * num_own + [part if tail is None else tail] * (limit - num_own))
        return found

    def observe(self, batch: RunningBatch, results: Collection[RowResult | None]) -> None:
        """Each part hears what became of its rows; a model's drafts are the first, as many as the batch says."""
        place = self._who_drafts_alone(batch)
        if place is not None:
            self.parts[place].observe(batch, results)
            return
        for place, limits in self._shares(batch).items():
            if self._hosts[place] is None:
                self.parts[place].observe(batch.with_limits(limits), results)
            else:
                self.parts[place].observe(batch, [results[row] for row in _rows_of(limits)])

    def hear(self, sequence: Sequence) -> None:
        """Passed on."""
        for part in self.parts:
            part.hear(sequence)

    def release(self, sequence_id: int) -> None:
        """Passed on to all, even if one raises."""
        with ExitStack() as calls:
            for part in reversed(self.parts):
                calls.callback(part.release, sequence_id)

    def first_written(self, sequence: Sequence) -> int | None:
        """That of the part that drafts next."""
        return self.parts[self.ways[sequence.way].part].first_written(sequence)

    def _who_drafts_alone(self, batch: RunningBatch) -> int | None:
        """The part that drafts for every row, without a lookup behind it; the first where nobody drafts."""
        numbers = {way for (way, _), limit in zip(batch.ways, batch.draft_limits, strict=False) if limit > 0}
        if len(numbers) > 1:
            return None
        part, tail = self.ways[numbers.pop() if numbers else 0]
        return part if tail is None else None

    def _shares(self, batch: RunningBatch) -> dict[int, list[int]]:
        """For each part that drafts, the most drafts of its own, row by row."""
        shares: dict[int, list[int]] = {}
        for row, ((number, num_own), limit) in enumerate(zip(batch.ways, batch.draft_limits, strict=True)):
            part, tail = self.ways[number]
            if tail is not None:
                # The last forward of `limit` drafts feeds the position before their last.
                room = self.parts[part].draft_positions - batch.lengths[row] + 1
                limit = min(limit, num_own, room)
            if limit > 0:
                shares.setdefault(part, [0] * batch.size)[row] = limit
        return shares

    def _look_up_tails(
        self, batch: RunningBatch, shares: dict[int, list[int]], drafted: dict[int, DraftProposal]
    ) -> list[tuple[int, int, list[int]]]:
        """Rows, how many drafts they have, and what lookups have behind these.

        None behind a proposal that ended early: what its model said next was no distribution.
        """
        read: dict[int, tuple[list[list[int]], list[int]]] = {}
        tails = []
        for row, ((number, _), limit) in enumerate(zip(batch.ways, batch.draft_limits, strict=True)):
            part, tail = self.ways[number]
            host = None if tail is None else self._hosts[tail]
            if host is None or limit <= 0:
                continue
            num_own, own = shares[part][row] if part in shares else 0, []
            if num_own:
                if part not in read:
                    read[part] = drafted[part].tokens.tolist(), drafted[part].num_tokens.tolist()
                tokens, counts = read[part]
                if counts[row] < num_own:
                    continue
                own = tokens[row][:num_own]
            found = host.follow(batch.sequences[row], own, limit - num_own)
            if found:
                tails.append((row, num_own, found))
        return tails


def _rows_of(limits: Collection[int]) -> list[int]:
    """The rows that draft."""
    return [row for row, limit in enumerate(limits) if limit]


def _append(proposal: DraftProposal, row: int, start: int, tokens: list[int]) -> Tensor:
    """Writes point masses behind the first `start` drafts of a row. In a row that has a law they need one, too: the
    logit 0 for the token and -inf for all others, with a maximum, a threshold and a log-normaliser of 0. Returns the
    tokens `[n]` int32."""
    end = start + len(tokens)
    drafts = torch.tensor(tokens, dtype=torch.int32, device=proposal.tokens.device)
    proposal.tokens[row, start:end] = drafts
    proposal.num_tokens[row] = end
    if proposal.log_probs is not None and proposal.logits is not None and proposal.stats is not None:
        proposal.log_probs[row, start:end] = 0.0
        proposal.logits[row, start:end] = float("-inf")
        proposal.logits[row, start:end].scatter_(1, drafts.long()[:, None], 0.0)
        proposal.stats[row, start:end] = 0.0
    return drafts
