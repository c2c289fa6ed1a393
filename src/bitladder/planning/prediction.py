"""From predicted scores to KL in nats per token: a map fitted on measured schemes, with an interval. No torch.

A sum of gradient scores ranks schemes but has no unit that means anything to a user; a sum of exact single-group KL is
already close to the scheme's KL. Over the range of a ladder both follow

    KL = factor · (Σ over formats of weight · ((1 - shrinkage) · score + shrinkage · mean))^exponent

where the scores are summed apart by the format that groups have, and `mean` is what as many weights in that format
score on average over the model. A gradient, which looks at small changes, makes more of one format's rounding than of
another's, which the weights make up for. And what differs between groups on the rows that were scored differs less on
others: groups that a plan chose for their low scores do more damage there than these say, groups of a random choice
less. That is regression to the mean; `shrinkage` says how much of it there is, none to most of it.

The weights of formats are near 1: in the fit, by least squares in logarithms, each logarithm of them, and the
shrinkage, is pulled to 0, the harder the fewer schemes were measured. With one format and no shrinkage this is the
usual regression of log KL on log score. The interval for one more scheme is

    log KL ± t(level, n - p) · s · sqrt(1 + j' (J'J + P)^-1 j)

with J the derivatives of log KL by the parameters, a row a scheme, j those of the one predicted, P the pulls, p the
parameters that count, the trace of J (J'J + P)^-1 J', and s² = Σ residual² / (n - p). A point's own prediction leaves
that point out of the fit: otherwise it would predict itself. Sources: Draper and Smith, Applied Regression Analysis,
3rd edition, section 3.1; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2nd edition, section
3.4.1; Efron and Morris, Stein's Paradox in Statistics, Scientific American 236 (5), 1977.

One quantile is no reason to need scipy: Student's t with a whole number of degrees of freedom has a finite sum.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitladder.planning.pricing import Parts, parts_by_format
from bitladder.records import Candidate, Measurement, Scheme

LEVEL = 0.9  # of the intervals
MIN_POINTS = 4  # two parameters, and two more for the spread
_PULLS = (0.03, 0.3, 3.0, 1e9)  # on log weights: a residual's variance over theirs, 0.1² over 0.6², up to none at all
_MOST_SHRINKAGE = 0.9  # of 1, where scores would say nothing of a group
_LEAST_RANGE = 0.01  # of the logarithms of scores: a line through what lies closer says nothing, nor can be found
_LARGEST = math.log(sys.float_info.max)


def students_t(level: float, freedom: int) -> float:
    """Return t > 0 with P(|T| < t) = level, for Student's t with `freedom` >= 1 degrees of freedom.

    Exact to 1e-12 up to a level of 0.99. P is concave in t > 0, so that Newton's steps from 0 rise to the answer and
    never pass it.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    log_density = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    t = 0.0
    while True:
        density = 2 * math.exp(log_density - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        further = t + (level - _within(t, freedom)) / density
        if further <= t * (1 + 1e-15):
            return t
        t = further


def _within(t: float, freedom: int) -> float:
    """Return P(|T| < t) for Student's t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    power = cosine if odd else 1.0
    terms = []
    for exponent in range(odd, freedom - 1, 2):
        terms.append(power)
        power *= cosine * cosine * (exponent + 1) / (exponent + 2)
    total = math.sin(angle) * math.fsum(terms)
    return 2 / math.pi * (angle + total) if odd else total


@dataclass(frozen=True)
class Predicted:
    """A KL and its interval, in nats per token."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class KlMap:
    """KL = factor · (Σ weight · ((1 - shrinkage) · score + shrinkage · mean))^exponent, with what intervals need."""

    factor: float
    exponent: float
    weights: Mapping[str, float]  # by format
    shrinkage: float
    means: Mapping[str, float]  # by format: of the scores of a weight, over the groups that can have it
    points: int
    freedom: int  # points that are left for the spread
    spread: float  # of log KL
    covariance: NDArray[np.float64]  # of log factor, exponent, log weights and shrinkage, over spread²

    @classmethod
    def fit(cls, means: Mapping[str, float], parts: Sequence[Parts], kls: Sequence[float]) -> Self | None:
        """Return the map through measured points; None where there are too few, or their scores hardly differ.

        Args:
            means: `pricing.mean_scores` of the measurement that the scores are of.
            parts: each one's scores and weights by format, of the formats of `means`; those whose scores don't add up
                to more than zero are left out, and of others a format's sum below zero counts for nothing.
            kls: measured KL, in nats per token.
        """
        seen = [(part, kl) for part, kl in zip(parts, kls, strict=True) if _total(part) > 0 and kl > 0]
        if len(seen) < MIN_POINTS:
            return None
        rows = zip(*(_rows(part, means) for part, _ in seen), strict=True)
        scores, evened = (np.maximum(np.array(each), 0.0) for each in rows)
        logs = np.log([kl for _, kl in seen])
        if np.ptp(np.log(scores.sum(axis=1))) < _LEAST_RANGE:
            return None
        for pull in _PULLS:
            fitted = _Fit.of(scores, evened, logs, pull)
            if fitted.counted <= len(seen) / 2 + 1e-6:
                break
        if abs(fitted.level) > _LARGEST:
            return None
        freedom = max(int(len(seen) - fitted.counted + 1e-6), 1)
        return cls(
            factor=math.exp(fitted.level),
            exponent=fitted.exponent,
            weights=dict(zip(means, np.exp(fitted.tilts).tolist(), strict=True)),
            shrinkage=fitted.shrinkage,
            means=dict(means),
            points=len(seen),
            freedom=freedom,
            spread=math.sqrt(fitted.squares / freedom),
            covariance=fitted.covariance,
        )

    def predict(self, parts: Parts) -> Predicted | None:
        """Return the KL of a scheme with these scores and weights by format; None where they add up to no damage.

        The sum is that of the scores that `weigh` gives: what is planned within `score_of` is predicted within its KL.
        """
        scores, evened = (np.array([row]) for row in _rows(parts, self.means))
        weights = np.array(list(self.weights.values()))
        if _weighed(scores, evened, weights, self.shrinkage).sum() <= 0:
            return None
        slopes = _slopes(scores, evened, weights, self.shrinkage, self.exponent)[0]
        value = math.log(self.factor) + self.exponent * float(slopes[1])
        error = self.spread * math.sqrt(1 + float(slopes @ self.covariance @ slopes))
        reach = students_t(LEVEL, self.freedom) * error
        return Predicted(*(_exp(one) for one in (value, value - reach, value + reach)))

    def of_scheme(self, measurement: Measurement, scheme: Scheme) -> Predicted | None:
        """Return the KL of what a scheme does to the weights, whatever it weighed to choose them; None: no damage."""
        return self.predict(parts_by_format(measurement, scheme.formats))

    def kl_of(self, score: float) -> float:
        """Return what a weighed sum of scores (> 0) means."""
        return _exp(math.log(self.factor) + self.exponent * math.log(score))

    def score_of(self, kl: float) -> float | None:
        """Return the greatest weighed sum whose KL is at most `kl` (> 0); None where KL doesn't grow with it."""
        if self.exponent <= 0:
            return None
        return _exp((math.log(kl) - math.log(self.factor)) / self.exponent)

    def weigh(self, measurement: Measurement) -> Measurement:
        """Return a measurement with weights and shrinkage in its scores: they add up to what `score_of` bounds."""
        elements = {group.name: group.weight_elements for group in measurement.groups}
        batches = math.fsum(measurement.score_weights)

        def weighed(one: Candidate) -> Candidate:
            weight, mean = self.weights[one.format], max(self.means[one.format], 0.0)
            even = weight * self.shrinkage * mean * elements[one.group] / batches  # the same of every batch
            own = weight * (1 - self.shrinkage)
            return one.model_copy(
                update={
                    "scores": tuple(own * score + even for score in one.scores),
                    "image_scores": tuple(own * score for score in one.image_scores),
                }
            )

        return measurement.model_copy(update={"candidates": tuple(map(weighed, measurement.candidates))})


def _total(parts: Parts) -> float:
    return math.fsum(part.score for part in parts.values())


def _rows(parts: Parts, means: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Return the scores by format, and what as many weights score on average, which is never below zero."""
    found = [parts[name] for name in means]
    evened = [max(mean, 0.0) * part.weights for mean, part in zip(means.values(), found, strict=True)]
    return [part.score for part in found], evened


def _exp(logarithm: float) -> float:
    """Return its number, or the largest one that there is: far from what was measured an interval has no end."""
    return math.exp(min(logarithm, _LARGEST))


def _weighed(
    scores: NDArray[np.float64], evened: NDArray[np.float64], weights: NDArray[np.float64], shrinkage: float
) -> NDArray[np.float64]:
    """Return what adds up to the damage, [points, formats].

    Args:
        scores: [points, formats].
        evened: what as many weights score on average, alike.
        weights: a format.
        shrinkage: from `scores` to `evened`.
    """
    return ((1 - shrinkage) * scores + shrinkage * evened) * weights


def _slopes(
    scores: NDArray[np.float64],
    evened: NDArray[np.float64],
    weights: NDArray[np.float64],
    shrinkage: float,
    exponent: float,
) -> NDArray[np.float64]:
    """Return the derivatives of log KL by the parameters, [points, 3 + formats]; that by the exponent is the sum's log.

    Args are those of `_weighed`, and the exponent of the sum, which must be positive.
    """
    weighed = _weighed(scores, evened, weights, shrinkage)
    sums = weighed.sum(axis=1, keepdims=True)
    moved = ((evened - scores) @ weights)[:, None]
    return np.hstack([np.ones_like(sums), np.log(sums), exponent * weighed / sums, exponent * moved / sums])


@dataclass(frozen=True, eq=False)
class _Fit:
    """What fits best, with tilts (logarithms of the weights) and shrinkage pulled to 0."""

    level: float
    exponent: float
    tilts: NDArray[np.float64]  # a format
    shrinkage: float
    squares: float  # of what is left over, summed
    counted: float  # parameters, those that are pulled in part
    covariance: NDArray[np.float64]

    @classmethod
    def of(
        cls, scores: NDArray[np.float64], evened: NDArray[np.float64], logs: NDArray[np.float64], pull: float
    ) -> Self:
        """Return it by Gauss and Newton's steps, from the regression without tilts and shrinkage.

        Args:
            scores: [points, formats], none below zero.
            evened: what as many weights score on average, alike.
            logs: of KL, [points].
            pull: what a square of a tilt, or of the shrinkage, counts beside that of a residual.
        """
        exponent, level = np.polyfit(np.log(scores.sum(axis=1)), logs, 1)
        found = np.array([level, exponent, *np.zeros(scores.shape[1] + 1)])
        pulls = np.array([0.0, 0.0, *np.full(scores.shape[1] + 1, pull)])

        def left(at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            weights, shrinkage = np.exp(at[2:-1]), float(at[-1])
            slopes = _slopes(scores, evened, weights, shrinkage, float(at[1]))
            return logs - slopes[:, :2] @ at[:2], slopes

        def worse(at: NDArray[np.float64], than: NDArray[np.float64]) -> bool:
            with np.errstate(all="ignore"):  # so far off that its weights are no numbers
                costs = [float(np.sum(left(one)[0] ** 2) + pulls @ one**2) for one in (at, than)]
            return not costs[0] <= costs[1]

        def step_from(at: NDArray[np.float64]) -> Any:
            """Return the step that is best to first order, of those that keep the shrinkage in its range."""
            residuals, slopes = left(at)
            normal, downhill = slopes.T @ slopes + np.diag(pulls), slopes.T @ residuals - pulls * at
            step = np.linalg.solve(normal, downhill)
            last = np.clip(at[-1] + step[-1], 0.0, _MOST_SHRINKAGE) - at[-1]
            if last != step[-1]:
                others = np.linalg.solve(normal[:-1, :-1], downhill[:-1] - normal[:-1, -1] * last)
                step = np.append(others, last)
            return step

        for _ in range(100):
            step = step_from(found)
            while worse(found + step, found) and np.abs(step).max() > 1e-12:
                step /= 2
            found = found + step
            if np.abs(step).max() <= 1e-12:
                break
        residuals, slopes = left(found)
        free = slice(None) if 0.0 < found[-1] < _MOST_SHRINKAGE else slice(-1)  # at its edge the shrinkage is given
        normal = slopes.T @ slopes + np.diag(pulls)
        covariance = np.zeros_like(normal)
        covariance[free, free] = np.linalg.inv(normal[free, free])
        return cls(
            level=float(found[0]),
            exponent=float(found[1]),
            tilts=found[2:-1],
            shrinkage=float(found[-1]),
            squares=float(residuals @ residuals),
            counted=float(np.trace(slopes @ covariance @ slopes.T)),
            covariance=covariance,
        )


def leave_one_out(means: Mapping[str, float], parts: Sequence[Parts], kls: Sequence[float]) -> list[Predicted | None]:
    """Return for every point what the map fitted on all the others predicts; None where they don't suffice."""
    found: list[Predicted | None] = []
    for index, part in enumerate(parts):
        others = [i for i in range(len(parts)) if i != index]
        fitted = KlMap.fit(means, [parts[i] for i in others], [kls[i] for i in others])
        found.append(fitted.predict(part) if fitted else None)
    return found
