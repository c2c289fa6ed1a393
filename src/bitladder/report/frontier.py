"""What else could be planned: the exact frontier, at round targets of effective bits.

Each point is what a recipe's `effective_bits: target` would plan, so that the page can show it and name the line that
makes it. With several formats, each one beside bf16 has its own frontier as well: what it is worth to mix them.
"""

import math
import string
from collections.abc import Iterator, Sequence
from fractions import Fraction

from bitladder.errors import FrontierTooLarge, PlanError
from bitladder.planning.prediction import LEVEL, KlMap
from bitladder.planning.pricing import stored
from bitladder.planning.solver import Solver
from bitladder.planning.trade_off import Frontier, TradeOff
from bitladder.records import BF16, BF16_BITS, Measurement
from bitladder.report.types import PlannedCurve, PlannedFrontier, PlannedPoint

MAX_TARGETS = 120  # of one curve: a slider's steps
_STEPS = (1, 2, 5, 10, 20, 25, 50, 100)  # hundredths of a bit between two targets
_LETTERS = string.digits + string.ascii_lowercase


def frontier_of(measurement: Measurement, kl_map: KlMap | None) -> PlannedFrontier:
    """Return the frontier of all formats, and that of each.

    Args:
        measurement: what is planned from.
        kl_map: what predicted scores mean in KL; None: not known, but where they are a KL themselves.

    Raises:
        MeasurementError: a score is NaN or Inf.
    """
    letters = dict(zip((BF16, *measurement.formats), _LETTERS, strict=False))
    choices = [measurement.formats]
    choices += [(name,) for name in measurement.formats] if len(measurement.formats) > 1 else []
    return PlannedFrontier(
        letters={letter: name for name, letter in letters.items()},
        level=LEVEL if kl_map else None,
        curves=tuple(_curve(measurement, formats, letters, kl_map) for formats in choices),
    )


def spec_of(curve: PlannedCurve, target: float, measured: Sequence[str]) -> dict[str, object]:
    """Return the recipe's entry of a scheme that asks for a point.

    Args:
        curve: the point's.
        target: the point's.
        measured: the measurement's formats.
    """
    alone = curve.formats != tuple(measured)
    name = "_".join([*(curve.formats if alone else ()), "bits", f"{target:g}".replace(".", "_")])
    return {"name": name, "effective_bits": target} | ({"formats": list(curve.formats)} if alone else {})


def _curve(
    measurement: Measurement, formats: tuple[str, ...], letters: dict[str, str], kl_map: KlMap | None
) -> PlannedCurve:
    narrowed, total = measurement.only(formats), measurement.searched_weights
    edge = _trade_off(narrowed)
    costs = {(g.name, name): stored(g, name) for g in narrowed.groups for name in (BF16, *formats)}
    scores = {(c.group, c.format): narrowed.sensitivity(c) for c in narrowed.candidates}
    points: dict[str, PlannedPoint] = {}
    left_out = []
    for target in _targets(edge.least_bits, edge.most_bits, total):
        try:
            chosen = edge.least_score(math.floor(target * total))
        except PlanError:
            left_out.append(float(target))
            continue
        assert chosen is not None  # no target is below the least bits
        code = "".join(letters[name] for name in chosen.values())
        if code in points or set(chosen.values()) == {BF16}:
            continue
        parts = {
            name: math.fsum(scores[item] for item in chosen.items() if item[1] == name) for name in measurement.formats
        }
        score = math.fsum(parts.values())
        guess = kl_map.predict(parts) if kl_map else None
        own = score if measurement.score_unit == "nats per token" else None
        points[code] = PlannedPoint(
            target=float(target),
            effective_bits=sum(costs[item][0] for item in chosen.items()) / total,
            weight_bytes=sum(costs[item][1] for item in chosen.items()),
            predicted_score=score,
            kl=guess.value if guess else own,
            low=guess.low if guess else None,
            high=guess.high if guess else None,
            formats=code,
        )
    return PlannedCurve(formats=formats, points=tuple(points.values()), left_out=tuple(left_out))


def _trade_off(measurement: Measurement) -> TradeOff:
    """Return the whole frontier, or where it is too large what answers for single targets."""
    try:
        return Frontier(measurement)
    except FrontierTooLarge:
        return Solver(measurement)


def _targets(least_bits: int, most_bits: int, weights: int) -> Iterator[Fraction]:
    """Return the least hundredth of a bit that is enough, and round targets from there up to the most that is of use.

    Args:
        least_bits: of any plan.
        most_bits: of the plan with the least score.
        weights: that are searched.
    """
    low = math.ceil(Fraction(100 * least_bits, weights))
    high = min(math.ceil(Fraction(100 * most_bits, weights)), 100 * BF16_BITS - 1)
    step = next((step for step in _STEPS if (high - low) / step < MAX_TARGETS - 1), _STEPS[-1])
    yield from (
        Fraction(target, 100) for target in sorted({low, *range(low + step - low % step, high + 1, step), high})
    )
