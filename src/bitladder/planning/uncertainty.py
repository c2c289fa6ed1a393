"""How far calibration has settled the ranking: intervals and flips from resampled scoring batches. Pure, no torch.

The scoring batches are drawn again with replacement, n of n (a bootstrap); every draw gives each group another score
per bit saved, another rank, and each scheme another choice. Drawing k · n batches instead shows what k times as much
scoring data would leave open. A scheme's choice in a draw takes the groups in the order of score per bit saved, as far
as the scheme's own weights have room: for coverage that is the plan itself, for effective bits within a group of the
optimum. With few batches the spread comes out too small, by sqrt(1 - 1/n).

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 6 and 13 (percentile intervals).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitladder.records import BF16, Measurement, Scheme

RESAMPLES = 400
LEVEL = 0.9  # of the rank intervals
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of the scoring data at hand
SETTLED_FLIPS = 1.0  # expected groups that flip, below which more calibration is not worth asking for
_SEED = 0


@dataclass(frozen=True)
class Flips:
    """What another draw of the scoring batches would change in one scheme.

    Attributes:
        share: group -> share of the draws in which it changes sides; groups that never do are left out.
        expected: groups that change sides in a draw, on average, for each of `MULTIPLES` of the data at hand.
    """

    share: Mapping[str, float]
    expected: Mapping[int, float]

    @property
    def enough(self) -> int | None:
        """The least multiple of the data that leaves at most `SETTLED_FLIPS` open; None: not even the largest does."""
        return next((multiple for multiple, count in self.expected.items() if count <= SETTLED_FLIPS), None)


def _draws(batches: int, multiple: int) -> NDArray[np.float64]:
    """Return what each batch counts for in every draw of `multiple` · n batches, [draws, batches]."""
    generator = np.random.default_rng(_SEED)
    counts = generator.multinomial(multiple * batches, np.full(batches, 1 / batches), size=RESAMPLES)
    return np.asarray(counts / multiple, dtype=np.float64)


def _densities(measurement: Measurement, format_name: str, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return score per bit saved in every draw, [draws, groups], from what each batch counts for, [draws, batches].

    That of a group that can't have the format is Inf.
    """
    table = measurement.by_group()
    rows, saved = [], []
    for group in measurement.groups:
        candidate = table[group.name].get(format_name)
        if candidate is None:
            rows.append(np.zeros(counts.shape[1]))
            saved.append(1)
            continue
        rows.append(np.multiply(measurement.score_weights, candidate.scores))
        saved.append(group.bits_saved(candidate))
    found = np.asarray(counts @ (np.array(rows).T / np.array(saved)), dtype=np.float64)
    found[:, [format_name not in table[group.name] for group in measurement.groups]] = np.inf
    return found


def rank_intervals(measurement: Measurement, format_name: str) -> dict[str, tuple[int, int]]:
    """Return the `LEVEL` interval of every group's rank by score per bit saved, from 1; empty with one batch."""
    batches = len(measurement.score_weights)
    if batches < 2:
        return {}
    densities = _densities(measurement, format_name, _draws(batches, 1))
    ranks = np.argsort(np.argsort(densities, axis=1, kind="stable"), axis=1, kind="stable") + 1
    low, high = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="nearest")
    table = measurement.by_group()
    intervals = zip(table, low, high, strict=True)
    return {name: (int(a), int(b)) for name, a, b in intervals if format_name in table[name]}


def flips(measurement: Measurement, scheme: Scheme) -> Flips | None:
    """Return what another draw would change in a scheme.

    None where that can't be said: one batch, several formats, everything quantised, or chosen by name.
    """
    formats = {name for name in scheme.formats.values() if name != BF16}
    batches = len(measurement.score_weights)
    if len(formats) != 1 or BF16 not in scheme.formats.values() or scheme.by_name or batches < 2:
        return None
    (format_name,) = formats
    measurement = scheme.weigh(measurement)
    sizes = np.array([group.weight_elements for group in measurement.groups])
    chosen = np.array([scheme.formats[group.name] != BF16 for group in measurement.groups])
    room = int(sizes[chosen].sum())
    expected, share = {}, np.zeros(len(sizes))
    usual = _taken(_densities(measurement, format_name, np.ones((1, batches))), sizes, room)
    for multiple in MULTIPLES:
        changed = _taken(_densities(measurement, format_name, _draws(batches, multiple)), sizes, room) != usual
        expected[multiple] = float(changed.sum(axis=1).mean())
        if multiple == 1:
            share = changed.mean(axis=0)
    names = [group.name for group in measurement.groups]
    return Flips({name: float(s) for name, s in zip(names, share, strict=True) if s > 0}, expected)


def _taken(densities: NDArray[np.float64], sizes: NDArray[np.int64], room: int) -> NDArray[np.bool_]:
    """Return which groups a draw takes, [draws, groups]: the longest prefix of its order that has room."""
    order = np.argsort(densities, axis=1, kind="stable")
    fits = np.cumsum(sizes[order], axis=1) <= room
    taken = np.zeros(densities.shape, dtype=np.bool_)
    np.put_along_axis(taken, order, fits, axis=1)
    return taken
