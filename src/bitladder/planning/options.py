"""What every group may become: its formats as (weight bits, predicted score), less those that no plan can need.

Bits are one cost of a format. Where plans ask for speed they are the picoseconds that a group's layer takes instead
(`bitladder.planning.speed`): whole numbers too, with which everything that plans does the same.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import MeasurementError
from bitladder.formats import group_bits
from bitladder.records import BF16, Measurement, QuantGroup

Cost = Callable[[QuantGroup, str], int]  # of a group in a format; None stands for its weight bits


@dataclass(frozen=True)
class Options:
    """The choices of one group that no other of its choices dominates.

    Attributes:
        group: its name.
        names: [choices] formats; bf16 before the others, which are in the measurement's order.
        bits: [choices] int64, weight bits, or another cost.
        scores: [choices] float64, predicted damage. The more bits, the less of it: no two are equal in either.
    """

    group: str
    names: tuple[str, ...]
    bits: NDArray[np.int64]
    scores: NDArray[np.float64]

    def only(self, kept: NDArray[np.bool_]) -> "Options":
        """Return these options without those that aren't kept, [choices] bool."""
        if kept.all():
            return self
        names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        return Options(self.group, names, self.bits[kept], self.scores[kept])


def options_of(measurement: Measurement, excluded: Iterable[str] = (), cost: Cost | None = None) -> list[Options]:
    """Return the options of every group, in network order; those of an excluded group are bf16 alone.

    Raises:
        MeasurementError: see `check_usable`.
    """
    check_usable(measurement)
    apart, table, cost = frozenset(excluded), measurement.by_group(), cost or group_bits
    found = []
    for group in measurement.groups:
        choices = [(BF16, cost(group, BF16), 0.0)]
        if group.name not in apart:
            row = table[group.name]
            known = [name for name in measurement.formats if name in row]
            choices += [(name, cost(group, name), measurement.sensitivity(row[name])) for name in known]
        choices = _undominated(choices)
        found.append(
            Options(
                group.name,
                tuple(name for name, _, _ in choices),
                np.array([bits for _, bits, _ in choices], dtype=np.int64),
                np.array([score for _, _, score in choices], dtype=np.float64),
            )
        )
    return found


def _undominated(choices: Sequence[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """Return the choices without those that another one equals or betters in bits and in score; of equals the first.

    Whatever the other groups are, such a choice leads to nothing that the other one doesn't lead to as well.
    """
    kept, least = [], math.inf
    for index in sorted(range(len(choices)), key=lambda i: (choices[i][1], choices[i][2], i)):
        if choices[index][2] < least:
            least = choices[index][2]
            kept.append(index)
    return [choices[index] for index in sorted(kept)]


def check_usable(measurement: Measurement) -> None:
    """Refuse a measurement whose plans would mean nothing.

    Raises:
        MeasurementError: no candidate, a score that is NaN or Inf, or bits that contradict the format.
    """
    if not measurement.candidates:
        raise MeasurementError("the measurement has no quant group or no format: nothing to plan; measure again")
    groups = {group.name: group for group in measurement.groups}
    for candidate in measurement.candidates:
        score = measurement.sensitivity(candidate)
        if not math.isfinite(score):
            raise MeasurementError(f"the score of {candidate.group} in {candidate.format} is {score}; measure again")
        wanted = group_bits(groups[candidate.group], candidate.format)
        if candidate.weight_bits != wanted:
            raise MeasurementError(
                f"{candidate.group} in {candidate.format} is recorded with {candidate.weight_bits} bits, but its "
                f"{groups[candidate.group].weight_elements} weights take {wanted}; measure again"
            )
