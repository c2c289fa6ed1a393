"""Swap groups at each scheme's edge while its KL falls."""

from collections.abc import Sequence

from bitladder import planning
from bitladder.data.batches import DataSet
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.planning.refinement import Kl, refine, with_formats
from bitladder.planning.sharing import plannable
from bitladder.recipe import RefineSpec, SchemeSpec
from bitladder.records import BF16, Measurement, Refinement, Refinements, Scheme, digest_of
from bitladder.steps.data import validation_data
from bitladder.steps.simulated import kl_on
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import REFINEMENTS_FILE, Workspace

_STEP = "refine schemes"


def refine_schemes(work: Workspace, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Swap groups at each scheme's edge while its KL on the samples that choose falls, unless that was done.

    Schemes that leave no choice, or name their groups, stay as they are.

    Raises:
        PlanError: see `planning.refinement.refine`. DuplicateSchemes: two schemes come out equal.
    """
    measurement, spec, path = work.measurement(), work.recipe.refine, work.output / REFINEMENTS_FILE
    data, key = _asked(work)
    known = valid(work, Refinements, path, settings_sha256=key)
    done = {one.planned_sha256: one for one in known.refinements} if known is not None else {}
    held = plannable(measurement, work.split)
    open_ = [scheme for scheme in schemes if leaves_choice(scheme)]
    missing = [scheme for scheme in open_ if scheme.fingerprint() not in done]
    if missing:
        with doing(work, _STEP) as meter:
            with meter.phase(_STEP), kl_on(work, measurement, data) as kl:
                for index, scheme in enumerate(missing):
                    work.progress(_STEP, index, len(missing))
                    done[scheme.fingerprint()] = _refinement(held, scheme, kl, spec)
                work.progress(_STEP, len(missing), len(missing))
            Refinements(
                measurement_sha256=measurement.fingerprint(),
                settings_sha256=key,
                data=data.summary,
                samples=sum(len(batch.labels) for batch in data.batches),
                refinements=tuple(done[scheme.fingerprint()] for scheme in open_),
                run=meter.info(),
            ).write(path)
    return planning.related([_refined(measurement, scheme, done.get(scheme.fingerprint())) for scheme in schemes])


def leaves_choice(scheme: Scheme) -> bool:
    """Return whether a scheme has groups in 16 bits that another choice would have quantised."""
    return BF16 in scheme.formats.values() and not scheme.by_name


def known_refinements(work: Workspace) -> Refinements | None:
    """Return those that are there and valid, of the schemes that were planned then."""
    return valid(work, Refinements, work.output / REFINEMENTS_FILE, settings_sha256=_asked(work)[-1])


def _asked(work: Workspace) -> tuple[DataSet, str]:
    """Return the samples to refine on, and the digest of the settings."""
    data = validation_data(work, work.measurement())
    rows = [data.summary.sha256, str(len(data.batches))]
    key = digest_of([ARITHMETIC, *rows, work.recipe.refine.model_dump_json()])
    return data, key


def _refinement(measurement: Measurement, scheme: Scheme, kl: Kl, spec: RefineSpec) -> Refinement:
    """Refine one scheme and return what that came to."""
    excluded = scheme.asked.exclude if isinstance(scheme.asked, SchemeSpec) else ()
    found = refine(
        scheme.weigh(measurement),
        scheme,
        kl,
        evaluations=spec.evaluations,
        marginal=spec.marginal,
        excluded=planning.matching_groups(measurement, scheme.name, excluded),
    )
    return Refinement(
        scheme=scheme.name,
        planned_sha256=scheme.fingerprint(),
        kl_planned=found.before,
        kl_refined=found.after,
        evaluations=found.evaluations,
        changes={group: found.scheme.formats[group] for group in found.swapped},
    )


def _refined(measurement: Measurement, scheme: Scheme, refinement: Refinement | None) -> Scheme:
    if refinement is None:
        return scheme
    return with_formats(scheme.weigh(measurement), scheme, refinement.changes)
