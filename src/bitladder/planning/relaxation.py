"""Bounds on what groups can do together: the linear relaxation, where a group may be a blend of its options.

Each group starts at its option of the least score and may go down the lower convex hull of its options, in steps that
save bits and add score. All groups' steps, those first that add least a bit saved, are the relaxation's optimum for
every budget at once: a convex curve. Every combination of options lies on it or above.

Source: Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.planning.options import Options


@dataclass(frozen=True)
class Relaxation:
    """The steps of some groups, by score added a bit saved.

    Attributes:
        start: [groups] the option of the least score of each.
        start_bits: of all groups there.
        start_score: the sum of those least scores.
        owner: [steps] which group takes the step.
        option: [steps] to which of its options.
        saved: [steps] float64, weight bits (whole numbers).
        added: [steps] float64, score.
    """

    start: NDArray[np.intp]
    start_bits: int
    start_score: float
    owner: NDArray[np.intp]
    option: NDArray[np.intp]
    saved: NDArray[np.float64]
    added: NDArray[np.float64]

    @classmethod
    def of(cls, groups: Sequence[Options]) -> "Relaxation":
        """Return the relaxation of these groups."""
        least = [int(np.argmin(one.scores)) for one in groups]
        steps = [(rate, index, *rest) for index, one in enumerate(groups) for rate, *rest in _hull(one)]
        steps.sort()  # of equal rates the earlier group's first
        return cls(
            start=np.array(least, dtype=np.intp),
            start_bits=sum(int(one.bits[i]) for one, i in zip(groups, least, strict=True)),
            start_score=sum((float(one.scores[i]) for one, i in zip(groups, least, strict=True)), start=0.0),
            owner=np.array([step[1] for step in steps], dtype=np.intp),
            option=np.array([step[2] for step in steps], dtype=np.intp),
            saved=np.array([step[3] for step in steps], dtype=np.float64),
            added=np.array([step[4] for step in steps], dtype=np.float64),
        )

    def steps_to(self, max_bits: int) -> int:
        """Return how many of the steps it takes to come down to so many bits, or all where they don't suffice."""
        reached = np.searchsorted(np.cumsum(self.saved), self.start_bits - max_bits, side="left") + 1
        return 0 if self.start_bits <= max_bits else min(int(reached), len(self.saved))

    def after(self, steps: int) -> NDArray[np.intp]:
        """Return the option of each group, [groups], after so many of the steps."""
        chosen = self.start.copy()
        for group, option in zip(self.owner[:steps].tolist(), self.option[:steps].tolist(), strict=True):
            chosen[group] = option
        return chosen


@dataclass(frozen=True)
class Curve:
    """The least score that is added when so many bits are saved: convex, and linear between its corners."""

    saved: NDArray[np.float64]
    added: NDArray[np.float64]

    @classmethod
    def of(cls, saved: NDArray[np.float64], added: NDArray[np.float64]) -> "Curve":
        """Return the curve of these steps, which are in order."""
        return cls(np.concatenate(([0.0], np.cumsum(saved))), np.concatenate(([0.0], np.cumsum(added))))

    def at(self, saved: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the least score added when so many bits are saved; Inf where that can't be."""
        found: NDArray[np.float64] = np.interp(saved, self.saved, self.added)
        return np.where(saved > self.saved[-1], np.inf, found)


def _hull(options: Options) -> list[tuple[float, int, float, float]]:
    """Return (score added a bit saved, option, bits saved, score added) of each step down a group's lower hull."""
    order = np.argsort(-options.bits).tolist()
    bits, scores = options.bits.tolist(), options.scores.tolist()
    corners, rates = order[:1], list[float]()
    for option in order[1:]:
        while True:
            last = corners[-1]
            rate = (scores[option] - scores[last]) / (bits[last] - bits[option])
            if not rates or rates[-1] < rate:
                break
            corners.pop()
            rates.pop()
        corners.append(option)
        rates.append(rate)
    return [
        (rate, after, float(bits[before] - bits[after]), scores[after] - scores[before])
        for rate, before, after in zip(rates, corners[:-1], corners[1:], strict=True)
    ]
