"""Write the report and each checkpoint's card from the records that are there."""

from collections.abc import Iterable, Mapping

from bitladder import report
from bitladder.models.weights import licence_of, read_config
from bitladder.recipe import HUB_ID
from bitladder.records import CheckpointManifest, Verification
from bitladder.steps import known
from bitladder.steps.workspace import Workspace
from bitladder.storage import atomic_write


def _said_of_the_original(work: Workspace) -> dict[str, str | None]:
    """Return what model cards say of the original: what the recipe says, else what its files do."""
    asked, path = work.recipe.card, work.recipe.model.path
    base = asked.base_model or (path if HUB_ID.fullmatch(path) else None)
    return {"base_model": base, "license": asked.license or licence_of(work.model_directory)}


def report_of(
    work: Workspace,
    manifests: Mapping[str, CheckpointManifest] | None = None,
    verification: Verification | None = None,
) -> report.Report:
    """Return the report of the records that are there; nothing is written.

    Args:
        work: the recipe and its output directory.
        manifests: of checkpoints elsewhere, by scheme; None: those of the run.
        verification: of these; None: the run's.

    Raises:
        RecordError: there is no measurement or no plan yet, or a record is damaged.
    """
    measurement, schemes = work.measurement(), work.schemes()
    if manifests is None:
        manifests = known.exported(work, schemes)
    return report.build_report(
        recipe={**work.state.recipe, "card": _said_of_the_original(work)},
        measurement=measurement,
        schemes=schemes,
        manifests=manifests,
        verification=verification or known.verified(work, manifests),
        evaluations=known.evaluated(work, manifests),
        phases=[phase for step in work.state.phases.values() for phase in step],
        probes=known.probed(work, manifests),
        evidence=known.evidence_of(work, measurement, schemes),
        refinements=known.refined(work),
        speed=work.speed_model(measurement.groups),
        split=work.split,
        config=read_config(work.model_directory),
        kv_damage=known.kv_damage(work, measurement),
        kl_points=known.kl_points(work, measurement),
    )


def make_report(work: Workspace) -> report.Report:
    """Write `report.html`, `report.md`, `report.json` and each checkpoint's model card from the records that are there.

    Raises:
        RecordError: there is no measurement or no plan yet, or a record is damaged.
    """
    result = report_of(work)
    report.write_report(result, work.output)
    work.place_report()
    write_cards(work, result, [scheme.name for scheme in result.schemes if scheme.checkpoint_bytes is not None])
    return result


def write_cards(work: Workspace, result: report.Report, names: Iterable[str]) -> None:
    """Write the model card of each of these schemes into its checkpoint."""
    for name in names:
        card = work.checkpoint_directory(name) / CheckpointManifest.CARD_NAME
        atomic_write(card, report.render_card(result, name))
