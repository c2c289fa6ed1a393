"""The trade-off of weight bits against predicted score: what can be asked of it, and the whole of it.

Every group gets one of its options. An assignment's bits are an integer, its score the sum of the groups' scores, added
up in network order. `Frontier` holds every Pareto-optimal pair of the two, so that a budget on either side is one
look-up; `bitladder.planning.solver` answers for one budget without the others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import FrontierTooLarge
from bitladder.planning.options import Cost, options_of
from bitladder.planning.points import MAX_FRONTIER_CHOICES, Points, TooManyPoints
from bitladder.planning.relaxation import Relaxation
from bitladder.records import BF16, Measurement


class TradeOff(ABC):
    """What can be asked of a measurement's trade-off. Both kinds answer the same, to the last bit.

    Among equal points the answer is that of fewer bits, then of the better score, then of the earlier choice (bf16
    before the formats in the measurement's order), the last group deciding first.

    Attributes:
        measurement: whose trade-off it is.
        excluded: groups that stay in bf16.
        cost: what stands for weight bits where these are spoken of; None: they themselves.
        options: of every group, in network order.
        relaxation: of all groups.

    Raises:
        MeasurementError: see `options.check_usable`.
    """

    def __init__(self, measurement: Measurement, excluded: Iterable[str] = (), cost: Cost | None = None) -> None:
        self.measurement = measurement
        self.excluded = frozenset(excluded)
        self.cost = cost
        self.options = options_of(measurement, self.excluded, cost)
        self.relaxation = Relaxation.of(self.options)

    @abstractmethod
    def least_score(self, max_bits: int) -> dict[str, str] | None:
        """Return the formats of the least score with at most so many weight bits, or None where there are none."""

    @abstractmethod
    def _within(self, max_score: float, rounding: float) -> tuple[Points, range]:
        """Return points, and which of them to try: all with at most this score and `rounding` more, up to one of at
        most this score and `rounding` less."""

    def fewest_bits(self, max_score: float) -> dict[str, str] | None:
        """Return the formats of the fewest bits with at most this score; None where nothing can be quantised within it.

        A point's score carries the rounding of adding up group by group: what counts is the exactly rounded sum.
        """
        least = math.fsum(float(one.scores.min()) for one in self.options)
        most = math.fsum(float(one.scores.max()) for one in self.options)
        if max_score < least:
            return None
        # of the terms of a sum that is at most `reach`, the absolute values add up to no more than `terms`
        reach = min(max_score, most)
        terms = abs(reach) + 2 * sum(abs(float(one.scores.min())) for one in self.options)
        points, tried = self._within(reach, len(self.options) * float(np.finfo(np.float64).eps) * terms)
        scores = [dict(zip(one.names, one.scores.tolist(), strict=True)) for one in self.options]
        for index in tried:
            formats = points.assignment(index)
            exact = math.fsum(row[name] for row, name in zip(scores, formats.values(), strict=True))
            if exact <= max_score and any(name != BF16 for name in formats.values()):
                return formats
        return None

    @property
    def least_bits(self) -> int:
        """The fewest weight bits of any assignment."""
        return sum(int(one.bits.min()) for one in self.options)

    @property
    def most_bits(self) -> int:
        """The weight bits of the least score; more of them gain nothing."""
        return self.relaxation.start_bits

    def attainable_scores(self) -> tuple[float, float]:
        """Return the least score at which something is quantised, and that of everything in its fewest bits."""
        if any(one.names[int(np.argmin(one.scores))] != BF16 for one in self.options):
            low = math.fsum(float(one.scores.min()) for one in self.options)
        else:
            low = min(float(score) for one in self.options for score in one.scores if score > 0)
        return low, math.fsum(float(one.scores[int(np.argmin(one.bits))]) for one in self.options)


class Frontier(TradeOff):
    """Every Pareto-optimal (weight bits, predicted score) of a measurement.

    bits: [points] int64, ascending. scores: [points] float64, descending: no point is as good as another in both.

    Raises:
        FrontierTooLarge: it would not fit in memory. MeasurementError: see `options.check_usable`.
    """

    def __init__(self, measurement: Measurement, excluded: Iterable[str] = ()) -> None:
        super().__init__(measurement, excluded)
        self._points = Points()
        try:
            for options in self.options:
                self._points.extend(options)
        except TooManyPoints:
            raise FrontierTooLarge(
                f"the exact frontier of {len(measurement.groups)} groups with {len(measurement.formats)} formats "
                f"exceeds {MAX_FRONTIER_CHOICES:,} stored choices; plan single targets, which do without it, or use "
                "fewer formats"
            ) from None
        self.bits: NDArray[np.int64] = self._points.bits
        self.scores: NDArray[np.float64] = self._points.scores

    @property
    def effective_bits(self) -> NDArray[np.float64]:
        """Effective bits of each point."""
        return np.asarray(self.bits / self.measurement.searched_weights, dtype=np.float64)

    def assignment(self, index: int) -> dict[str, str]:
        """Return `{group: format}` of a point."""
        return self._points.assignment(index)

    def within_bits(self, max_bits: int) -> int | None:
        """Return the point of the least score with at most so many weight bits, or None where there is none."""
        index = int(np.searchsorted(self.bits, max_bits, side="right")) - 1
        return index if index >= 0 else None

    def within_score(self, max_score: float) -> int | None:
        """Return the point of the fewest bits with at most this score, or None where there is none."""
        index = int(np.searchsorted(-self.scores, -max_score, side="left"))
        return index if index < len(self.scores) else None

    def least_score(self, max_bits: int) -> dict[str, str] | None:
        """Return the formats of the least score with at most so many weight bits, or None where there are none."""
        index = self.within_bits(max_bits)
        return None if index is None else self.assignment(index)

    def _within(self, max_score: float, rounding: float) -> tuple[Points, range]:
        return self._points, self._points.inside(np.inf, max_score + rounding)


def frontier(measurement: Measurement) -> Frontier:
    """Return the whole trade-off of a measurement.

    Raises:
        MeasurementError: a score is NaN or Inf. FrontierTooLarge: it would not fit in memory.
    """
    return Frontier(measurement)
