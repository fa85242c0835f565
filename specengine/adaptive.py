"""Chooses how many tokens to draft: `num_speculative_tokens="auto"`.

A round of n sequences with at most k drafts each takes T(n, k) seconds and emits, of sequence i, 1 + sum over j <= k of
the product of its first j acceptances: tokens, on average. k is the one for which tokens a second are the most.

T is what rounds took (`RoundCosts`), acceptance what became of each sequence's latest drafts (`Acceptance`). Both are
known only for rounds whose results the host has read, so a choice depends on what earlier rounds committed and on
clocks, never on a token that it decides whether to drop: in rejection mode anything else would bias the output.

Where drafting does not pay, k is 0, and two rounds now and then find out whether that is still so: after 8 rounds, 16,
32 and so on, and never so often that they take more than 2 % of the time.

The same measurements give the same choices. Clocks never give the same twice: text that depends on k (rejection with a
seed) is reproducible only with a number instead of "auto".
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field

from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS
from specengine.runtime.graphs import DRAFT_COUNTS
from specengine.runtime.sequence import Sequence

# Of acceptance: what a round's result still weighs a round later, what the guess for a position weighs beside them
# (the position before it, or, for the first, what other sequences saw), and that guess before anything was seen.
_MEMORY = 0.95
_GUESS_WEIGHT = 1.0
_FIRST_GUESS = 0.7
_GUESS_RATE = 0.02
# Of seconds: how fast the machine's pace is followed, and how fast the ratios between rounds.
_PACE_RATE = 0.25
_PACE_MOST = 2.0
_COST_RATE = 0.03
_COST_MOST = 1.25
# Measurements of a kind that count as one (the lower of two: the first may have met a cold machine).
_NUM_FIRST = 2
# Rounds of a size for which a measurement is trusted.
_TRUST_ROUNDS = 512
# Rounds that use the same table of costs.
_TABLE_ROUNDS = 8
# What a draft costs, of a plain round, before anything was measured.
_ASSUMED_DRAFT_COST = 0.15
# Another k must promise this much more than the last one: each change is a write to the device.
_ENOUGH_BETTER = 1.02
# Probes: drafts, rounds, rounds before the first, the share of time they may take; after a new sequence they come
# sooner again, and what is remembered of drafts weighs less than what they find.
_PROBE_DRAFTS = 2
_PROBE_ROUNDS = 2
_PROBE_FIRST = 8
_PROBE_SHARE = 0.02
_PROBE_NEW_SEQUENCE = 32
_PROBE_MOST = 2048
_PROBE_MEMORY = 2.0


@dataclass(slots=True)
class Acceptance:
    """What became of one sequence's drafts, the latest weighing most.

    rates:      [i]: the chance that draft i is accepted if those before it were
    num_judged, num_accepted: their weighted counts
    last_limit: drafts that its latest round may have had, of those that have been read
    """

    rates: list[float] = field(default_factory=list)
    num_judged: list[float] = field(default_factory=list)
    num_accepted: list[float] = field(default_factory=list)
    last_limit: int = 0

    def note(self, limit: int, num_accepted: int, guess: float) -> None:
        """A round that asked for `limit` drafts. One that the drafter did not make counts as rejected: it brought
        nothing. Positions beyond the first rejection were not judged; what was known of them fades all the same."""
        self.last_limit = limit
        if not limit:
            return
        judged = [_MEMORY * weight for weight in self.num_judged]
        accepted = [_MEMORY * weight for weight in self.num_accepted]
        num_judged = min(limit, num_accepted + 1)
        if num_judged > len(judged):
            judged += [0.0] * (num_judged - len(judged))
            accepted += [0.0] * (num_judged - len(accepted))
        for index in range(num_judged):
            judged[index] += 1.0
        for index in range(num_accepted):
            accepted[index] += 1.0
        self.num_judged, self.num_accepted = judged, accepted
        self.guess(guess)

    def guess(self, first: float) -> None:
        """Finds the rates anew: of a position that was seen rarely, much as of the one before it."""
        rates, rate = [], first
        for judged, accepted in zip(self.num_judged, self.num_accepted, strict=True):
            rate = (accepted + _GUESS_WEIGHT * rate) / (judged + _GUESS_WEIGHT)
            rates.append(rate)
        self.rates = rates or [first]

    def fade(self) -> None:
        """What was seen weighs no more than a probe does."""
        most = max(self.num_judged, default=0.0)
        if most > _PROBE_MEMORY:
            scale = _PROBE_MEMORY / most
            self.num_judged = [scale * weight for weight in self.num_judged]
            self.num_accepted = [scale * weight for weight in self.num_accepted]

    def add_gains(self, gains: list[float]) -> None:
        """Adds to gains[j] the chance that drafts 0 … j are all accepted."""
        rates, chance = self.rates, 1.0
        num_known = len(rates)
        rate = rates[-1]
        for index in range(len(gains)):
            if index < num_known:
                rate = rates[index]
            chance *= rate
            gains[index] += chance

    def depth(self, least: float, most: int) -> int:
        """How many drafts, one at least, each have the chance `least` to be emitted."""
        rates, chance = self.rates, 1.0
        for index in range(most):
            chance *= rates[index] if index < len(rates) else rates[-1]
            if chance < least:
                return max(1, index)
        return most


@dataclass(slots=True)
class _Cost:
    """Seconds of one kind of round at the pace 1. A value that is far off moves it a little only."""

    value: float
    count: int = 1
    noted_at: int = 0

    def note(self, value: float, at: int = 0) -> None:
        is_old, self.noted_at = at - self.noted_at > _TRUST_ROUNDS, at
        if is_old:
            self.value, self.count = value, 1
            return
        self.count += 1
        if self.count <= _NUM_FIRST:
            self.value = min(self.value, value)
            return
        value = min(max(value, self.value / _COST_MOST), self.value * _COST_MOST)
        self.value += (value - self.value) * max(1.0 / self.count, _COST_RATE)


@dataclass(slots=True)
class _SizeCosts:
    """Of rounds of one batch size.

    by_k:      what rounds of up to k drafts took
    draft:     a draft of each sequence, where that is known
    table:     [i]: a round of up to DRAFT_COUNTS[i] drafts, measured or, between measurements, interpolated
    row:       one more row of the target's forward, where that is known, else 0
    num_rounds, num_fresh: rounds that were measured, and those of them since the table was made
    """

    by_k: dict[int, _Cost] = field(default_factory=dict)
    draft: _Cost | None = None
    table: list[float] = field(default_factory=list)
    row: float = 0.0
    num_rounds: int = 0
    num_fresh: int = 0

    def trusted(self) -> dict[int, float]:
        """The measurements that are neither the only one nor old; all, where there is none of these."""
        oldest = self.num_rounds - _TRUST_ROUNDS
        return {
            k: cost.value
            for k, cost in self.by_k.items()
            if cost.count >= _NUM_FIRST and cost.noted_at >= oldest
        } or {k: cost.value for k, cost in self.by_k.items()}

    def find_row(self, known: dict[int, float], size: int) -> float:
        """What a row of the target's forward adds: the drafts apart, rounds of more drafts take longer by that."""
        ks = sorted(k for k in known if k)
        if len(ks) < 2:
            ks = sorted(known)
        first, last = ks[0], ks[-1]
        if self.draft is None or first == last:
            return 0.0
        longer = known[last] - known[first] - (last - first) * self.draft.value
        return max(0.0, longer / (size * (last - first)))

    def find_step(self, known: dict[int, float], size: int) -> float:
        """What one draft more adds: a draft and a row of each sequence, if that is known, else what it does on average
        to a round."""
        if self.draft is not None:
            return self.draft.value + size * self.row
        first, last = min(known), max(known)
        if first < last:
            return max(0.0, (known[last] - known[first]) / (last - first))
        return known[first] * _ASSUMED_DRAFT_COST / (1.0 + _ASSUMED_DRAFT_COST * first)

    def curve(self, size: int, *more: int) -> list[float]:
        """Rounds of up to each of DRAFT_COUNTS drafts, and of `more`: measured, or on the line between neighbours;
        beyond them a step a draft.

        A measurement that is not trusted counts only if it is lower than that: such a k is tried, and measured again.
        One that seems dear would never be.
        """
        known = self.trusted()
        self.row = self.find_row(known, size)
        step, curve = self.find_step(known, size), []
        ks = sorted(known)
        for k in (*DRAFT_COUNTS, *more):
            place = bisect_left(ks, k)
            if k in known:
                cost = known[k]
            elif place == len(ks):
                cost = known[ks[-1]] + (k - ks[-1]) * step
            elif place == 0:
                cost = max(known[ks[0]] - (ks[0] - k) * step, known[ks[0]] / (1.0 + ks[0]))
            else:
                low, high = ks[place - 1], ks[place]
                cost = known[low] + (known[high] - known[low]) * (k - low) / (high - low)
            curve.append(min(cost, self.by_k[k].value) if k in self.by_k else cost)
        return curve

    def tabulate(self, size: int, like: _SizeCosts) -> None:
        """Makes the table, in proportion to another size's where nothing is known but one k."""
        k = next(iter(self.by_k))
        *self.table, own = like.curve(size, k)
        if like is not self:
            scale = self.by_k[k].value / own
            self.table, self.row = [scale * cost for cost in self.table], like.row
        self.num_fresh = 0


