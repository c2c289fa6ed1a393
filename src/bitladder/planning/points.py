"""Pareto-optimal sums of (weight bits, score) over groups, which grow by one group at a time.

Of points that are equal in both the one is kept that the earlier option leads to (bf16 before the formats in the
measurement's order), the last group deciding first. So what comes out depends on the measurement alone.

Source: Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 15(9), 1969.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitladder.planning.options import Options

MAX_FRONTIER_CHOICES = 20_000_000  # stored over all groups, 5 bytes each: 100 MB


class TooManyPoints(Exception):
    """More than `MAX_FRONTIER_CHOICES` would have to be stored."""


class _Stage(NamedTuple):
    """One group's step: which point of the stage before, and which option, each point came from.

    Both are None where the group has one option: each point came from the one of the same place.
    """

    options: Options
    parent: NDArray[np.int32] | None = None
    choice: NDArray[np.int8] | None = None


class Points:
    """Pareto-optimal sums of the groups so far, and how each came about; of no group at first.

    Attributes:
        bits: [points] int64, ascending.
        scores: [points] float64, descending: no point is as good as another in both. Added up in the groups' order.
    """

    def __init__(self) -> None:
        self.bits: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self.scores: NDArray[np.float64] = np.zeros(1, dtype=np.float64)
        self._stages: list[_Stage] = []
        self._stored = 0

    def extend(self, options: Options) -> None:
        """Add one group's options to every point, and keep what isn't dominated.

        Raises:
            TooManyPoints: there are too many.
        """
        count, choices = len(self.bits), len(options.names)
        if choices == 1:
            self.bits, self.scores = self.bits + options.bits[0], self.scores + options.scores[0]
            self._stages.append(_Stage(options))
            return
        if self._stored + count * choices > MAX_FRONTIER_CHOICES:
            raise TooManyPoints
        bits = (self.bits + options.bits[:, None]).ravel()
        scores = (self.scores + options.scores[:, None]).ravel()
        order = np.argsort(bits, kind="stable")  # a few sorted runs; equal bits stay in the order of the options
        bits, scores = bits[order], scores[order]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], scores[:-1])))
        kept = np.flatnonzero(scores < best_before)
        kept = kept[np.append(bits[kept[1:]] > bits[kept[:-1]], True)]  # of equal bits the last is the best
        self.bits, self.scores, origin = bits[kept], scores[kept], order[kept]
        self._stages.append(_Stage(options, (origin % count).astype(np.int32), (origin // count).astype(np.int8)))
        self._stored += len(kept)

    def keep(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> None:
        """Drop the other points, just after a group with several options was added."""
        last = self._stages[-1]
        assert last.parent is not None
        assert last.choice is not None
        self._stored -= len(self.bits)
        self.bits, self.scores = self.bits[kept], self.scores[kept]
        self._stages[-1] = _Stage(last.options, last.parent[kept], last.choice[kept])
        self._stored += len(self.bits)

    def assignment(self, index: int) -> dict[str, str]:
        """Return `{group: format}` of a point."""
        formats = {}
        for stage in reversed(self._stages):
            formats[stage.options.group] = stage.options.names[0 if stage.choice is None else stage.choice[index]]
            index = index if stage.parent is None else int(stage.parent[index])
        return dict(reversed(formats.items()))

    def inside(self, max_bits: float, max_score: float) -> range:
        """Return which points have at most so many bits and at most this score."""
        first = int(np.searchsorted(-self.scores, -max_score, side="left"))
        return range(first, int(np.searchsorted(self.bits, max_bits, side="right")))
