"""A few simulated schemes that say which KL a predicted score means."""

import contextlib

from bitladder import planning
from bitladder.errors import InfeasibleTarget, PlanError
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.planning import controls
from bitladder.planning.prediction import KlMap
from bitladder.recipe import SchemeSpec
from bitladder.records import KlPoint, KlPoints, Measurement, Scheme, digest_of
from bitladder.steps.data import scored_calibration_data
from bitladder.steps.simulated import kl_on
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import KL_POINTS_FILE, Workspace

_STEP = "measure KL of a few schemes"
_KL_POINT_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the searched weights; schemes between which KL is interpolated


def measure_kl_points(work: Workspace) -> KlPoints:
    """Simulate a few schemes on the scored calibration samples, to learn which KL a predicted score means, once.

    Raises:
        BitladderError: see `evaluation.simulation`.
    """
    measurement = work.measurement()
    data, schemes = scored_calibration_data(work, measurement), kl_point_schemes(measurement)
    key = digest_of([ARITHMETIC, str(len(data.batches)), *(scheme.fingerprint() for scheme in schemes)])
    path = work.output / KL_POINTS_FILE
    known = valid(work, KlPoints, path, settings_sha256=key)
    if known is not None:
        return known
    with doing(work, _STEP) as meter:
        points = []
        with meter.phase(_STEP), kl_on(work, measurement, data) as kl:
            for index, scheme in enumerate(schemes):
                work.progress(_STEP, index, len(schemes))
                points.append(KlPoint(name=scheme.name, score=scheme.predicted_score, kl=kl(scheme)))
            work.progress(_STEP, len(schemes), len(schemes))
        result = KlPoints(
            measurement_sha256=measurement.fingerprint(),
            settings_sha256=key,
            data=data.summary,
            samples=sum(len(batch.labels) for batch in data.batches),
            points=tuple(points),
            run=meter.info(),
        )
        result.write(path)
    return result


def kl_point_schemes(measurement: Measurement) -> tuple[Scheme, ...]:
    """Return schemes that span the range of predicted scores: a ladder, and random choices, each once."""
    ladder = []
    for share in _KL_POINT_SHARES:
        with contextlib.suppress(InfeasibleTarget):  # less than the first group of a small model
            spec = SchemeSpec(name=f"top{100 * share:g}", coverage=share, format=measurement.formats[0])
            ladder.append(planning.plan(measurement, spec))
    middle = ladder[len(ladder) // 2]
    found = {
        tuple(scheme.formats.items()): scheme
        for scheme in (*ladder, *controls.arms(measurement, middle, kinds=("random", "inverse"), seeds=2))
    }
    return tuple(found.values())


def fitted_kl_map(work: Workspace) -> KlMap:
    """Return the map from predicted scores to KL, for schemes that are asked for by KL."""
    points = measure_kl_points(work).points
    fitted = KlMap.fit([point.score for point in points], [point.kl for point in points])
    if fitted is None:
        raise PlanError(
            f"max_kl: KL was measured on {len(points)} schemes, too few to say which KL a score means "
            f"(see {work.output / KL_POINTS_FILE}); ask for coverage or effective_bits"
        )
    return fitted
