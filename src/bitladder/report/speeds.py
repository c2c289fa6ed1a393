"""Predicted speeds in a report: of every scheme, of the frontier of damage against speed, and in words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitladder.errors import PlanError
from bitladder.formats import group_bits
from bitladder.planning import Solver
from bitladder.planning.speed import PHASES, SpeedModel
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, Measurement, Scheme
from bitladder.report.escaping import Markdown
from bitladder.report.numbers import NONE, exact, markdown_table, scientific
from bitladder.report.types import AskedSpeed, PredictedSpeed, SpeedPoint, Speeds

if TYPE_CHECKING:
    from bitladder.recipe import Phase
    from bitladder.report.types import Report

_POINTS = 8  # of the frontier in each phase
PHASE_WORDS: "dict[Phase, str]" = {"prefill": "prefill", "decode": "decoding"}
_DRAFTED = (
    "Speculative decoding: a step verifies {} drafted tokens of each request and one more. How many tokens/s that "
    "makes hangs on how many are accepted and on what drafting takes; neither is predicted. As both are the same in 16 "
    "bits, the first leaves ratios as they are, and the second brings them nearer to 1."
)
_ALIKE = 0.005  # ratios that differ by less are shown as equal


def speeds_of(measurement: Measurement, ladder: Sequence[Scheme], speed: SpeedModel) -> Speeds:
    """Return the predicted speeds of schemes and of the frontier; what has no times is named with the reason."""
    load, plain = speed.load, speed.predict(speed.uniform(BF16), speed.load)
    found, asked, unknown = [], [], {}
    for scheme in ladder:
        try:
            own = speed.predict(scheme.formats, load)
        except PlanError as error:
            unknown[scheme.name] = str(error)
            continue
        found.append(
            PredictedSpeed(
                scheme=scheme.name,
                prefill=own.prefill,
                decode=own.decode,
                prefill_ratio=own.prefill_ratio,
                decode_ratio=own.decode_ratio,
            )
        )
        aim = scheme.asked.speed if isinstance(scheme.asked, SchemeSpec) else None
        if aim is not None and (at := speed.asked(aim)) != load:
            phase, _ = aim.target
            ratio = speed.predict(scheme.formats, at).ratio(phase)
            asked.append(AskedSpeed(scheme=scheme.name, phase=phase, ratio=ratio, load=str(at)))
    return Speeds(
        device=speed.profile.place,
        runtime=speed.profile.runtime,
        version=speed.profile.version,
        compiled=speed.profile.engine.compiled,
        tensor_parallel=speed.profile.tensor_parallel,
        requests=load.requests,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        speculative_tokens=load.speculative_tokens,
        original_prefill=plain.prefill,
        original_decode=plain.decode,
        schemes=tuple(found),
        asked=tuple(asked),
        unknown=unknown,
        frontier=tuple(point for phase in PHASES for point in _frontier(measurement, speed, phase)),
    )


def _frontier(measurement: Measurement, speed: SpeedModel, phase: "Phase") -> list[SpeedPoint]:
    """Return the least damage at a few speeds between those of the least damage and of the most speed."""
    timed = [name for name in measurement.formats if name not in speed.missing(measurement.formats)]
    if not timed:
        return []
    known = measurement.only(timed)
    edge, table = Solver(known, cost=speed.cost_of(phase)), known.by_group()
    points: dict[tuple[str, ...], SpeedPoint] = {}
    for budget in np.linspace(edge.most_bits, edge.least_bits, _POINTS).round():
        try:
            formats = edge.least_score(int(budget))
        except PlanError:  # too many choices to hold: a plan of that speed would be refused, too
            continue
        assert formats is not None
        chosen = [table[group][name] for group, name in formats.items() if name != BF16]
        bits = sum(group_bits(group, formats[group.name]) for group in known.groups)
        points[tuple(formats.values())] = SpeedPoint(
            phase=phase,
            ratio=speed.predict(formats, speed.load).ratio(phase),
            predicted_score=math.fsum(known.sensitivity(one) for one in chosen),
            effective_bits=bits / known.searched_weights,
        )
    return list(points.values())


def speed_tables(report: "Report") -> dict[str, Markdown]:
    """Return the tables of schemes and of the frontier; {} where no profile was named."""
    speeds = report.speeds
    if speeds is None:
        return {}
    schemes = {scheme.name: scheme for scheme in report.schemes}
    rows: list[list[object]] = [
        [
            "original",
            "16.00",
            NONE,
            exact(round(speeds.original_prefill)),
            "1.00",
            _decoded(speeds, speeds.original_decode),
            "1.00",
        ]
    ]
    for one in speeds.schemes:
        scheme = schemes[one.scheme]
        rates = [
            exact(round(one.prefill)),
            f"{one.prefill_ratio:.2f}",
            _decoded(speeds, one.decode),
            f"{one.decode_ratio:.2f}",
        ]
        rows.append([one.scheme, f"{scheme.effective_bits:.2f}", scientific(scheme.predicted_score), *rates])
    header = [
        "scheme",
        "effective bits",
        "predicted score",
        "prefill, tokens/s",
        "× 16 bits",
        "decode, tokens/s",
        "× 16 bits",
    ]
    points = [
        [PHASE_WORDS[one.phase], f"{one.ratio:.2f}", scientific(one.predicted_score), f"{one.effective_bits:.2f}"]
        for one in speeds.frontier
    ]
    frontier = markdown_table(["phase", "× 16 bits", "least predicted score", "effective bits"], points)
    return {"schemes": markdown_table(header, rows), "frontier": frontier if points else Markdown("")}


def _decoded(speeds: Speeds, rate: float) -> str:
    """Return tokens per second of decoding; with drafted tokens it isn't known how many there are."""
    return NONE if speeds.speculative_tokens else exact(round(rate))