class RoundCosts:
    """What rounds take, by batch size and k. Whatever makes the machine slower makes all its rounds slower: `pace`
    follows that at once, and what was measured long ago moves along. All costs are seconds at the pace 1.

    has_drafted: whether a kind of round with drafts was measured often enough to choose by it

    Rows of a batch may draft less than its k, and recorded rounds are padded: what is noted under (size, k) is what
    rounds of that size took whose longest draft was k. Draft steps, which read the draft's weights once each whoever
    drafts, are most of what k costs; the target's rows are what they were lately.
    """

    def __init__(self) -> None:
        self.pace = 0.0
        self.has_drafted = False
        self._sizes: dict[int, _SizeCosts] = {}

    def note(self, size: int, k: int, seconds: float, draft_seconds: float | None) -> None:
        """A round took this long; its part for drafting, if that is known."""
        self.pace = self.pace or seconds
        of_size = self._sizes.get(size)
        if of_size is None:
            of_size = self._sizes[size] = _SizeCosts()
        of_size.num_rounds += 1
        value = seconds / self.pace
        cost = of_size.by_k.get(k)
        if cost is None:
            of_size.by_k[k] = _Cost(value, noted_at=of_size.num_rounds)
        else:
            cost.note(value, of_size.num_rounds)
            self.has_drafted = self.has_drafted or k > 0
            ratio = min(max(value / cost.value, 1.0 / _PACE_MOST), _PACE_MOST)
            self.pace *= 1.0 + (ratio - 1.0) * _PACE_RATE
        if k and draft_seconds is not None:
            step = draft_seconds / (k * self.pace)
            if of_size.draft is None:
                of_size.draft = _Cost(step)
            else:
                of_size.draft.note(step)
        of_size.num_fresh += 1
        if of_size.num_fresh >= _TABLE_ROUNDS or cost is None or cost.count <= _NUM_FIRST:
            of_size.table = []

    def lacks_plain(self, size: int) -> bool:
        """Whether of this size rounds with drafts were measured, but hardly any without."""
        of_size = self._sizes.get(size)
        if of_size is None:
            return False
        plain = of_size.by_k.get(0)
        if plain is not None and plain.count >= _NUM_FIRST:
            return False
        return any(k and cost.count >= _NUM_FIRST for k, cost in of_size.by_k.items())

    def of(self, size: int) -> _SizeCosts:
        """The costs of this batch size; where too little was measured, like those of the nearest that has more."""
        of_size = self._sizes.get(size)
        if of_size is not None and of_size.table:
            return of_size
        like = of_size
        if of_size is None or len(of_size.by_k) < 2:
            measured = [other for other, costs in self._sizes.items() if len(costs.by_k) > 1]
            nearest = min(measured, key=lambda other: (abs(math.log(other / size)), other), default=None)
            like = of_size if nearest is None else self._sizes[nearest]
        if like is None:
            return _SizeCosts({0: _Cost(1.0)}, table=[1.0 + _ASSUMED_DRAFT_COST * k for k in DRAFT_COUNTS])
        if of_size is None:
            of_size = like
        of_size.tabulate(size, like)
        return of_size

    def plain(self, size: int) -> float | None:
        """Seconds of a round without drafts, as they would be now; None if there was none yet."""
        of_size = self._sizes.get(size)
        cost = None if of_size is None else of_size.by_k.get(0)
        return None if cost is None else cost.value * self.pace


