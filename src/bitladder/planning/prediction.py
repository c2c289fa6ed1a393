"""From predicted scores to KL in nats per token: a map fitted on measured schemes, with an interval. No torch.

A sum of gradient scores ranks schemes but has no unit that means anything to a user; a sum of exact single-group KL is
already close to the scheme's KL. Over the range of a ladder both follow

    KL = factor · (Σ over formats of weight · score)^exponent

where the scores are summed apart by the format that groups have: a gradient, which looks at small changes, makes more
of one format's rounding than of another's. The weights of formats are near 1: in the fit, by least squares in
logarithms, each logarithm of them is pulled to 0, the harder the fewer schemes were measured. With one format this is
the usual regression of log KL on log score. The interval for one more scheme is

    log KL ± t(level, n - p) · s · sqrt(1 + j' (J'J + P)^-1 j)

with J the derivatives of log KL by the parameters, a row a scheme, j those of the one predicted, P the pulls, p the
parameters that count, the trace of J (J'J + P)^-1 J', and s² = Σ residual² / (n - p). A point's own prediction leaves
that point out of the fit: otherwise it would predict itself. Sources: Draper and Smith, Applied Regression Analysis,
3rd edition, section 3.1; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2nd edition, section
3.4.1.

One quantile is no reason to need scipy: Student's t with a whole number of degrees of freedom has a finite sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitladder.records import Candidate, Measurement

LEVEL = 0.9  # of the intervals
MIN_POINTS = 4  # two parameters, and two more for the spread
_PULLS = (0.03, 0.3, 3.0, 1e9)  # on log weights: a residual's variance over theirs, 0.1² over 0.6², up to none at all
_Parts = Mapping[str, float]  # format -> the sum of the scores of the groups that have it


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
    """KL = factor · (Σ weight · score)^exponent, with what is needed for intervals."""

    factor: float
    exponent: float
    weights: Mapping[str, float]  # by format
    points: int
    freedom: int  # points that are left for the spread
    spread: float  # of log KL
    covariance: NDArray[np.float64]  # of log factor, exponent and log weights, over spread²

    @classmethod
    def fit(cls, parts: Sequence[_Parts], kls: Sequence[float]) -> Self | None:
        """Return the map through measured points; None where there are too few, or their scores don't differ.

        Args:
            parts: each one's scores by format, of the same formats; those whose sum is not positive are left out.
            kls: measured KL, in nats per token.
        """
        seen = [(part, kl) for part, kl in zip(parts, kls, strict=True) if math.fsum(part.values()) > 0 and kl > 0]
        if len(seen) < MIN_POINTS:
            return None
        formats = tuple(seen[0][0])
        scores = np.array([[max(part[name], 0.0) for name in formats] for part, _ in seen])
        logs = np.log([kl for _, kl in seen])
        if np.ptp(np.log(scores.sum(axis=1))) == 0:
            return None
        for pull in _PULLS:
            fitted = _Fit.of(scores, logs, pull)
            if fitted.counted <= len(seen) / 2 + 1e-6:
                break
        freedom = max(int(len(seen) - fitted.counted + 1e-6), 1)
        return cls(
            factor=math.exp(fitted.level),
            exponent=fitted.exponent,
            weights=dict(zip(formats, np.exp(fitted.tilts).tolist(), strict=True)),
            points=len(seen),
            freedom=freedom,
            spread=math.sqrt(fitted.squares / freedom),
            covariance=fitted.covariance,
        )

    def predict(self, parts: _Parts) -> Predicted | None:
        """Return the KL of a scheme with these scores by format; None where their sum is not positive."""
        if math.fsum(parts.values()) <= 0:
            return None
        weighed = np.array([weight * max(parts[name], 0.0) for name, weight in self.weights.items()])
        score = float(weighed.sum())
        slopes = np.array([1.0, math.log(score), *(self.exponent * weighed / score)])
        value = math.log(self.kl_of(score))
        error = self.spread * math.sqrt(1 + float(slopes @ self.covariance @ slopes))
        reach = students_t(LEVEL, self.freedom) * error
        return Predicted(math.exp(value), math.exp(value - reach), math.exp(value + reach))

    def kl_of(self, score: float) -> float:
        """Return what a weighted sum of scores (> 0) means."""
        return self.factor * math.exp(self.exponent * math.log(score))

    def score_of(self, kl: float) -> float | None:
        """Return the greatest weighted sum whose KL is at most `kl` (> 0); None where KL doesn't grow with it."""
        if self.exponent <= 0:
            return None
        return math.exp((math.log(kl) - math.log(self.factor)) / self.exponent)

    def weigh(self, measurement: Measurement) -> Measurement:
        """Return a measurement with the weights of formats in its scores: they add up to what `score_of` bounds."""

        def weighed(one: Candidate) -> Candidate:
            weight = self.weights[one.format]
            scores, of_images = (tuple(weight * score for score in all_) for all_ in (one.scores, one.image_scores))
            return one.model_copy(update={"scores": scores, "image_scores": of_images})

        return measurement.model_copy(update={"candidates": tuple(map(weighed, measurement.candidates))})


