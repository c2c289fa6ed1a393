"""Swap groups at each scheme's edge while its KL falls."""

from collections.abc import Sequence

from bitladder import planning
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.planning.refinement import refine, with_formats
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, Measurement, Refinement, Refinements, Scheme, digest_of
from bitladder.runinfo import Meter
from bitladder.steps.data import scored_calibration_data
from bitladder.steps.simulated import kl_on
from bitladder.steps.workspace import REFINEMENTS_FILE, Workspace


def refine_schemes(work: Workspace, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Swap groups at each scheme's edge while its KL on the scored calibration samples falls, unless that was done.

    Schemes that leave no choice, or name their groups, stay as they are.

    Raises:
        PlanError: see `planning.refinement.refine`. DuplicateSchemes: two schemes come out equal.
    """
    measurement, spec, path = work.measurement(), work.recipe.refine, work.output / REFINEMENTS_FILE
    data = scored_calibration_data(work, measurement)
    key = digest_of([ARITHMETIC, str(len(data.batches)), spec.model_dump_json()])
    known = work.known(Refinements, path)
    done = {} if known is None or known.settings_sha256 != key else {r.planned_sha256: r for r in known.refinements}
    open_ = [scheme for scheme in schemes if BF16 in scheme.formats.values() and "include" not in scheme.asked]
    missing = [scheme for scheme in open_ if scheme.fingerprint() not in done]
    if missing:
        meter = Meter()
        with meter.phase("refine schemes"), kl_on(work, measurement, data) as kl:
            for index, scheme in enumerate(missing):
                work.progress("refine schemes", index, len(missing))
                asked = SchemeSpec.model_validate(scheme.asked)
                found = refine(
                    measurement.weigh_images(asked.image_weight),
                    scheme,
                    kl,
                    evaluations=spec.evaluations,
                    marginal=spec.marginal,
                    excluded=planning.matching_groups(measurement, scheme.name, asked.exclude),
                )
                done[scheme.fingerprint()] = Refinement(
                    scheme=scheme.name,
                    planned_sha256=scheme.fingerprint(),
                    kl_planned=found.before,
                    kl_refined=found.after,
                    evaluations=found.evaluations,
                    changes={group: found.scheme.formats[group] for group in found.swapped},
                )
            work.progress("refine schemes", len(missing), len(missing))
        Refinements(
            measurement_sha256=measurement.fingerprint(),
            settings_sha256=key,
            data=data.summary,
            samples=sum(len(batch.labels) for batch in data.batches),
            refinements=tuple(done[scheme.fingerprint()] for scheme in open_),
            run=meter.info(),
        ).write(path)
        work.finished("refine schemes", meter.phases)
    return planning.related([_refined(measurement, scheme, done.get(scheme.fingerprint())) for scheme in schemes])


def _refined(measurement: Measurement, scheme: Scheme, refinement: Refinement | None) -> Scheme:
    if refinement is None:
        return scheme
    weight = SchemeSpec.model_validate(scheme.asked).image_weight
    return with_formats(measurement.weigh_images(weight), scheme, refinement.changes)
