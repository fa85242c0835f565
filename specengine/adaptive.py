"""Chooses how many tokens to draft, `num_speculative_tokens="auto"`, and of several drafters which.

A round of n sequences takes T seconds (`specengine.round_costs`) and emits, of sequence i, 1 + sum over j of the
product of its first j acceptances: tokens, on average. What is chosen is the round with the most tokens a second:
which drafter runs, how many tokens it drafts at most (each is a step for all sequences together), and which sequences
draft less than that (each draft is a row of the target's forward), or take what a lookup drafter offers instead, which
costs no step. A drafter's tokens may be followed by a lookup's.

Acceptance is what became of each sequence's latest drafts (`Acceptance`); of lookups it is known without using them,
by comparing what they offered with what was written. All of it is known only for rounds whose results the host has
read, so a choice depends on what earlier rounds committed, on texts and on clocks, never on a token that it decides
whether to drop: in rejection mode anything else would bias the output.

A drafter that does not pay, or pays less than another, is not used, and two rounds now and then find out whether that
is still so: after 8 rounds, 16, 32 and so on, and never so often that they take more than 2 % of the time.

The same measurements give the same choices. Clocks never give the same twice: text that depends on k (rejection with a
seed) is reproducible only with a number instead of "auto", and one drafter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from specengine.config import AUTO_NUM_SPECULATIVE_TOKENS
from specengine.drafters.base import ALONE, RoundDrafter, RowResult, Way
from specengine.drafters.host import HostDrafter
from specengine.drafters.several import SeveralDrafters
from specengine.round_costs import LEAST_SECONDS, NUM_FIRST, RoundCosts
from specengine.runtime.graphs import DRAFT_COUNTS
from specengine.runtime.sequence import MAX_ROUNDS_UNREAD, Sequence

# Of acceptance: what a round's result still weighs a round later, what the guess for a position weighs beside them
# (the position before it, or, for the first, what other sequences saw), that guess before anything was seen, how many
# rounds it counts as, and what one weighs among many.
_MEMORY = 0.95
_GUESS_WEIGHT = 2.0
_FIRST_GUESS = 0.7
_FIRST_GUESS_ROUNDS = 3
_GUESS_RATE = 0.02
_WEIGHT_MOST = 1e6
# Of offers: from how many tokens on one is long; those are accepted more often.
_LONG_OFFER = 4
# Of a lookup's drafts after a drafter's: the chance of being emitted that each must have.
_LEAST_TAIL = 0.1
# Rounds for which a drafter that is begun with is taken to be used, and tokens of each, near a text's end.
_HORIZON = 32
_TOKENS_EACH = 4
# Another k must promise this much more than the last one: each change is a write to the device.
_ENOUGH_BETTER = 1.02
# Rounds that a choice holds, and sequences for which it does so one longer: it takes time in proportion to them.
_HOLD_LEAST = 2
_HOLD_SEQUENCES = 4
# Where lookups had nothing worth a row and a look: after so many looks that were in vain twice as many rounds go by
# without one, up to so many, and not for longer than so many seconds; and how many of these looks one that was of use
# makes up for.
_IDLE_LOOKS = 2
_IDLE_MOST = 15
_IDLE_SECONDS = 0.064
_USEFUL_LOOK = 2
# Probes: rounds, rounds before the first, the share of time they may take; after a new sequence they come
# sooner again, and what is remembered of drafts weighs less than what they find.
_PROBE_ROUNDS = 2
_PROBE_FIRST = 8
_PROBE_SHARE = 0.02
_PROBE_NEW_SEQUENCE = 32
_PROBE_MOST = 2048
_PROBE_MEMORY = 2.0

_NO_LOOKUPS: Mapping[int, HostDrafter] = {}


class _Guess:
    """How often the first draft was accepted, whichever sequence it was of: a mean, of many rounds of the latest."""

    __slots__ = ("num_rounds", "value")

    def __init__(self) -> None:
        self.value, self.num_rounds = _FIRST_GUESS, _FIRST_GUESS_ROUNDS

    def note(self, is_accepted: bool) -> None:
        self.num_rounds += 1
        self.value += (is_accepted - self.value) * max(1.0 / self.num_rounds, _GUESS_RATE)


class Acceptance:
    """What became of one sequence's drafts, the latest weighing most."""

    __slots__ = ("_guess", "_known", "_num_accepted", "_num_judged", "_rates", "_weight")

    def __init__(self, guess: float, known: Collection[float] = ()) -> None:
        self._guess = guess
        # By position, what was measured before this engine; the first one is in the guess.
        self._known = known
        # Sums by position in which a round counts `weight`; it grows from round to round, so that nothing need shrink.
        self._num_judged: list[float] = []
        self._num_accepted: list[float] = []
        self._weight = 1.0
        self._rates: list[float] = []

    def note(self, limit: int, num_accepted: int, guess: float) -> None:
        """A round that asked for `limit` drafts. One that the drafter did not make counts as rejected: it brought
        nothing. Positions beyond the first rejection were not judged; what was known of them fades all the same.

        guess: what other sequences saw of the first draft
        """
        judged, accepted = self._num_judged, self._num_accepted
        self._weight = weight = self._weight / _MEMORY
        num_judged = num_accepted + 1 if num_accepted < limit else limit
        while len(judged) < num_judged:
            judged.append(0.0)
            accepted.append(0.0)
        for index in range(num_judged):
            judged[index] += weight
        for index in range(num_accepted):
            accepted[index] += weight
        self._guess, self._rates = guess, []
        if weight > _WEIGHT_MOST:
            self._scale(1.0 / weight)
            self._weight = 1.0

    @property
    def rates(self) -> list[float]:
        """[i]: the chance that draft i is accepted if those before it were: one number at least. Of a position that was
        seen rarely it is much as of the one before it, of those beyond the last the same."""
        if not self._rates:
            rate, guess_weight = self._guess, _GUESS_WEIGHT * self._weight
            for judged, accepted in zip(self._num_judged, self._num_accepted, strict=True):
                rate = (accepted + guess_weight * rate) / (judged + guess_weight)
                self._rates.append(rate)
            if not self._rates:
                self._rates = [rate]
            if self._known:
                self._use_known(guess_weight)
        return self._rates

    def _use_known(self, guess_weight: float) -> None:
        """Positions beyond the first are much as they were measured, not as the one before."""
        for index in range(1, len(self._known)):
            judged, accepted = 0.0, 0.0
            if index < len(self._num_judged):
                judged, accepted = self._num_judged[index], self._num_accepted[index]
            rate = (accepted + guess_weight * self._known[index]) / (judged + guess_weight)
            self._rates[index : index + 1] = [rate]

    def fade(self) -> None:
        """What was seen weighs no more than a probe does."""
        most = max(self._num_judged, default=0.0)
        if most > _PROBE_MEMORY * self._weight:
            self._scale(_PROBE_MEMORY * self._weight / most)

    def gains(self, most: int, least: float, *, chance: float = 1.0, num_free: int = 0) -> list[float]:
        """[j]: tokens that j drafts are expected to add, for 0 … the number of those that each have at least the chance
        `least` to be emitted, or `most`.

        chance: that the first of them is judged at all; num_free: drafts for which it need not be so much
        """
        rates, total, gains = self.rates, 0.0, [0.0]
        num_known, rate = len(rates), rates[-1]
        for index in range(most):
            chance *= rates[index] if index < num_known else rate
            if chance < least and index >= num_free:
                break
            total += chance
            gains.append(total)
        return gains

    def _scale(self, factor: float) -> None:
        self._num_judged = [factor * weight for weight in self._num_judged]
        self._num_accepted = [factor * weight for weight in self._num_accepted]
        self._rates = []


