"""Export one scheme's checkpoint to a directory outside the run, and verify it there."""

from pathlib import Path

from bitladder import verification
from bitladder.checkpoints.export import export_all
from bitladder.measured import read_amax, read_codes
from bitladder.records import CheckpointManifest, digest_of
from bitladder.report import render_card
from bitladder.steps.glance import check_elsewhere
from bitladder.steps.report import report_of
from bitladder.steps.verify import refuse_findings
from bitladder.steps.workspace import Workspace
from bitladder.storage import atomic_write, temporaries_in

_KEY_CHARACTERS = 16  # of the name of its temporaries


def export_elsewhere(work: Workspace, name: str, directory: Path) -> CheckpointManifest:
    """Write a scheme's checkpoint to `directory`, verify it, and give it its card; the run's own stay as they are.

    Raises:
        OutputError: as `check_elsewhere`. RecordError: there is no measurement or no plan yet.
        VerificationFailed: what was written isn't what the scheme says.
    """
    check_elsewhere(work, directory)
    measurement = work.measurement()
    scheme = next(scheme for scheme in work.schemes() if scheme.name == name)
    amax, carrier = read_amax(measurement, work.output), work.recipe.export.carrier
    codes = read_codes(measurement, work.output, work.cache.sha256)
    places, source = {name: directory}, work.model_directory
    with temporaries_in([directory.parent], digest_of([str(directory)])[:_KEY_CHARACTERS]):
        manifests = export_all([scheme], measurement, amax, source, places, work.progress, codes, carrier)
    found = verification.verify([scheme], measurement, amax, source, places, work.progress, carrier)
    refuse_findings(found, f"the files are in {directory}")
    report = report_of(work, manifests, found)
    atomic_write(directory / CheckpointManifest.CARD_NAME, render_card(report, name))
    return manifests[name]
