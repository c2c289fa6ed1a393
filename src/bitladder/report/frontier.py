"""What else could be planned: the exact frontier, at round targets of effective bits and of predicted speed.

Each point is what a recipe's `effective_bits: target` or `speed: {decode: target}` would plan, so that the page can
show it and name the line that makes it. With several formats, each one beside bf16 has its own frontier as well: what
it is worth to mix them.
"""

import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from bitladder.errors import FrontierTooLarge, PlanError
from bitladder.planning.prediction import LEVEL, KlMap
from bitladder.planning.pricing import stored, summed
from bitladder.planning.solver import Solver
from bitladder.planning.speed import PHASES, SpeedModel
from bitladder.planning.trade_off import Frontier, TradeOff
from bitladder.recipe import Phase
from bitladder.records import BF16, BF16_BITS, Measurement
from bitladder.report.types import PlannedCurve, PlannedFrontier, PlannedPoint

MAX_TARGETS = 120  # of one curve: a slider's steps
MAX_SPEEDS = 40  # of one curve by speed, each planned on its own
_STEPS = (1, 2, 5, 10, 20, 25, 50, 100)  # hundredths of a bit, or of the speed of 16 bits, between two targets
Along = Literal["bits", "prefill", "decode"]
_LETTERS = string.digits + string.ascii_lowercase


def frontier_of(measurement: Measurement, kl_map: KlMap | None, speed: SpeedModel | None = None) -> PlannedFrontier:
    """Return the frontier of all formats, that of each, and those by speed.

    Args:
        measurement: what is planned from.
        kl_map: what predicted scores mean in KL; None: not known, but where they are a KL themselves.
        speed: predicts speeds on the device that serves; None: there is no profile.

    Raises:
        MeasurementError: a score is NaN or Inf.
    """
    drawn = _Curves(measurement, kl_map, speed)
    choices = [measurement.formats]
    choices += [(name,) for name in measurement.formats] if len(measurement.formats) > 1 else []
    curves = [drawn.by_bits(formats) for formats in choices]
    curves += [] if speed is None else [drawn.by_speed(phase, speed) for phase in PHASES]
    return PlannedFrontier(
        letters={letter: name for name, letter in drawn.letters.items()},
        level=LEVEL if kl_map else None,
        curves=tuple(curve for curve in curves if curve.points or curve.along == "bits"),
    )


def spec_of(curve: PlannedCurve, target: float, measured: Sequence[str]) -> dict[str, object]:
    """Return the recipe's entry of a scheme that asks for a point.

    Args:
        curve: the point's.
        target: the point's.
        measured: the measurement's formats.
    """
    alone = curve.formats != tuple(measured)
    name = "_".join([*(curve.formats if alone else ()), curve.along, f"{target:g}".replace(".", "_")])
    asked: dict[str, object] = {"effective_bits": target} if curve.along == "bits" else {"speed": {curve.along: target}}
    return {"name": name, **asked} | ({"formats": list(curve.formats)} if alone else {})


class _Curves:
    """Draws the frontiers of one measurement."""

    def __init__(self, measurement: Measurement, kl_map: KlMap | None, speed: SpeedModel | None) -> None:
        self.letters = dict(zip((BF16, *measurement.formats), _LETTERS, strict=False))
        self._measurement, self._kl_map, self._speed = measurement, kl_map, speed
        self._costs = {
            (g.name, name): stored(g, name) for g in measurement.groups for name in (BF16, *measurement.formats)
        }
        self._scores = {(c.group, c.format): measurement.sensitivity(c) for c in measurement.candidates}

    def by_bits(self, formats: tuple[str, ...]) -> PlannedCurve:
        total = self._measurement.searched_weights
        edge = _trade_off(self._measurement.only(formats))
        targets = _targets(edge.least_bits, edge.most_bits, total)
        return self._curve(formats, "bits", targets, lambda target: edge.least_score(math.floor(target * total)))

    def by_speed(self, phase: Phase, speed: SpeedModel) -> PlannedCurve:
        missing = speed.missing(self._measurement.formats)
        formats = tuple(name for name in self._measurement.formats if name not in missing)
        if not formats:
            return PlannedCurve(formats=(), along=phase, points=(), left_out=())
        edge = Solver(self._measurement.only(formats), cost=speed.cost_of(phase))
        fastest = {one.group: one.names[int(one.bits.argmin())] for one in edge.options}
        gentlest = {one.group: one.names[int(one.scores.argmin())] for one in edge.options}
        low, high = (math.floor(100 * speed.predict(own, speed.load).ratio(phase)) for own in (gentlest, fastest))
        return self._curve(
            formats,
            phase,
            _hundredths(low + 1, high, MAX_SPEEDS),
            lambda target: edge.least_score(speed.budget(float(target), phase, speed.load)),
        )

    def _curve(
        self,
        formats: tuple[str, ...],
        along: Along,
        targets: Iterable[Fraction],
        plan: Callable[[Fraction], dict[str, str] | None],
    ) -> PlannedCurve:
        points: dict[str, PlannedPoint] = {}
        left_out = []
        for target in targets:
            try:
                chosen = plan(target)
            except PlanError:
                left_out.append(float(target))
                continue
            assert chosen is not None  # no target is below the least bits, or above the most speed
            point = self._point(float(target), chosen)
            if set(chosen.values()) != {BF16} and (along != "bits" or point.formats not in points):
                points[point.formats] = point  # of targets with one plan the nearest: fewest bits, most speed
        return PlannedCurve(formats=formats, along=along, points=tuple(points.values()), left_out=tuple(left_out))

    def _point(self, target: float, chosen: Mapping[str, str]) -> PlannedPoint:
        score = math.fsum(self._scores[item] for item in chosen.items() if item[1] != BF16)
        guess = self._kl_map.predict(summed(self._measurement, chosen, self._scores)) if self._kl_map else None
        own = score if self._measurement.score_unit == "nats per token" else None
        return PlannedPoint(
            target=target,
            effective_bits=sum(self._costs[item][0] for item in chosen.items()) / self._measurement.searched_weights,
            weight_bytes=sum(self._costs[item][1] for item in chosen.items()),
            predicted_score=score,
            kl=guess.value if guess else own,
            low=guess.low if guess else None,
            high=guess.high if guess else None,
            formats="".join(self.letters[name] for name in chosen.values()),
            **self._speeds(chosen),
        )

    def _speeds(self, chosen: Mapping[str, str]) -> dict[str, float]:
        """Return the speeds of a plan; {} where no profile has times of its formats."""
        if self._speed is None:
            return {}
        try:
            own = self._speed.predict(chosen, self._speed.load)
        except PlanError:
            return {}
        return {"prefill_ratio": own.prefill_ratio, "decode_ratio": own.decode_ratio}


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
    return _hundredths(low, min(math.ceil(Fraction(100 * most_bits, weights)), 100 * BF16_BITS - 1), MAX_TARGETS)


def _hundredths(low: int, high: int, most: int) -> Iterator[Fraction]:
    """Return both ends and round targets between them, at most so many; none where the ends have changed sides."""
    if low > high:
        return
    step = next((step for step in _STEPS if (high - low) / step < most - 1), _STEPS[-1])
    yield from (
        Fraction(target, 100) for target in sorted({low, *range(low + step - low % step, high + 1, step), high})
    )
