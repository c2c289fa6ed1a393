"""What a report says of quality: against the original, control arms and predictions."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from bitladder.planning.prediction import LEVEL, KlMap, leave_one_out
from bitladder.planning.pricing import mean_scores, parts_by_format
from bitladder.records import KL, Control, ControlArm, EvalResult, Evaluation, Measurement, Scheme
from bitladder.report.types import (
    WITHIN_NOISE_ERRORS,
    Comparison,
    ControlComparison,
    PredictedPoint,
    Prediction,
    ReportedArm,
)


def comparisons_of(ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation]) -> tuple[Comparison, ...]:
    """Return the KL differences of neighbours among the evaluated schemes."""
    results = [(s.name, evaluations[s.name].result(KL)) for s in ladder if s.name in evaluations]
    known = [(name, result) for name, result in results if result is not None]
    comparisons = []
    for (first, one), (second, other) in itertools.pairwise(known):
        difference = other.value - one.value
        error = None
        if one.standard_error is not None and other.standard_error is not None:
            error = math.hypot(one.standard_error, other.standard_error)
        comparisons.append(
            Comparison(
                first=first,
                second=second,
                difference=difference,
                standard_error=error,
                within_noise=None if error is None else abs(difference) < WITHIN_NOISE_ERRORS * error,
            )
        )
    return tuple(comparisons)


def below_floor(evaluation: Evaluation | None) -> bool:
    """Return whether a checkpoint's KL is less than the original's own noise."""
    result = evaluation.result(KL) if evaluation else None
    return result is not None and result.noise_floor is not None and result.value < result.noise_floor


def control_of(arm: ControlArm) -> Control:
    """Return what led to a control arm."""
    assert isinstance(arm.scheme.asked, Control)  # as `planning.controls.arms` makes them
    return arm.scheme.asked


def reported_arm(arm: ControlArm) -> ReportedArm:
    """Return what the report says of one control arm."""
    scheme, asked = arm.scheme, control_of(arm)
    return ReportedArm(
        name=scheme.name,
        control=asked.control,
        beside=asked.beside,
        coverage=scheme.coverage,
        effective_bits=scheme.effective_bits,
        predicted_score=scheme.predicted_score,
        results=arm.results,
    )


def kl_of(results: Sequence[EvalResult]) -> float | None:
    """Return the KL on the first held-out set."""
    return next((result.value for result in results if result.metric == KL), None)


def control_comparisons_of(
    ladder: Sequence[Scheme], evaluations: Mapping[str, Evaluation], arms: Sequence[ControlArm]
) -> tuple[ControlComparison, ...]:
    """Return each scheme beside its control arms."""
    found = []
    for scheme in ladder:
        own = kl_of(evaluations[scheme.name].results) if scheme.name in evaluations else None
        kinds: dict[str, list[float]] = {}
        for arm in arms:
            kl, asked = kl_of(arm.results), control_of(arm)
            if asked.beside == scheme.name and kl is not None:
                kinds.setdefault(asked.control, []).append(kl)
        for kind, kls in kinds.items():
            found.append(
                ControlComparison(
                    scheme=scheme.name,
                    control=kind,
                    arms=len(kls),
                    kl=own,
                    mean=math.fsum(kls) / len(kls),
                    least=min(kls),
                    most=max(kls),
                )
            )
    return tuple(found)


def prediction_of(
    measurement: Measurement,
    ladder: Sequence[Scheme],
    evaluations: Mapping[str, Evaluation],
    arms: Sequence[ControlArm],
) -> tuple[Prediction, KlMap] | None:
    """Return how well the predicted scores of schemes and arms with a 16-bit KV cache say their KL, and the map."""
    evaluated = [(scheme, evaluations[scheme.name].results, False) for scheme in ladder if scheme.name in evaluations]
    evaluated += [(arm.scheme, arm.results, True) for arm in arms]
    known = [
        (scheme, kl, is_control)
        for scheme, results, is_control in evaluated
        if scheme.kv_cache_format is None and (kl := kl_of(results)) is not None  # scores know nothing of the cache
    ]
    means = mean_scores(measurement)
    parts = [parts_by_format(measurement, scheme.formats) for scheme, _, _ in known]
    kls = [kl for _, kl, _ in known]
    fitted = KlMap.fit(means, parts, kls)
    if fitted is None:
        return None
    points = tuple(
        PredictedPoint(
            name=scheme.name,
            is_control=is_control,
            score=scheme.predicted_score,
            measured=kl,
            predicted=guess.value if guess else None,
            low=guess.low if guess else None,
            high=guess.high if guess else None,
        )
        for (scheme, kl, is_control), guess in zip(known, leave_one_out(means, parts, kls), strict=True)
    )
    guessed = [(p.measured, p.predicted, p.low, p.high) for p in points if p.predicted and p.low and p.high]
    errors = sorted(abs(predicted / measured - 1) for measured, predicted, _, _ in guessed)
    prediction = Prediction(
        factor=fitted.factor,
        exponent=fitted.exponent,
        weights=dict(fitted.weights),
        shrinkage=fitted.shrinkage,
        level=LEVEL,
        points=points,
        median_error=statistics.median(errors) if errors else None,
        inside=sum(low <= measured <= high for measured, _, low, high in guessed) / len(guessed) if guessed else None,
    )
    return prediction, fitted