def speed_lines(report: "Report") -> list[str]:
    """Return what is said of speed: every scheme beside 16 bits, which is fastest, and what isn't known."""
    speeds = report.speeds
    if speeds is None:
        return []
    schemes = {scheme.name: scheme for scheme in report.schemes}
    lines = [_DRAFTED.format(speeds.speculative_tokens)] if speeds.speculative_tokens else []
    for one in speeds.schemes:
        smaller = 1 - schemes[one.scheme].weight_bytes / report.searched_source_bytes
        beside = " and ".join(f"{_beside(ratio)} at {PHASE_WORDS[phase]}" for phase, ratio in one.ratios.items())
        lines.append(f"On {speeds.place}, as predicted, `{one.scheme}` is {beside}, and {smaller:.0%} smaller.")
    for own in speeds.asked:
        words = f"{_beside(own.ratio)} at {PHASE_WORDS[own.phase]}"
        lines.append(f"At the load that it was asked for, {own.load}, `{own.scheme}` is {words}.")
    if len(speeds.schemes) > 1:
        words = fastest(speeds.schemes, speeds.place)
        lines.append(f"{words[0].upper()}{words[1:]}.")
    return lines + [f"No speed is predicted of `{name}`: {why}." for name, why in speeds.unknown.items()]


def fastest(speeds: Sequence[PredictedSpeed], device: str) -> str:
    """Return which of some schemes is predicted to be fastest in each phase, or in both."""
    best = {phase: max(speeds, key=lambda one, phase=phase: one.ratios[phase]) for phase in PHASES}  # type: ignore[misc]
    if all(one.ratios[phase] <= 1 for phase, one in best.items()):
        return f"none is predicted to be faster than 16 bits on {device}"
    if len({one.scheme for one in best.values()}) == 1:
        (one, _) = best.values()
        words = " and ".join(
            f"{ratio:.2f} times 16 bits at {PHASE_WORDS[phase]}" for phase, ratio in one.ratios.items()
        )
        return f"predicted to be fastest in everything on {device} is `{one.scheme}`, {words}"
    words = " and ".join(
        f"at {PHASE_WORDS[phase]} `{one.scheme}`, {one.ratios[phase]:.2f} times 16 bits" for phase, one in best.items()
    )
    return f"predicted to be fastest on {device} is {words}"


def _beside(ratio: float) -> str:
    """Return how much faster or slower than 16 bits something is."""
    if abs(ratio - 1) < _ALIKE:
        return "as fast as 16 bits"
    return f"{ratio - 1:.0%} faster than 16 bits" if ratio > 1 else f"{1 - ratio:.0%} slower than 16 bits"