class Chooser:
    """Sets `num_speculative_tokens` of the sequences that leave it open, before each step.

    hides_host: whether the device works while the host does, so that a round takes no longer than the longer of both
    costs:      of this engine's rounds
    """

    def __init__(self, *, hides_host: bool) -> None:
        self.costs = RoundCosts()
        self._hides_host = hides_host
        self._rows: dict[int, Acceptance] = {}
        self._guess = _FIRST_GUESS
        self._last = AUTO_NUM_SPECULATIVE_TOKENS
        # Of probes: rounds without drafts since the last, how many there must be (by doubling, and by what the last
        # one took), and rounds of one that are to come.
        self._num_idle = 0
        self._interval = _PROBE_FIRST
        self._least_interval = 0
        self._is_asleep = False
        self._num_probes = 0

    def choose(self, running: Collection[Sequence]) -> None:
        """Before a round of these, those among them that are not computing their prompt."""
        open_ones = [sequence for sequence in running if sequence.has_auto_k and sequence.output_ids]
        if not open_ones:
            return
        rows = [self._row(sequence) for sequence in open_ones]
        size, given = len(rows), 0
        if len(running) > size:
            others = [s.max_draft_tokens for s in running if s.output_ids and not s.has_auto_k]
            size, given = size + len(others), max(0, *others) if others else 0
        if not self._num_probes:
            k, least = self._best(rows, size, given)
            if k and not given and self.costs.lacks_plain(size):
                self._set(open_ones, rows, 0, 0.0)
                return
            if k or given:
                self._wake()
            elif self._is_due():
                self._begin_probe(rows)
        if self._num_probes:
            self._num_probes -= 1
            k, least = _PROBE_DRAFTS, 0.0
        self._last = k
        self._set(open_ones, rows, k, least)

    def observe(
        self,
        sequences: Collection[Sequence],
        limits: Collection[int],
        accepted: Collection[int | None],
        *,
        k: int,
        device: float,
        draft: float | None,
        host: float,
    ) -> None:
        """What became of a round: in the order of its sequences, the drafts that each may have had, and how many were
        accepted (None: the sequence was over before). Seconds as in `RoundTimes`."""
        if not any(sequence.has_auto_k for sequence in sequences):
            return
        seconds = max(device, host) if self._hides_host else device + host
        size, is_typical = len(sequences), True
        plain = self.costs.plain(size)
        for sequence, limit, count in zip(sequences, limits, accepted, strict=True):
            if not sequence.has_auto_k:
                # A draft model's first round computes the prompt.
                is_typical = is_typical and (not limit or len(sequence.rounds) > 1)
                continue
            if count is None:
                continue
            if limit:
                self._guess += ((count > 0) - self._guess) * _GUESS_RATE
            row = self._rows.get(sequence.sequence_id)
            if row is not None:  # it goes on
                # After rounds without drafts a draft model computes what it missed.
                is_typical = is_typical and (not limit or row.last_limit > 0)
                row.note(limit, count, self._guess)
            if plain is not None:
                sequence.round_seconds += seconds
                sequence.plain_seconds += (count + 1) * plain
        if is_typical:
            self.costs.note(size, k, seconds, draft)
        elif k and plain is not None and self._is_asleep:
            self._least_interval = int((seconds / plain - 1.0) / _PROBE_SHARE)

    @staticmethod
    def _set(sequences: Collection[Sequence], rows: list[Acceptance], k: int, least: float) -> None:
        """Up to k drafts for each, none of which has less than the chance `least` to be emitted, or one."""
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.num_speculative_tokens = row.depth(least, k) if k and least else k

    def release(self, sequence_id: int) -> None:
        """The sequence is over."""
        self._rows.pop(sequence_id, None)

    def _row(self, sequence: Sequence) -> Acceptance:
        row = self._rows.get(sequence.sequence_id)
        if row is None:
            row = self._rows[sequence.sequence_id] = Acceptance()
            row.guess(self._guess)
            self._interval = min(self._interval, _PROBE_NEW_SEQUENCE)
        return row

    def _best(self, rows: list[Acceptance], size: int, given: int) -> tuple[int, float]:
        """The k with the most tokens a second, and the chance of being emitted that a row's draft must have to be
        worth the time of its row in the target's forward."""
        costs = self.costs.of(size)
        table, last = costs.table, self._last
        if not given and not self.costs.has_drafted:
            return AUTO_NUM_SPECULATIVE_TOKENS, 0.0  # the first rounds are measurements
        gains = [0.0] * min(max(AUTO_NUM_SPECULATIVE_TOKENS, 2 * last), DRAFT_COUNTS[-1])
        for row in rows:
            row.add_gains(gains)
        # Of drafts whose number is given half are taken to be accepted: what matters is that they cost nothing more.
        expected = len(rows) + (size - len(rows)) * (1.0 + given / 2)
        floor = bisect_left(DRAFT_COUNTS, given)
        best, best_rate, last_rate, num_added = 0, 0.0, 0.0, 0
        for index, k in enumerate(DRAFT_COUNTS):
            if k > len(gains):
                break
            while num_added < k:
                expected += gains[num_added]
                num_added += 1
            rate = expected / table[max(index, floor)]
            if rate > best_rate:
                best, best_rate = k, rate
            if k == last:
                last_rate = rate
        if best_rate < last_rate * _ENOUGH_BETTER:
            best = last
        return best, best_rate * costs.row if size > 1 else 0.0

    def _wake(self) -> None:
        """Drafting pays. If that was a short mood, probes need not begin from the start."""
        if self._is_asleep:
            self._interval = max(_PROBE_FIRST, self._interval // 4)
        self._num_idle, self._least_interval, self._is_asleep = 0, 0, False

    def _is_due(self) -> bool:
        """One more round without drafts; whether it should be a probe."""
        self._num_idle += 1
        return self._num_idle >= max(self._interval, self._least_interval)

    def _begin_probe(self, rows: list[Acceptance]) -> None:
        for row in rows:
            row.fade()
        self._num_probes, self._num_idle, self._is_asleep = _PROBE_ROUNDS, 0, True
        self._interval = min(2 * self._interval, _PROBE_MOST)
