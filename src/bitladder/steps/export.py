"""Export every scheme whose checkpoint isn't there and whole."""

from pathlib import Path

from bitladder.checkpoints.export import export_all, share_equal_files
from bitladder.measured import read_amax, read_codes
from bitladder.records import CheckpointManifest, Scheme
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import Workspace


def is_intact(work: Workspace, scheme: Scheme, directory: Path) -> bool:
    """Return whether the checkpoint in `directory` is this scheme's, whole, and without a file of somebody else's.

    Files whose size and modification time are known are not read again.
    """
    path = directory / CheckpointManifest.FILE_NAME
    manifest = valid(work, CheckpointManifest, path, scheme_sha256=scheme.fingerprint())
    if manifest is None:
        return False
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    known = {CheckpointManifest.FILE_NAME, CheckpointManifest.CARD_NAME, *(entry.name for entry in manifest.files)}
    return present <= known and all(
        (directory / entry.name).is_file() and work.cache.sha256(directory / entry.name) == entry.sha256
        for entry in manifest.files
    )


def export(work: Workspace) -> dict[str, CheckpointManifest]:
    """Export every scheme whose checkpoint isn't there and intact.

    Raises:
        BitladderError: see `checkpoints.export`.
    """
    measurement, schemes = work.measurement(), work.schemes()
    amax = read_amax(measurement, work.output)
    codes = read_codes(measurement, work.output, work.cache.sha256)
    missing = [s for s in schemes if not is_intact(work, s, work.checkpoint_directory(s.name))]
    for scheme in missing:
        work.check_place(work.checkpoint_directory(scheme.name))
    if missing:
        with doing(work, "export") as meter:
            with meter.phase(f"export {len(missing)} scheme{'s' if len(missing) > 1 else ''}"):
                directories = {scheme.name: work.checkpoint_directory(scheme.name) for scheme in missing}
                export_all(missing, measurement, amax, work.model_directory, directories, work.progress, codes)
            if work.recipe.export.share_files:
                share_equal_files([work.checkpoint_directory(scheme.name) for scheme in schemes])
            for scheme in schemes:
                is_intact(work, scheme, work.checkpoint_directory(scheme.name))  # fills the cache of digests
    manifests = work.manifests()
    work.place_manifests(schemes, manifests)
    return manifests
