"""What the figures of the page are drawn from: `plot_data(report)`, plain data that equals the report's."""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from bitladder.planning.controls import RANDOM_FIRST
from bitladder.recipe import Phase
from bitladder.records import BF16, KL, EvalResult, Throughput
from bitladder.report.damage import NEARLY_LOSSLESS_KL, WORDS, damage_by_kl
from bitladder.report.frontier import spec_of
from bitladder.report.numbers import CONTROLS, FLIPS_OFTEN, KL_EXPONENT, power_of_ten
from bitladder.report.quality import kl_of
from bitladder.report.speeds import PHASE_WORDS
from bitladder.report.types import PlannedCurve, Report, ReportedGroup, ReportedProbe, ReportedScheme

WORST = 3  # groups that the picture of the layers points out
_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a group's name
_BITS_PER_BYTE = 8


def plot_data(report: Report) -> dict[str, Any]:
    """Return what the plots are drawn from; KL in nats per token, sizes in bytes."""
    prediction = report.prediction
    shades = {name: _ends(_scores(report, name).values()) for name in report.formats}
    return {
        "splits": list(report.splits),
        "formats": [BF16, *report.formats],
        "floors": {
            split: None if (found := report.first_result(KL, split)) is None else found.noise_floor
            for split in report.splits
        },
        "nearlyLossless": NEARLY_LOSSLESS_KL,
        "flipsOften": FLIPS_OFTEN,
        "take": report.decision.take,
        "originalBytes": report.searched_source_bytes,
        "sourceFileBytes": report.source_weight_file_bytes,
        **_score_unit(report.score_unit),
        "schemes": [_scheme(report, scheme) for scheme in report.schemes],
        "arms": [
            {
                "name": arm.name,
                "kind": CONTROLS[arm.control],
                "beside": arm.beside,
                "bits": arm.effective_bits,
                "bytes": _bytes_of(report, arm.effective_bits),
                "kl": _kl_of(arm.results),
            }
            for arm in report.controls
        ],
        "worth": _worth(report),
        "groups": [_group(group, shades) for group in report.groups],
        "worst": {name: worst_groups(report, name) for name in report.formats},
        "scores": shades,
        "level": report.frontier.level if report.frontier else None,
        "letters": report.frontier.letters if report.frontier else {},
        "curves": [_curve(report, curve) for curve in report.frontier.curves] if report.frontier else [],
        "phases": list(PHASE_WORDS.items()),
        "predictedSpeeds": {_as_predicted(phase): phase for phase in PHASE_WORDS},
        "speedDevice": report.speeds.place if report.speeds else None,
        "points": [] if prediction is None else [point.model_dump(mode="json") for point in prediction.points],
    }


def _score_unit(unit: str) -> dict[str, Any]:
    """Return in which unit scores are shown: a KL in the one of all KL."""
    if unit == "nats per token":
        return {"scoreUnit": f"× {power_of_ten(KL_EXPONENT)} nats a token", "scoreScale": 10.0**-KL_EXPONENT}
    return {"scoreUnit": unit, "scoreScale": 1}


def worst_groups(report: Report, format_name: str) -> list[str]:
    """Return the names of the most sensitive groups in a format, the worst first."""
    scores = _scores(report, format_name)
    return sorted(scores, key=lambda name: -scores[name])[:WORST]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a group's name holds; None: it holds none."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def recipe_line(curve: PlannedCurve, target: float, report: Report) -> str:
    """Return the line of a recipe's `schemes` that plans a point of the frontier."""
    entry = yaml.safe_dump(spec_of(curve, target, report.formats), default_flow_style=True, sort_keys=False, width=1000)
    return f"- {entry.strip()}"


def _scores(report: Report, format_name: str) -> dict[str, float]:
    return {
        group.name: found.score
        for group in report.groups
        for found in group.sensitivities
        if found.format == format_name
    }


def _ends(values: Any) -> list[float] | None:
    """Return the least and the greatest of the positive values; None where there are none."""
    positive = [value for value in values if value > 0]
    return [min(positive), max(positive)] if positive else None


