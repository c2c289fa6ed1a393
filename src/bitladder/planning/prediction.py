"""From predicted scores to KL in nats per token: a map fitted on measured schemes, with an interval. Pure, no torch.

A sum of gradient scores ranks schemes but has no unit that means anything to a user; a sum of exact single-group KL is
already close to the scheme's KL. Both follow KL = factor · score^exponent over the range of a ladder: a straight line
in logarithms, fitted by least squares. The interval for one more scheme is the usual one of a regression,

    log KL ± t(level, n - 2) · s · sqrt(1 + 1/n + (x - mean x)² / Σ (x_i - mean x)²)

with s² = Σ residual² / (n - 2). A point's own prediction leaves that point out of the fit: otherwise it would predict
itself. Source: Draper and Smith, Applied Regression Analysis, 3rd edition, section 3.1.

One quantile is no reason to need scipy: Student's t with a whole number of degrees of freedom has a finite sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

LEVEL = 0.9  # of the intervals
MIN_POINTS = 4  # two parameters, and two more for the spread


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


@dataclass(frozen=True)
class KlMap:
    """KL = factor · score^exponent, with what is needed for intervals (all in natural logarithms)."""

    factor: float
    exponent: float
    points: int
    spread: float
    center: float
    width: float

    @classmethod
    def fit(cls, scores: Sequence[float], kls: Sequence[float]) -> Self | None:
        """Return the map through measured points; None where there are too few, or their scores don't differ.

        Args:
            scores: predicted scores; those that are not positive are left out, as are their KL.
            kls: measured KL, in nats per token.
        """
        pairs = [(math.log(s), math.log(k)) for s, k in zip(scores, kls, strict=True) if s > 0 and k > 0]
        if len(pairs) < MIN_POINTS:
            return None
        count = len(pairs)
        center = math.fsum(x for x, _ in pairs) / count
        level = math.fsum(y for _, y in pairs) / count
        width = math.fsum((x - center) ** 2 for x, _ in pairs)
        if width == 0:
            return None
        exponent = math.fsum((x - center) * (y - level) for x, y in pairs) / width
        squares = math.fsum((y - level - exponent * (x - center)) ** 2 for x, y in pairs)
        return cls(
            factor=math.exp(level - exponent * center),
            exponent=exponent,
            points=count,
            spread=math.sqrt(squares / (count - 2)),
            center=center,
            width=width,
        )

    def predict(self, score: float) -> Predicted | None:
        """Return the KL of a scheme with this predicted score; None where the score is not positive."""
        if score <= 0:
            return None
        x = math.log(score)
        value = math.log(self.factor) + self.exponent * x
        error = self.spread * math.sqrt(1 + 1 / self.points + (x - self.center) ** 2 / self.width)
        reach = students_t(LEVEL, self.points - 2) * error
        return Predicted(math.exp(value), math.exp(value - reach), math.exp(value + reach))

    def score_of(self, kl: float) -> float | None:
        """Return the greatest score whose predicted KL is at most `kl` (> 0); None where KL doesn't grow with it."""
        if self.exponent <= 0:
            return None
        return math.exp((math.log(kl) - math.log(self.factor)) / self.exponent)


def leave_one_out(scores: Sequence[float], kls: Sequence[float]) -> list[Predicted | None]:
    """Return for every point what the map fitted on all the others predicts; None where they don't suffice."""
    found: list[Predicted | None] = []
    for index, score in enumerate(scores):
        others = [i for i in range(len(scores)) if i != index]
        fitted = KlMap.fit([scores[i] for i in others], [kls[i] for i in others])
        found.append(fitted.predict(score) if fitted else None)
    return found
