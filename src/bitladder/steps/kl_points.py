"""A few simulated schemes that say which KL a predicted score means."""

import contextlib

from bitladder import planning
from bitladder.data.batches import DataSet
from bitladder.errors import InfeasibleTarget
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.planning import controls
from bitladder.planning.prediction import KlMap
from bitladder.planning.pricing import parts_by_format
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16_BITS, KlPoint, KlPoints, Measurement, Scheme, digest_of
from bitladder.steps.data import validation_data
from bitladder.steps.simulated import kl_on
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import KL_POINTS_FILE, Workspace

_STEP = "measure KL of a few schemes"
_KL_POINT_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the searched weights; schemes between which KL is interpolated
_KL_POINT_SHARES_OF_OTHERS = (0.25, 1.0)  # in every format but the first, which would cost as much again
_KL_POINT_MIXES = (0.1, 0.3, 0.6)  # of the way from the fewest bits to 16


def measure_kl_points(work: Workspace) -> KlPoints:
    """Simulate a few schemes on the samples by which schemes are chosen, once, to learn which KL a score means.

    Raises:
        BitladderError: see `evaluation.simulation`.
    """
    measurement, path = work.measurement(), work.output / KL_POINTS_FILE
    data, schemes, key = _asked(work)
    known = valid(work, KlPoints, path, settings_sha256=key)
    if known is not None:
        return known
    with doing(work, _STEP) as meter:
        points = []
        with meter.phase(_STEP), kl_on(work, measurement, data) as kl:
            for index, scheme in enumerate(schemes):
                work.progress(_STEP, index, len(schemes))
                parts = parts_by_format(measurement, scheme.formats)
                points.append(
                    KlPoint(
                        name=scheme.name,
                        scores={name: part.score for name, part in parts.items()},
                        weights={name: part.weights for name, part in parts.items()},
                        kl=kl(scheme),
                    )
                )
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


def known_kl_points(work: Workspace) -> KlPoints | None:
    """Return those that are there and valid."""
    return valid(work, KlPoints, work.output / KL_POINTS_FILE, settings_sha256=_asked(work)[-1])


def _asked(work: Workspace) -> tuple[DataSet, tuple[Scheme, ...], str]:
    """Return the samples, the schemes to simulate on them, and the digest of both."""
    measurement = work.measurement()
    data, schemes = validation_data(work, measurement), kl_point_schemes(measurement)
    rows = [data.summary.sha256, str(len(data.batches))]
    key = digest_of([ARITHMETIC, *rows, *(scheme.fingerprint() for scheme in schemes)])
    return data, schemes, key


def kl_point_schemes(measurement: Measurement) -> tuple[Scheme, ...]:
    """Return schemes that span the range of predicted scores: ladders, mixes, and random choices, each once."""
    first, *others = measurement.formats
    wanted = [(share, first) for share in _KL_POINT_SHARES]
    wanted += [(share, name) for name in others for share in _KL_POINT_SHARES_OF_OTHERS]
    ladder = []
    for share, name in wanted:
        label = f"top{100 * share:g}" if name == first else f"top{100 * share:g}.{name}"
        with contextlib.suppress(InfeasibleTarget):  # less than the first group of a small model
            ladder.append(planning.plan(measurement, SchemeSpec(name=label, coverage=share, format=name)))
    of_first = [scheme for scheme in ladder if first in scheme.formats.values()]
    chosen = [*ladder, *(_mixes(measurement) if others else ())]
    for middle in (of_first[len(of_first) // 2], *chosen[len(ladder) :][1:2]):
        chosen += controls.arms(measurement, middle, kinds=("random", "inverse"), seeds=2)
    return tuple({tuple(scheme.formats.items()): scheme for scheme in chosen}.values())


def _mixes(measurement: Measurement) -> list[Scheme]:
    """Return what is best at a few sizes between the smallest and 16 bits."""
    edge = planning.Solver(measurement)
    low = edge.least_bits / measurement.searched_weights
    return [
        planning.plan(measurement, SchemeSpec(name=f"mix{share:g}", effective_bits=low + share * (BF16_BITS - low)))
        for share in _KL_POINT_MIXES
    ]


def fitted_kl_map(work: Workspace) -> KlMap:
    """Return the map from predicted scores to KL, for schemes that are chosen by KL."""
    return planning.fitted(work.measurement(), measure_kl_points(work), work.output / KL_POINTS_FILE)