@dataclass(frozen=True, eq=False)
class _Fit:
    """log KL = level + exponent · log Σ exp(tilt) · score: what fits best, with tilts pulled to 0."""

    level: float
    exponent: float
    tilts: NDArray[np.float64]  # a format
    squares: float  # of what is left over, summed
    counted: float  # parameters, those that are pulled in part
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, scores: NDArray[np.float64], logs: NDArray[np.float64], pull: float) -> Self:
        """Return it by Gauss and Newton's steps, from the regression without tilts.

        Args:
            scores: [points, formats], none below zero.
            logs: of KL, [points].
            pull: what a square of a tilt counts beside that of a residual.
        """
        exponent, level = np.polyfit(np.log(scores.sum(axis=1)), logs, 1)
        found = np.array([level, exponent, *np.zeros(scores.shape[1])])
        pulls = np.array([0.0, 0.0, *np.full(scores.shape[1], pull)])

        def left(at: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            weighed = scores * np.exp(at[2:])
            sums = weighed.sum(axis=1, keepdims=True)
            slopes = np.hstack([np.ones_like(sums), np.log(sums), at[1] * weighed / sums])
            return logs - slopes[:, :2] @ at[:2], slopes

        def cost(at: NDArray[np.float64]) -> float:
            return float(np.sum(left(at)[0] ** 2) + pulls @ at**2)

        for _ in range(100):
            residuals, slopes = left(found)
            step = np.linalg.solve(slopes.T @ slopes + np.diag(pulls), slopes.T @ residuals - pulls * found)
            while cost(found + step) > cost(found) and np.abs(step).max() > 1e-12:
                step /= 2
            found = found + step
            if np.abs(step).max() <= 1e-12:
                break
        residuals, slopes = left(found)
        covariance: NDArray[np.float64] = np.linalg.inv(slopes.T @ slopes + np.diag(pulls)).astype(np.float64)
        return cls(
            level=float(found[0]),
            exponent=float(found[1]),
            tilts=found[2:],
            squares=float(residuals @ residuals),
            counted=float(np.trace(slopes @ covariance @ slopes.T)),
            covariance=covariance,
        )


def leave_one_out(parts: Sequence[_Parts], kls: Sequence[float]) -> list[Predicted | None]:
    """Return for every point what the map fitted on all the others predicts; None where they don't suffice."""
    found: list[Predicted | None] = []
    for index, part in enumerate(parts):
        others = [i for i in range(len(parts)) if i != index]
        fitted = KlMap.fit([parts[i] for i in others], [kls[i] for i in others])
        found.append(fitted.predict(part) if fitted else None)
    return found
