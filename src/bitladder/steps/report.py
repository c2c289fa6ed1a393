"""Write the report and each checkpoint's card from the records that are there."""

from collections.abc import Mapping, Sequence

from bitladder import planning, report
from bitladder.errors import InfeasibleTarget
from bitladder.recipe import SchemeSpec
from bitladder.records import CheckpointManifest, Evaluation, Measurement, Refinements, Scheme, Verification
from bitladder.steps.evidence import evidence_of
from bitladder.steps.probes import probes
from bitladder.steps.workspace import REFINEMENTS_FILE, VERIFICATION_FILE, Workspace
from bitladder.storage import atomic_write


def make_report(work: Workspace) -> report.Report:
    """Write `report.html`, `report.md`, `report.json` and each checkpoint's model card from the records that are there.

    Raises:
        RecordError: there is no measurement or no plan yet.
    """
    measurement, schemes = work.measurement(), work.schemes()
    manifests: dict[str, CheckpointManifest] = {}
    evaluations: dict[str, Evaluation] = {}
    for scheme in schemes:
        manifest_path = work.checkpoint_directory(scheme.name) / CheckpointManifest.FILE_NAME
        if manifest_path.exists():
            manifest = CheckpointManifest.read(manifest_path)
            if manifest.scheme_sha256 != scheme.fingerprint():
                continue  # of an earlier plan: not exported yet
            manifests[scheme.name] = manifest
            evaluation_path = work.evaluation_file(scheme.name)
            if evaluation_path.exists():
                known = Evaluation.read(evaluation_path)
                if known.manifest_sha256 == manifest.fingerprint():
                    evaluations[scheme.name] = known
    path = work.output / VERIFICATION_FILE
    verified = Verification.read(path) if path.exists() else None
    wanted = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    if verified and {c.scheme: c.manifest_sha256 for c in verified.checkpoints} != wanted:
        verified = None  # of earlier checkpoints
    refined = Refinements.read_if_whole(work.output / REFINEMENTS_FILE) if work.recipe.refine.evaluations else None
    result = report.build_report(
        recipe=work.state.recipe,
        measurement=measurement,
        schemes=schemes,
        manifests=manifests,
        verification=verified,
        evaluations=evaluations,
        phases=[phase for step in work.state.phases.values() for phase in step],
        standard_errors=standard_errors(measurement, schemes),
        text_only_changes=text_only_changes(measurement, schemes),
        probes=probes(work, manifests),
        evidence=evidence_of(work, measurement, schemes),
        refinements=refined,
    )
    report.write_report(result, work.output)
    work.place_report()
    for name in manifests:
        card = work.checkpoint_directory(name) / CheckpointManifest.CARD_NAME
        atomic_write(card, report.render_card(result, name))
    return result


def standard_errors(measurement: Measurement, schemes: Sequence[Scheme]) -> Mapping[str, float | None]:
    """Return the standard error of each scheme's predicted score over the scoring batches."""
    return {
        scheme.name: planning.standard_error(
            measurement.weigh_images(SchemeSpec.model_validate(scheme.asked).image_weight), scheme.formats
        )
        for scheme in schemes
    }


def text_only_changes(measurement: Measurement, schemes: Sequence[Scheme]) -> Mapping[str, int | None]:
    """Return in how many groups each scheme would have another format if only text positions counted.

    None: what was asked can't be met then. A scheme asked for by its KL is compared at its bits. Empty where the scores
    of image positions are not known apart.
    """
    if not all(candidate.image_scores for candidate in measurement.candidates):
        return {}
    changes: dict[str, int | None] = {}
    for scheme in schemes:
        changed: dict[str, float | None] = {"image_weight": 0.0}
        if scheme.asked.get("max_kl") is not None:  # which score has that KL is known of both parts together alone
            changed |= {"max_kl": None, "effective_bits": scheme.effective_bits}
        spec = SchemeSpec.model_validate(scheme.asked).model_copy(update=changed)
        try:
            formats = planning.plan(measurement, spec).formats
        except InfeasibleTarget:  # a bound on the predicted score below what text alone gives
            changes[scheme.name] = None
        else:
            changes[scheme.name] = sum(scheme.formats.get(group) != name for group, name in formats.items())
    return changes