def _bytes_of(report: Report, effective_bits: float) -> float:
    """Return the bytes of the searched weights, a tensor's own scales left out."""
    return effective_bits * report.searched_weights / _BITS_PER_BYTE


def _kl_of(results: tuple[EvalResult, ...] | None) -> dict[str, list[float | None]]:
    """Return the KL and its standard error by held-out set."""
    return {result.split: [result.value, result.standard_error] for result in results or () if result.metric == KL}


def _scheme(report: Report, scheme: ReportedScheme) -> dict[str, Any]:
    return {
        "name": scheme.name,
        "bits": scheme.effective_bits,
        "bytes": _bytes_of(report, scheme.effective_bits),
        "weightBytes": scheme.weight_bytes,
        "kl": _kl_of(scheme.results),
        "speed": _speed(report, scheme),
        "flips": scheme.unsettled.shares if scheme.unsettled else {},
    }


def _as_predicted(phase: Phase) -> str:
    return f"{PHASE_WORDS[phase]}, as predicted"


def _speed(report: Report, scheme: ReportedScheme) -> dict[str, float]:
    """Return tokens per second over the original's, by what was timed and where, and as predicted."""
    predicted = [one for one in report.speeds.schemes if one.scheme == scheme.name] if report.speeds else []
    return {_as_predicted(phase): ratio for one in predicted for phase, ratio in one.ratios.items()} | {
        timing(speed, probe): speed.ratio
        for probe in report.probes
        if probe.scheme == scheme.name
        for speed in probe.throughput
        if speed.ratio is not None
    }


def timing(speed: Throughput, probe: ReportedProbe) -> str:
    """Return in words what was timed, and where."""
    requests = f"{speed.requests} request{'' if speed.requests == 1 else 's'}"
    return f"{speed.phase}, {requests}{f', {probe.device}' if probe.device else ''}"


def _worth(report: Report) -> list[dict[str, Any]]:
    """Return each scheme's KL on the first held-out set beside that of its control arms, by kind."""
    found = []
    for scheme in report.schemes:
        kinds: dict[str, list[float]] = {}
        for arm in report.controls:
            kl = kl_of(arm.results)
            if arm.beside == scheme.name and kl is not None:
                kinds.setdefault(arm.control, []).append(kl)
        if kinds:
            found.append(
                {
                    "scheme": scheme.name,
                    "kl": kl_of(scheme.results or ()),
                    "kinds": [{"kind": kind, "title": CONTROLS[kind], "kls": kls} for kind, kls in kinds.items()],
                    "agrees": scheme.name in report.modelopt_agrees,
                    "enough": len(kinds.get("random", ())) >= RANDOM_FIRST,
                }
            )
    return found


def _group(group: ReportedGroup, shades: Mapping[str, list[float] | None]) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "layer": layer_of(group.name),
        "formats": group.formats,
        "scores": {
            found.format: {
                "score": found.score,
                "rank": found.rank,
                "shade": _shade(found.score, shades[found.format]),
            }
            for found in group.sensitivities
        },
    }


def _shade(score: float, ends: list[float] | None) -> float:
    """Return where a score lies between the least and the greatest, 0 to 1, in logarithms."""
    if ends is None or score <= 0 or ends[0] == ends[1]:
        return 0.0
    return round(math.log(score / ends[0]) / math.log(ends[1] / ends[0]), 3)


def _curve(report: Report, curve: PlannedCurve) -> dict[str, Any]:
    other = (report.source_weight_file_bytes or 0) - report.searched_source_bytes
    points = [
        {
            **point.model_dump(mode="json"),
            "bytes": _bytes_of(report, point.effective_bits),
            "fileBytes": point.weight_bytes + other if report.source_weight_file_bytes else None,
            "recipe": recipe_line(curve, point.target, report),
            "word": "" if point.kl is None else WORDS[damage_by_kl(point.kl)],
        }
        for point in curve.points
    ]
    title = " + ".join(name.upper() for name in (*curve.formats, BF16))
    if curve.along != "bits":
        title += f", by speed of {PHASE_WORDS[curve.along]}"
    return {"formats": list(curve.formats), "along": curve.along, "title": title, "points": points}
