"""What rounds take, from what they took: a model of few numbers, kept up to date while an engine runs.

A round of n sequences in which a drafter makes k drafts each, and the target then reads R rows (drafts, and one more of
each sequence), takes

    T = draft(n, k) + verify(R) + rest(n)

seconds. The first is a line in k for each n (`Line`: a drafter begins with the tokens that it lacks, then goes on one
by one), the others are curves through what was measured (`Curve`). verify(R) is the same curve whichever batch and k
the rows came from, so that what a round of one kind took says something of all others. Where a round was replayed as a
whole, its parts are not known: then verify(n) + rest(n) is what a round without drafts took, and whatever drafts added
to it counts as theirs.

Whatever makes the machine slower makes all rounds slower: `pace` follows that at once, and what was measured long ago
moves along. All curves are seconds at the pace 1. The pace and the place of a curve that was measured are corrected by
shares of one deviation, so that neither moves for long without the other: times that only scatter, as they do on a busy
machine, leave every place where it is, whether it is measured in each round or never again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable

# Of a curve: measurements of which the lowest counts (the first may have met a cold machine), how fast later ones move
# it, how far off one may be and still count in full, for how many notes of the curve one is trusted, and for which
# change of the pace (a machine whose memory is slow has other ratios, too); how far above its neighbours a single one
# may be.
NUM_FIRST = 2
_RATE = 0.08
_MOST = 1.5
_TRUSTED = 512
_TRUSTED_PACE = 1.5
_PLAUSIBLE = 2.0
# Of the pace: how fast it follows.
_PACE_RATE = 0.25
# Seconds at the pace 1 below which nothing is told apart.
LEAST_SECONDS = 1e-9
# What such a measurement still weighs at the next.
_MISSED_MEMORY = 0.75
# What one more row costs, of the whole, before two places of a curve are known.
_ASSUMED_ROW = 0.05
# What a draft costs, of a round without, before one was measured.
_ASSUMED_DRAFT = 0.15


class _Point:
    """Seconds at one place of a curve."""

    __slots__ = ("count", "noted_at", "pace", "value")

    def __init__(self, value: float, now: int, pace: float) -> None:
        self.value, self.count, self.noted_at, self.pace = value, 1, now, pace

    def is_fresh(self, now: int, pace: float) -> bool:
        is_like_now = pace < _TRUSTED_PACE * self.pace and self.pace < _TRUSTED_PACE * pace
        return is_like_now and now - self.noted_at <= _TRUSTED

    def is_known(self, now: int, pace: float) -> bool:
        return self.count >= NUM_FIRST and self.is_fresh(now, pace)

    def note(self, value: float, now: int, pace: float) -> float:
        """Returns how far off it was expected to be; 0.0 where nothing was to be expected."""
        is_fresh, self.noted_at, self.pace = self.is_fresh(now, pace), now, pace
        if not is_fresh:
            self.value, self.count = value, 1
            return 0.0
        self.count += 1
        if self.count <= NUM_FIRST:
            self.value = min(self.value, value)
            return 0.0
        deviation = _deviation(value, self.value)
        self.value *= math.exp(deviation * max(1.0 / self.count, _RATE))
        return deviation


class Curve:
    """Seconds by a size: measured, and lines between neighbours.

    num_notes: measurements so far
    """

    def __init__(self) -> None:
        self._pace = 1.0
        self._points: dict[int, _Point] = {}
        self._places: list[int] = []
        self.num_notes = 0

    def note(self, size: int, seconds: float, pace: float) -> float:
        """So long it took at this size, on a machine of this pace. Returns how far off that was, as a share of what was
        measured there; 0.0 where too little was."""
        self.num_notes += 1
        self._pace = pace
        place = _place(size)
        point = self._points.get(place)
        if point is not None:
            return point.note(seconds / pace, self.num_notes, pace)
        self._points[place] = _Point(seconds / pace, self.num_notes, pace)
        self._places = sorted(self._points)
        return 0.0

    def count(self, size: int) -> int:
        """How often it was measured there."""
        point = self._points.get(_place(size))
        return 0 if point is None else point.count

    def at(self, size: int) -> float:
        """Seconds at this size, at the pace 1, never more than at the next larger one; 0 if nothing was measured."""
        above = bisect_right(self._places, size)
        while above < len(self._places) and self._points[self._places[above]].count < NUM_FIRST:
            above += 1
        if above == len(self._places):
            return self._at(size)
        return min(self._at(size), self._points[self._places[above]].value)

    def _at(self, size: int) -> float:
        """As it was measured, or as its neighbours say.

        A measurement that is old, or of another pace, counts only if it is lower than its neighbours say: what seems
        dear would never be tried again. So does one that was made but once and is far from them.
        """
        point = self._points.get(size)
        if point is not None:
            if self._is_known(size) or len(self._places) == 1:
                return point.value
            expected = self._between(size, [place for place in self._places if place != size])
            is_plausible = point.is_fresh(self.num_notes, self._pace) and point.value <= _PLAUSIBLE * expected
            return point.value if is_plausible else min(point.value, expected)
        return self._between(size, self._places)

    def _is_known(self, place: int) -> bool:
        return self._points[place].is_known(self.num_notes, self._pace)

    def slope(self) -> float:
        """Seconds that one more adds, from the lowest place to the highest of those that are known: what seems dear
        from one slow measurement, or an old one, would never be tried again."""
        if not self._places:
            return 0.0
        first = self._places[0]
        last = next((place for place in reversed(self._places) if self._is_known(place)), first)
        low = self._points[first].value
        if last < 2 * first:  # too near to tell
            return low * _ASSUMED_ROW / (1.0 + _ASSUMED_ROW * first)
        return max(0.0, (self._points[last].value - low) / (last - first))

    def _last_slope(self, places: list[int]) -> float:
        """What one more adds beyond the highest place: as over the upper half, where that is more than on average. A
        forward that has been waiting for memory begins to compute."""
        last, slope = places[-1], self.slope()
        middle = next((place for place in reversed(places) if 2 * place <= last), None)
        if middle is None:
            return slope
        return max(slope, (self._points[last].value - self._points[middle].value) / (last - middle))

    def _between(self, size: int, places: list[int]) -> float:
        if not places:
            return 0.0
        index = bisect_left(places, size)
        if index == len(places):
            return self._points[places[-1]].value + (size - places[-1]) * self._last_slope(places)
        value = self._points[places[index]].value
        if places[index] == size:
            return value
        if not index:
            return max(0.5 * value, value - (places[0] - size) * self.slope())
        low, below = places[index - 1], self._points[places[index - 1]].value
        return below + (value - below) * (size - low) / (places[index] - low)


class Line:
    """Seconds of k drafts, k > 0: the line through what was measured that misses it least, the latest counting most.

    num_notes: measurements so far
    """

    def __init__(self) -> None:
        self.num_notes = 0
        # Weighted: measurements, and means of k, seconds, their products' deviations.
        self._weight = self._k = self._seconds = self._kk = self._ks = 0.0

    def note(self, k: int, seconds: float) -> None:
        """So long k drafts took."""
        self.num_notes += 1
        if self.num_notes == NUM_FIRST and k == self._k:
            self._seconds = min(self._seconds, seconds)
            return
        if self.num_notes > 1:
            expected = self.at(k)
            seconds = min(max(seconds, expected / _MOST), expected * _MOST)
        self._weight = 1.0 + (1.0 - _RATE / 2) * self._weight
        share = 1.0 / self._weight
        off_k, off_seconds = k - self._k, seconds - self._seconds
        self._k += share * off_k
        self._seconds += share * off_seconds
        self._kk += share * ((1.0 - share) * off_k * off_k - self._kk)
        self._ks += share * ((1.0 - share) * off_k * off_seconds - self._ks)

    def at(self, k: int) -> float:
        """Seconds of k drafts; before two ks were seen, as if the beginning were one draft more."""
        step = self._seconds / (self._k + 1.0)
        # Little is known of a line from two ks that are neighbours: what is assumed counts as much as a deviation of 1.
        slope = (self._ks + 0.25 * step) / (self._kk + 0.25)
        slope = min(max(slope, 0.0), 2.0 * step)
        return max(0.0, self._seconds + (k - self._k) * slope)


class RoundCosts:
    """The model, by drafter: a drafter is known by any name that the caller gives it."""

    def __init__(self) -> None:
        self.pace = 0.0
        self._draft: dict[Hashable, dict[int, Line]] = {}
        self._verify = Curve()
        self._rest = Curve()
        self._has_parts = True
        # What is not the target's forward, of a round that Python ran alone, and of one of several in a row.
        self._outside = {True: Curve(), False: Curve()}
        # By drafter, of tokens that it missed and computed before it drafted: seconds, at the pace 1, and how many.
        self._missed: dict[Hashable, tuple[float, float]] = {}
        self._tried: set[Hashable] = set()

    def note(
        self,
        size: int,
        k: int,
        num_rows: int,
        seconds: float,
        *,
        drafter: Hashable = None,
        draft: float | None = None,
        verify: float | None = None,
        num_missed: int = 0,
    ) -> None:
        """A round took this long.

        k:             the most drafts that the drafter made of a sequence
        draft, verify: its parts, where they are known
        num_missed:    tokens that others drafted, or nobody, which the drafter had to compute first
        """
        if not self.pace:
            self.pace = seconds
        pace, self._has_parts = self.pace, verify is not None
        if k:
            self._tried.add(drafter)
        if num_missed and self.knows_draft(drafter):
            if verify is not None and draft is not None:
                longer = draft / pace - self.draft(size, drafter)(k)
            else:
                longer = seconds / pace - self._predict(size, k, num_rows, drafter)
            took, count = self._missed.get(drafter, (0.0, 0.0))
            took, count = _MISSED_MEMORY * took + max(0.0, longer), _MISSED_MEMORY * count + num_missed
            self._missed[drafter] = took, count
        drafting = self._line(size, drafter) if k and not num_missed else None
        deviation = 0.0
        if verify is not None:
            deviation = self._verify.note(num_rows, verify, pace)
            self._rest.note(size, max(0.0, seconds - verify - (draft or 0.0)), pace)
            if drafting is not None and draft is not None:
                drafting.note(k, draft / pace)
        elif not k:
            deviation = self._verify.note(size, seconds, pace)
        elif drafting is not None:
            if self._verify.count(size) >= NUM_FIRST and drafting.num_notes >= NUM_FIRST:
                expected = self._predict(size, k, num_rows, drafter)
                deviation = _deviation(seconds / pace, expected)
                seconds = pace * expected * (1.0 + deviation)
            drafting.note(k, max(0.0, seconds / pace - self._verify.at(size)))
        self.pace *= math.exp(_PACE_RATE * deviation)

    def note_outside(self, seconds: float, *, is_alone: bool) -> None:
        """What the noted round took beside the target's forward; whether Python ran it alone, or several in a row."""
        self._outside[is_alone].note(1, seconds, self.pace)

    def look(self) -> float:
        """Seconds that a round takes longer because Python looks at it before the next, at the pace 1; 0 where that was
        not measured."""
        alone, in_row = self._outside[True], self._outside[False]
        return max(0.0, alone.at(1) - in_row.at(1)) if in_row.num_notes else 0.0

    def missed(self, drafter: Hashable = None) -> float:
        """Seconds of a token that the drafter missed, at the pace 1."""
        took, count = self._missed.get(drafter, (0.0, 1.0))
        return took / count

    @property
    def knows_plain(self) -> bool:
        """Whether enough was measured to begin: the first rounds are without drafts. Of rounds whose parts are known
        one will do: those that follow show whether it was slow."""
        return self._verify.num_notes >= (1 if self._has_parts else NUM_FIRST)

    def knows_draft(self, drafter: Hashable = None) -> bool:
        """Whether a round of this drafter was measured."""
        return drafter in self._draft

    def may_guess_draft(self, drafter: Hashable) -> bool:
        """Whether what a drafter takes may be assumed for now: it has been tried, if only on what it had missed, and
        what the target took beside it is known."""
        return self.knows_draft(drafter) or (self._has_parts and drafter in self._tried)

    def draft(self, size: int, drafter: Hashable = None) -> Callable[[int], float]:
        """Seconds of k drafts of each of `size` sequences, at the pace 1; where that was not measured, in proportion to
        what was nearest."""
        lines = self._draft.get(drafter)
        if not lines:
            plain = self._verify.at(size)
            return lambda k: _ASSUMED_DRAFT * plain * k
        place = _place(size)
        line = lines.get(place)
        if line is not None:
            return line.at
        nearest = min(lines, key=lambda other: (abs(math.log(other / place)), other))
        near, scale = lines[nearest], (1.0 + _ASSUMED_ROW * place) / (1.0 + _ASSUMED_ROW * nearest)
        return lambda k: scale * near.at(k)

    def verify(self, num_rows: int, size: int) -> float:
        """Seconds of the target's forward over so many rows of `size` sequences, at the pace 1."""
        return self._verify.at(num_rows if self._has_parts else size)

    def rest(self, size: int) -> float:
        """Seconds of everything else, at the pace 1."""
        return self._rest.at(size)

    def _predict(self, size: int, k: int, num_rows: int, drafter: Hashable) -> float:
        seconds = self.verify(num_rows, size) + self.rest(size)
        return seconds + self.draft(size, drafter)(k) if k else seconds

    def _line(self, size: int, drafter: Hashable) -> Line:
        lines = self._draft.setdefault(drafter, {})
        place = _place(size)
        line = lines.get(place)
        if line is None:
            line = lines[place] = Line()
        return line

    def row(self) -> float:
        """Seconds that one more row of the target's forward takes, at the pace 1."""
        return self._verify.slope() if self._has_parts else 0.0

    def plain(self, size: int) -> float | None:
        """Seconds of a round without drafts, as they would be now; None before anything was measured."""
        return (self.verify(size, size) + self.rest(size)) * self.pace if self._verify.num_notes else None


def _deviation(seconds: float, expected: float) -> float:
    """As a share of what was expected, as far as one round counts."""
    return min(max(seconds / max(expected, LEAST_SECONDS), 1.0 / _MOST), _MOST) - 1.0


def _place(size: int) -> int:
    """Sizes share places, as far apart as an eighth to a quarter of them: 1, 2, … 8, 10, … 16, 20, … 32, 40, …"""
    step = 1 << max(0, size.bit_length() - 3)
    return (size + step // 2) // step * step
