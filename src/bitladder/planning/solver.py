"""One point of the trade-off without the others: exact, for many groups and formats.

The answer lies in a rectangle: at most so many bits, at most such a score. One side is the budget, the other what some
assignment within the budget reaches. Points grow group by group as in `Frontier`, but those are dropped that can't come
to lie in the rectangle: the relaxation of the groups that follow says so, with a margin for rounding. Before, options
are dropped that can't be part of such a point; most groups have one left. First searches that keep only the most
promising points make the rectangle small. As what is dropped is no part of an answer, the last search finds exactly the
points that `Frontier` has in the rectangle, ties included.

Source: Dyer, Kayal and Walker, "A branch and bound algorithm for solving the multiple-choice knapsack problem", Journal
of Computational and Applied Mathematics 11(2), 1984; Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", European Journal of Operational Research 83(2), 1995.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import PlanError
from bitladder.planning.options import Cost, Options
from bitladder.planning.points import MAX_FRONTIER_CHOICES, Points, TooManyPoints
from bitladder.planning.relaxation import Curve, Relaxation
from bitladder.planning.trade_off import TradeOff
from bitladder.records import Measurement

_FIRST_SEARCHES = (300, 5000)  # points that each keeps: most budgets are solved by the first, or by the one after it
_HOPE = 8  # a search looks first in the part of its rectangle, one in so many, that is nearest to the bound
_NONE = range(0)


class Solver(TradeOff):
    """Answers for single budgets."""

    def __init__(self, measurement: Measurement, excluded: Iterable[str] = (), cost: Cost | None = None) -> None:
        super().__init__(measurement, excluded, cost)
        sizes = [len(one.bits) for one in self.options]
        self._firsts = np.concatenate(([0], np.cumsum(sizes)[:-1]))  # [groups] of the options of all groups in a row
        self._group = np.repeat(np.arange(len(sizes)), sizes)
        self._saved = np.concatenate([one.bits.max() - one.bits for one in self.options]).astype(np.float64)
        self._added = np.concatenate([one.scores - one.scores.min() for one in self.options])
        self._curve = Curve.of(self.relaxation.saved, self.relaxation.added)
        self._singles: dict[tuple[int, int], Options] = {}
        self._below_zero = sum(abs(float(one.scores.min())) for one in self.options)

    def least_score(self, max_bits: int) -> dict[str, str] | None:
        """Return the formats of the least score with at most so many weight bits, or None where there are none.

        Raises:
            PlanError: too many points are as promising as each other.
        """
        if max_bits < self.least_bits:
            return None
        _, score = self._after(self.relaxation.steps_to(max_bits))
        saved = np.array([max(0, self.most_bits - max_bits)], dtype=np.float64)
        bound = self.relaxation.start_score + float(self._curve.at(saved)[0])
        for most in (*_FIRST_SEARCHES, None):
            for trial in (min(score, bound + (score - bound) / _HOPE), score):
                points, inside, whole = self._search(max_bits, trial, most)
                if inside and whole:
                    return points.assignment(inside[-1])
                if inside:
                    score = float(points.scores[inside[-1]])
                    break
        raise AssertionError("the last search keeps what leads to the assignment that is known")

    def hull(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the bits and scores of the frontier's convex hull, from its least score on."""
        return self.most_bits - self._curve.saved.astype(np.int64), self.relaxation.start_score + self._curve.added

    def totals(self, max_bits: int) -> tuple[int, float]:
        """Return the weight bits and the score of `least_score`, which must have an answer."""
        formats = self.least_score(max_bits)
        assert formats is not None
        chosen = [one.names.index(name) for one, name in zip(self.options, formats.values(), strict=True)]
        return self._totals(chosen)

    def _within(self, max_score: float, rounding: float) -> tuple[Points, range]:
        steps = int(np.searchsorted(np.cumsum(self.relaxation.added), max_score - self.relaxation.start_score)) + 1
        safe, bits = max_score - rounding, self.most_bits
        for count in range(min(steps, len(self.relaxation.added)), -1, -1):
            reached, score = self._after(count)
            if score <= safe:
                bits = reached
                break
        most_saved = np.interp(max_score - self.relaxation.start_score, self._curve.added, self._curve.saved)
        bound = min(bits, self.most_bits - int(most_saved))
        for most in (*_FIRST_SEARCHES, None):
            for trial in (bound + (bits - bound) // _HOPE, bits):
                points, inside, whole = self._search(trial, max_score + rounding, most)
                sure = next((int(points.bits[index]) for index in inside if points.scores[index] <= safe), None)
                if whole and (sure is not None or trial == bits):
                    return points, inside
                if sure is not None:
                    bits = sure
                    break
        raise AssertionError("the last search keeps all that the rectangle has")

    def _after(self, steps: int) -> tuple[int, float]:
        """Return the bits and the score, as a point has it, of the assignment that so many of the steps lead to."""
        return self._totals(self.relaxation.after(steps))

    def _totals(self, chosen: Sequence[int] | NDArray[np.intp]) -> tuple[int, float]:
        """Return the bits of an assignment, and its score as a point has it."""
        bits = sum(int(one.bits[i]) for one, i in zip(self.options, chosen, strict=True))
        scores = [one.scores[i] for one, i in zip(self.options, chosen, strict=True)]
        return bits, float(np.cumsum(scores)[-1])  # one after the other, as points add up

    def _search(self, max_bits: int, max_score: float, most: int | None) -> tuple[Points, range, bool]:
        """Return points, those in the rectangle, and whether these are all that the frontier has there.

        Args:
            max_bits: the rectangle's.
            max_score: the rectangle's.
            most: keep at most so many points, those that may come to the least score; None: all.

        Raises:
            PlanError: more points than fit in memory.
        """
        options = self._possible(max_bits, max_score)
        points, whole = Points(), True
        if any(not one.names for one in options):
            return points, _NONE, True
        margin = self._margin(max_score)
        try:
            for one, rest in zip(options, _rests(options), strict=True):
                points.extend(one)
                if rest is None:
                    continue
                lowest = (
                    points.scores
                    + rest.score
                    + rest.curve.at((points.bits + (rest.bits - max_bits)).astype(np.float64))
                )
                kept = np.flatnonzero(lowest <= max_score + margin)
                if not len(kept):
                    return points, _NONE, whole
                if most is not None and len(kept) > most:
                    kept = np.sort(kept[np.argpartition(lowest[kept], most)[:most]])
                    whole = False
                points.keep(kept)
        except TooManyPoints:
            raise PlanError(
                f"the exact choice among {len(self.options)} groups with {len(self.measurement.formats)} formats "
                f"exceeds {MAX_FRONTIER_CHOICES:,} stored choices; use coverage or include, or fewer formats"
            ) from None
        return points, points.inside(max_bits, max_score), whole

    def _possible(self, max_bits: int, max_score: float) -> list[Options]:
        """Return the options that a point in the rectangle may have, by the Lagrangian bound.

        At the price of the relaxation's last step to `max_bits`, no point does less than the sum of what each group
        does at best, and an option costs what it does beyond that.
        """
        steps = self.relaxation.steps_to(max_bits)
        price = float(self.relaxation.added[steps - 1] / self.relaxation.saved[steps - 1]) if steps else 0.0
        cost = self._added - price * self._saved
        best = np.minimum.reduceat(cost, self._firsts)
        value = price * max(0, self.relaxation.start_bits - max_bits)
        bound = self.relaxation.start_score + value + float(best.sum())
        kept = bound + (cost - best[self._group]) <= max_score + self._margin(max_score, value)
        left = np.add.reduceat(kept.astype(np.intp), self._firsts).tolist()
        found = list(self.options)
        for index, (one, count) in enumerate(zip(self.options, left, strict=True)):
            if count < len(one.names):
                first = int(self._firsts[index])
                mine = kept[first : first + len(one.names)]
                found[index] = self._alone(index, int(mine.argmax())) if count == 1 else one.only(mine)
        return found

    def _alone(self, group: int, option: int) -> Options:
        """Return a group's options without all but one."""
        if (group, option) not in self._singles:
            one = self.options[group]
            self._singles[group, option] = one.only(np.arange(len(one.names)) == option)
        return self._singles[group, option]

    def _margin(self, *sizes: float) -> float:
        """Return how far a bound may be off that is made of sums up to these sizes: some rounding for every group."""
        size = 2 * self._below_zero + sum(map(abs, sizes))
        return 8 * (len(self.options) + 4) * float(np.finfo(np.float64).eps) * size


def outline(measurement: Measurement, count: int) -> list[tuple[int, float]]:
    """Return (weight bits, score) of about `count` points of the frontier, evenly spaced in bits; 0: its convex hull's.

    Every one is on the frontier: nothing of its size does less damage. Between them it has more.

    Raises:
        MeasurementError: a score is NaN or Inf. PlanError: too many points are as promising as each other.
    """
    solver = Solver(measurement)
    if count <= 0:
        bits, scores = solver.hull()
        return list(zip(bits.tolist()[::-1], scores.tolist()[::-1], strict=True))
    budgets = np.linspace(solver.least_bits, solver.most_bits, max(count, 2)).astype(np.int64)
    found = dict.fromkeys(solver.totals(int(budget)) for budget in budgets)
    return list(found)


@dataclass(frozen=True)
class _Rest:
    """The groups after one: their bits and score at their least scores, and how the score grows as bits are saved."""

    bits: int
    score: float
    curve: Curve


def _rests(options: Sequence[Options]) -> list[_Rest | None]:
    """Return what comes after each group; None for a group with one option."""
    least = [0 if len(one.names) == 1 else int(np.argmin(one.scores)) for one in options]
    bits = _after_each(np.array([one.bits[i] for one, i in zip(options, least, strict=True)]))
    scores = _after_each(np.array([one.scores[i] for one, i in zip(options, least, strict=True)]))
    open_ = [index for index, one in enumerate(options) if len(one.names) > 1]
    relaxation = Relaxation.of([options[index] for index in open_])
    found: list[_Rest | None] = [None] * len(options)
    for place, index in enumerate(open_):
        later = relaxation.owner > place
        curve = Curve.of(relaxation.saved[later], relaxation.added[later])
        found[index] = _Rest(int(bits[index]), float(scores[index]), curve)
    return found


def _after_each(values: NDArray[Any]) -> NDArray[Any]:
    """Return the sum of all values after each one."""
    return np.append(np.cumsum(values[:0:-1])[::-1], values[:1] * 0)