class _Choice(NamedTuple):
    """What a sequence does in a round: the tokens that it is expected to add, its drafts, those of them that are steps
    of the round, and the way."""

    gain: float
    limit: int
    num_steps: int
    way: int


_NOTHING = _Choice(0.0, 0, 0, 0)


class KnownRound(NamedTuple):
    """What a round took, measured before: see `RoundCosts.note`."""

    batch_size: int
    k: int
    rows: int
    seconds: float
    draft: float | None
    verify: float | None


class Known(NamedTuple):
    """[m]: the chance that draft m is accepted if all before it were; and the rounds that it was seen in."""

    acceptance: Collection[float]
    num_judged: int


@dataclass(slots=True)
class _Row:
    """What is known of one sequence.

    acceptance: by way; of a lookup alone, by whether its offer was long, too
    offers:     by way, what lookups had for it when it had num_output tokens
    reach:      how many tokens the next offers may have: twice what was right of the last
    last_part:  the drafter of its latest round, of those that have been read; None: it had no drafts
    num_known:  by drafter, the tokens there were when it drafted last
    """

    acceptance: dict[tuple[int, bool], Acceptance] = field(default_factory=dict)
    offers: dict[int, list[int]] = field(default_factory=dict)
    num_output: int = 0
    reach: int = 2 * AUTO_NUM_SPECULATIVE_TOKENS
    last_part: int | None = None
    num_known: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Probing:
    """When a drafter that is not used is tried again.

    num_idle:       rounds since it drafted last
    interval:       how many there must be, by doubling
    lost:           seconds that the last probe took beyond what its tokens would have taken as chosen
    least_interval: rounds that there must be for that
    is_asleep:      whether it was not worth using when it was probed last
    k:              the number of drafts that promises most
    """

    num_idle: int = 0
    interval: int = _PROBE_FIRST
    lost: float = 0.0
    least_interval: int = 0
    is_asleep: bool = False
    k: int = AUTO_NUM_SPECULATIVE_TOKENS

    def is_due(self, num_rounds: int) -> bool:
        """Another choice without it; whether the next round should be a probe."""
        self.num_idle += num_rounds
        return self.num_idle >= max(self.interval, self.least_interval)

    def begin(self) -> None:
        self.num_idle, self.lost, self.is_asleep = 0, 0.0, True
        self.interval = min(2 * self.interval, _PROBE_MOST)

    def note(self, lost: float, plain: float) -> None:
        """A round of a probe. plain: seconds of one without drafts"""
        self.lost += lost
        self.least_interval = int(self.lost / (_PROBE_SHARE * plain))

    def wake(self) -> None:
        """It pays. If that was a short mood, probes need not begin from the start."""
        if self.is_asleep:
            self.interval = max(_PROBE_FIRST, self.interval // 4)
        self.num_idle, self.least_interval, self.is_asleep = 0, 0, False


class Chooser:
    """Sets what each sequence drafts (`num_speculative_tokens`, and `way`, `num_own_drafts`), before each step.

    hides_host: whether the device works while the host does, so that a round takes no longer than the longer of both
    ways:       how a sequence may draft
    lookups:    those of the drafters, by place, that can be asked at once what they have for a sequence
    costs:      of this engine's rounds
    """

    def __init__(
        self,
        *,
        hides_host: bool,
        ways: Collection[Way] = (ALONE,),
        lookups: Mapping[int, HostDrafter] = _NO_LOOKUPS,
    ) -> None:
        self.costs = RoundCosts()
        self._hides_host = hides_host
        self._ways = tuple(ways)
        self._has_ways = len(self._ways) > 1
        self._hosts = tuple(lookups.items())
        # By drafter, its way alone: of lookups, and of those whose drafts are steps of a round.
        alone = {way.part: index for index, way in enumerate(ways) if way.tail is None}
        self._alone = alone
        self._lookups = {part: index for part, index in alone.items() if part in lookups}
        self._steppers = {part: index for part, index in alone.items() if part not in lookups}
        self._tails = {
            part: [index for index, way in enumerate(ways) if way.part == part and way.tail is not None]
            for part in self._steppers
        }
        self._rows: dict[int, _Row] = {}
        self._guesses: defaultdict[tuple[int, bool], _Guess] = defaultdict(_Guess)
        # By part, the acceptance by position that a profile knows.
        self._known: dict[int, Collection[float]] = {}
        self._probing = {part: _Probing() for part in self._steppers}
        # The latest choice: who makes steps, how many, and tokens a second at the pace 1; and for which sequences and
        # how many rounds it still holds.
        self._part, self._k, self._rate = next(iter(self._steppers), -1), AUTO_NUM_SPECULATIVE_TOKENS, 0.0
        self._held: list[int] = []
        self._num_held = 0
        # Looks after which nobody drafted anything; one that was of use takes some of them back, other sequences half.
        self._num_idle_looks = 0
        # Whether the latest round ran alone, not as one of several in a row.
        self._is_alone = True
        # Rounds that may run before it is asked again.
        self.max_rounds = 1
        # Rounds of a probe that are to come.
        self._num_probes = 0

    @staticmethod
    def of(drafter: RoundDrafter, *, hides_host: bool) -> Chooser:
        """The chooser of an engine's drafter, or list of them."""
        if isinstance(drafter, SeveralDrafters):
            return Chooser(hides_host=hides_host, ways=drafter.ways, lookups=drafter.lookups)
        if isinstance(drafter, HostDrafter) and drafter.can_follow:
            return Chooser(hides_host=hides_host, lookups={0: drafter})
        return Chooser(hides_host=hides_host)

    def begin_with(
        self, rounds: Mapping[int | None, Collection[KnownRound]], known: Mapping[int, Known]
    ) -> None:
        """Starts from what was measured before, as if it had been this engine's: its first rounds are no trials.

        rounds: by part, what they took, on this machine; of None those without drafts
        known:  by part, what became of drafts
        """
        for part, each in sorted(rounds.items(), key=lambda item: -1 if item[0] is None else item[0]):
            drafter = part if part in self._steppers else None
            for one in [one for one in each for _ in range(NUM_FIRST)]:
                num_steps = one.k if drafter is not None else 0
                self.costs.note(
                    one.batch_size,
                    num_steps,
                    one.rows,
                    one.seconds,
                    drafter=drafter,
                    draft=one.draft,
                    verify=one.verify,
                )
        for part, (acceptance, num_judged) in known.items():
            if not acceptance:
                continue
            self._known[part] = tuple(acceptance)
            for is_long in (False, True):
                guess = self._guesses[self._alone[part], is_long]
                guess.value, guess.num_rounds = acceptance[0], max(_FIRST_GUESS_ROUNDS, num_judged)

    def reads_text(self, running: Collection[Sequence]) -> bool:
        """Whether, to choose for these, it must know what was written last: lookups go on from there."""
        return bool(self._lookups) and not self._is_held(self._chosen(running))

    def choose(self, running: Collection[Sequence]) -> None:
        """Before a round of these, those among them that are not computing their prompt."""
        chosen = self._chosen(running)
        if not chosen:
            self.max_rounds = MAX_ROUNDS_UNREAD
            return
        if self._is_held(chosen):
            self._num_held -= 1
            self.max_rounds = 1 + self._num_held
            return
        self.max_rounds = 1
        others = []
        if len(running) > len(chosen):
            others = [
                max(0, each.max_draft_tokens)
                for each in running
                if each.output_ids and not self._is_open(each)
            ]
        self._num_held = 0
        if not self.costs.knows_plain and any(each.has_auto_k for each in chosen):
            self._apply([(each, _NOTHING) for each in chosen])
            return
        if self._lookups:
            self._look(chosen)
        unknown = next(
            (
                part
                for part in self._steppers
                if not self.costs.may_guess_draft(part) and any(each.may_use(part) for each in chosen)
            ),
            None,
        )
        if unknown is not None and not others:
            self._part, self._k = unknown, AUTO_NUM_SPECULATIVE_TOKENS
            self._apply(self._plan_all(chosen, unknown, self._k))
            return
        if not self._num_probes:
            before = self._part, self._k
            plan = self._best(chosen, others)
            is_drafting = any(choice.num_steps for _, choice in plan) or bool(others)
            is_idle = not (is_drafting or any(choice.limit for _, choice in plan))
            ids = [each.sequence_id for each in chosen]
            num_held = self._num_rounds_to_hold(ids, before=before, is_idle=is_idle)
            due = self._due_part(1 + num_held, is_drafting=is_drafting)
            if due is None:
                self._apply(plan)
                self._held, self._num_held = ids, num_held
                self.max_rounds = 1 + num_held
                return
            self._begin_probe(due)
        self._num_probes -= 1
        self._apply(self._plan_all(chosen, self._part, self._probing[self._part].k))

    def _chosen(self, running: Collection[Sequence]) -> list[Sequence]:
        return [each for each in running if each.output_ids and self._is_open(each)]

    def _is_held(self, chosen: Collection[Sequence]) -> bool:
        """Whether the latest choice holds for these, too."""
        return self._num_held > 0 and self._held == [each.sequence_id for each in chosen]

    def _num_rounds_to_hold(self, ids: list[int], *, before: tuple[int, int], is_idle: bool) -> int:
        """What is settled holds longer than what is still being found out, and lookups that are of no use to these
        sequences are asked less often.

        before: the drafter and k of the choice before this one
        """
        if not self._lookups:
            is_settled = before == (self._part, self._k)
            return _HOLD_LEAST + len(ids) // _HOLD_SEQUENCES if is_settled else 0
        if ids != self._held:
            self._num_idle_looks //= 2
        if not is_idle:
            self._num_idle_looks = max(0, self._num_idle_looks - _USEFUL_LOOK)
            return 0
        plain = self.costs.plain(len(ids)) or LEAST_SECONDS
        num_held = min((1 << self._num_idle_looks // _IDLE_LOOKS) - 1, _IDLE_MOST, int(_IDLE_SECONDS / plain))
        self._num_idle_looks = min(self._num_idle_looks + 1, _IDLE_LOOKS * _IDLE_MOST.bit_length())
        return num_held

    def _is_open(self, sequence: Sequence) -> bool:
        """Whether anything is to be chosen: how many drafts, or who makes them."""
        return sequence.has_auto_k or (self._has_ways and sequence.part is None)

    def go_on(self, num_rounds: int) -> None:
        """So many rounds have run besides the one that was chosen for. When a row of them is over the host looks at
        them, and lookups may be asked as well."""
        self._is_alone = not num_rounds
        self._num_held = 0 if num_rounds and self._lookups else max(0, self._num_held - num_rounds)

    def observe(
        self,
        sequences: Collection[Sequence],
        limits: Collection[int],
        results: Collection[RowResult | None],
        *,
        ways: Collection[tuple[int, int]] = (),
        device: float,
        draft: float | None,
        verify: float | None,
        host: float,
    ) -> None:
        """What became of a round, in the order of its sequences.

        limits:  the drafts that each may have had
        results: None: the sequence was over before
        ways:    how each drafted, and with how many drafts before a lookup's; (): all in the first way
        device, draft, verify, host: seconds as in `RoundTimes`
        """
        if not self._has_ways and not any(sequence.has_auto_k for sequence in sequences):
            return
        seconds = max(device, host) if self._hides_host else device + host
        size, num_rows, num_steps, num_missed = len(sequences), 0, 0, 0
        plain, stepper = self.costs.plain(size), None
        for index, (sequence, limit, result) in enumerate(zip(sequences, limits, results, strict=True)):
            if result is None:
                continue
            num_rows += result.num_draft + 1
            number, num_own = ways[index] if ways else (0, 0)
            way = self._ways[number]
            num_own = limit if way.tail is None else min(limit, num_own)
            if num_own and way.part in self._steppers:
                stepper, num_steps = way.part, max(num_steps, num_own)
            num_missed += self._note_round(sequence, way, num_own, limit, result)
            if plain is not None and sequence.has_auto_k and sequence.sequence_id in self._rows:
                sequence.round_seconds += seconds
                sequence.plain_seconds += (result.num_accepted + 1) * plain
        if num_rows:
            self.costs.note(
                size,
                num_steps,
                num_rows,
                seconds,
                drafter=stepper,
                draft=draft,
                verify=verify,
                num_missed=num_missed,
            )
            if verify is not None and stepper is None and not self._hides_host:
                self.costs.note_outside(seconds - verify, is_alone=self._is_alone)
        if stepper is not None and plain is not None and self._probing[stepper].is_asleep and self._rate:
            num_tokens = sum([result.num_accepted + 1 for result in results if result is not None])
            self._probing[stepper].note(seconds - num_tokens * self.costs.pace / self._rate, plain)

    def release(self, sequence_id: int) -> None:
        """The sequence is over."""
        self._rows.pop(sequence_id, None)

    # -- what is known ----------------------------------------------------------------------------------------

    def _row(self, sequence: Sequence) -> _Row:
        row = self._rows.get(sequence.sequence_id)
        if row is None:
            row = self._rows[sequence.sequence_id] = _Row()
            for probing in self._probing.values():
                probing.interval = min(probing.interval, _PROBE_NEW_SEQUENCE)
        return row

    def _acceptance(self, row: _Row, way: int, *, is_long: bool = False) -> Acceptance:
        found = row.acceptance.get((way, is_long))
        if found is None:
            known = self._known.get(self._ways[way].part, ()) if self._ways[way].tail is None else ()
            found = row.acceptance[way, is_long] = Acceptance(self._guesses[way, is_long].value, known)
        return found

    def _note(self, row: _Row, way: int, limit: int, num_accepted: int, *, is_long: bool = False) -> None:
        guess = self._guesses[way, is_long]
        guess.note(num_accepted > 0)
        self._acceptance(row, way, is_long=is_long).note(limit, num_accepted, guess.value)

    def _note_round(self, sequence: Sequence, way: Way, num_own: int, limit: int, result: RowResult) -> int:
        """What became of a sequence in a round. Returns the tokens that its draft model had to compute before."""
        row, num_missed = self._rows.get(sequence.sequence_id), 0
        if row is None:
            # A draft model's first round computes the prompt.
            return result.length if num_own and len(sequence.rounds) <= 1 else 0
        part = way.part if num_own else None
        if part is not None and part in self._steppers:
            # After rounds without drafts of its own a draft model computes what it missed.
            num_missed = result.length - row.num_known.get(part, 0) if row.last_part != part else 0
            row.num_known[part] = result.length
        row.last_part = part
        self._note_drafts(row, way, num_own, limit, result)
        return num_missed

    def _note_drafts(self, row: _Row, way: Way, num_own: int, limit: int, result: RowResult) -> None:
        """What became of the drafts that are no offers."""
        if way.part in self._lookups or not num_own:
            return
        num_accepted = min(result.num_accepted, num_own)
        self._note(row, self._steppers[way.part], num_own, num_accepted)
        if way.tail is not None and limit > num_own == num_accepted:
            self._note(row, self._ways.index(way), limit - num_own, result.num_accepted - num_own)

    def _note_offers(self, row: _Row, written: list[int]) -> None:
        """What would have become of the offers, whether they were taken or not."""
        reach = 0
        for way, offer in row.offers.items():
            count = min(len(offer), len(written))
            if count:
                same = next((i for i in range(count) if offer[i] != written[i]), count)
                self._note(row, way, count, same, is_long=len(offer) >= _LONG_OFFER)
                reach = max(reach, 2 * same)
        row.reach = min(max(reach, 2 * AUTO_NUM_SPECULATIVE_TOKENS), DRAFT_COUNTS[-1])
        row.offers = {}

    def _look(self, chosen: Collection[Sequence]) -> None:
        """Finds out what became of the last offers, and asks the lookups again."""
        for sequence in chosen:
            row = self._row(sequence)
            if row.offers:
                self._note_offers(row, sequence.output_ids[row.num_output :])
            most = row.reach if sequence.has_auto_k else sequence.num_speculative_tokens
            most = min(most, _room(sequence))
            row.num_output = len(sequence.output_ids)
            row.offers = {
                self._lookups[part]: host.follow(sequence, (), most)
                for part, host in self._hosts
                if sequence.may_use(part)
            }

    # -- what is best -----------------------------------------------------------------------------------------

    def _best(self, chosen: Collection[Sequence], others: Collection[int]) -> list[tuple[Sequence, _Choice]]:
        """The round with the most tokens a second.

        others: the drafts of sequences beside these, whose number is given
        """
        costs, size, given = self.costs, len(chosen) + len(others), max(others, default=0)
        # Of drafts whose number is given half are taken to be accepted: what matters is that they cost nothing more.
        num_rows, expected = size + sum(others), size + sum(others) / 2
        if not self._rate:
            self._rate = size / max(costs.verify(size, size) + costs.rest(size), LEAST_SECONDS)
        # The chance of being emitted that a draft must have to be worth the time of its row.
        least = self._rate * costs.row()
        rows = [self._row(each) for each in chosen]
        # An offer that is taken makes Python look at the round, which is all sequences' cost.
        look = self._rate * costs.look() / size if all(each.max_rounds_unread > 1 for each in chosen) else 0.0
        offers = [self._best_offer(row, least, look) for row in rows]
        is_simple = not self._lookups and all(each.has_auto_k for each in chosen)
        rest, best, last = costs.rest(size), (0.0, -1, 0), 0.0
        pick = partial(self._pick, chosen, rows, offers, least)
        for part in self._steppers or (-1,):
            missed = self._missed_seconds(chosen, rows, part)
            draft, most = (
                costs.draft(size, part),
                min(2 * max(AUTO_NUM_SPECULATIVE_TOKENS, self._k), DRAFT_COUNTS[-1]),
            )
            options = self._options(chosen, rows, part, most, least if size > 1 else 0.0)
            best_rate = 0.0
            for k in DRAFT_COUNTS:
                if k > most or (k and part < 0):
                    break
                if is_simple:
                    total = expected + sum([gains[min(k, len(gains) - 1)] for gains in options])
                    steps, total_rows = k, num_rows + sum([min(k, len(gains) - 1) for gains in options])
                else:
                    choices = pick(options, part, k)
                    total = expected + sum([choice.gain for choice in choices])
                    steps = max([choice.num_steps for choice in choices])
                    total_rows = num_rows + sum([choice.limit for choice in choices])
                steps = max(given, steps)
                seconds = costs.verify(total_rows, size) + rest + (draft(steps) + missed if steps else 0.0)
                rate = total / max(seconds, LEAST_SECONDS)
                if rate > best[0]:
                    best = rate, part, k
                if k and rate > best_rate:
                    best_rate, self._probing[part].k = rate, k
                if (part, k) == (self._part, self._k):
                    last = rate
        if best[0] < last * _ENOUGH_BETTER:
            best = last, self._part, self._k
        self._rate, self._part, self._k = best
        options = self._options(chosen, rows, self._part, self._k, least if size > 1 else 0.0)
        return list(zip(chosen, pick(options, self._part, self._k), strict=True))

    def _missed_seconds(self, chosen: Collection[Sequence], rows: Collection[_Row], part: int) -> float:
        """A round's share of what the drafter would have to compute first, of sequences that others draft for, or
        nobody."""
        each_seconds, share = self.costs.missed(part), 0.0
        if not each_seconds:
            return 0.0
        for each, row in zip(chosen, rows, strict=True):
            if row.last_part != part and each.may_use(part):
                num_missed = each.num_tokens - row.num_known.get(part, 0)
                share += num_missed / min(_HORIZON, max(1, _room(each) // _TOKENS_EACH))
        return share * each_seconds

    def _options(
        self, chosen: Collection[Sequence], rows: Collection[_Row], part: int, most: int, least: float
    ) -> list[list[float]]:
        """By sequence, [j]: what j steps of this drafter are expected to add.

        Of a given number all are made; else one at least, or nothing would be learned any more.
        """
        way, options = self._steppers.get(part, 0), []
        if part < 0:
            return [[0.0] for _ in chosen]
        for each, row in zip(chosen, rows, strict=True):
            if not each.may_use(part):
                options.append([0.0])
                continue
            limit, chance = (most, least) if each.has_auto_k else (each.num_speculative_tokens, 0.0)
            options.append(self._acceptance(row, way).gains(min(limit, _room(each)), chance, num_free=1))
        return options

    def _best_offer(self, row: _Row, least: float, look: float) -> _Choice:
        """The lookup that promises most, if that is more than the tokens that a look costs."""
        best, most = _NOTHING, look
        for way, offer in row.offers.items():
            if offer:
                acceptance = self._acceptance(row, way, is_long=len(offer) >= _LONG_OFFER)
                gains = acceptance.gains(len(offer), least)
                limit = len(gains) - 1
                if gains[-1] - least * limit > most:
                    most = gains[-1] - least * limit
                    best = _Choice(gains[-1], limit, 0, way)
        return best

    def _pick(
        self,
        chosen: Collection[Sequence],
        rows: Collection[_Row],
        offers: Collection[_Choice],
        least: float,
        options: Collection[list[float]],
        part: int,
        k: int,
    ) -> list[_Choice]:
        """Of each sequence its offer, or up to k steps, a lookup's drafts after them where that promises more."""
        choices = []
        for each, row, offer, gains in zip(chosen, rows, offers, options, strict=True):
            steps = min(k, len(gains) - 1) if each.has_auto_k else len(gains) - 1
            gain, limit = gains[steps], steps
            if not steps or (offer.limit and gain - least * steps <= offer.gain - least * offer.limit):
                choices.append(offer)
                continue
            way, more_tokens = self._steppers[part], min(_room(each) - steps, AUTO_NUM_SPECULATIVE_TOKENS)
            for tail in self._tails[part] if each.part is None else ():
                chance = gains[steps] - gains[steps - 1]
                more = self._acceptance(row, tail).gains(more_tokens, max(least, _LEAST_TAIL), chance=chance)
                if gains[steps] + more[-1] > gain:
                    gain, limit, way = gains[steps] + more[-1], steps + len(more) - 1, tail
            choices.append(_Choice(gain, limit, steps, way))
        return choices

    def _plan_all(self, chosen: Collection[Sequence], part: int, k: int) -> list[tuple[Sequence, _Choice]]:
        """Everybody drafts k tokens with this drafter."""
        plan = []
        for each in chosen:
            self._row(each)
            if not each.may_use(part):
                plan.append((each, _NOTHING))
                continue
            steps = k if each.has_auto_k else min(k, each.num_speculative_tokens)
            plan.append((each, _Choice(0.0, steps, steps, self._steppers[part])))
        return plan

    def _apply(self, plan: Collection[tuple[Sequence, _Choice]]) -> None:
        for sequence, choice in plan:
            sequence.way, sequence.num_own_drafts = choice.way, choice.num_steps
            if sequence.has_auto_k:
                sequence.num_speculative_tokens = choice.limit

    # -- probes -----------------------------------------------------------------------------------------------

    def _due_part(self, num_rounds: int, *, is_drafting: bool) -> int | None:
        """A choice for so many rounds; the drafter that is to be tried first though it was not chosen."""
        due = None
        for part, probing in self._probing.items():
            if is_drafting and part == self._part:
                probing.wake()
            elif probing.is_due(num_rounds) and due is None:
                due = part
        return due

    def _begin_probe(self, part: int) -> None:
        way = self._steppers[part]
        for row in self._rows.values():
            self._acceptance(row, way).fade()
        self._probing[part].begin()
        self._part, self._num_probes = part, _PROBE_ROUNDS


def _room(sequence: Sequence) -> int:
    """The most drafts that its budget has room for."""
    return max(0, sequence.remaining - sequence.num_rounds_ahead - 1)
