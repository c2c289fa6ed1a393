"""Evaluate every checkpoint on every held-out set."""

from collections.abc import Mapping

from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.records import CheckpointManifest, Evaluation, digest_of
from bitladder.steps.originals import Originals
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import Workspace


def settings_key(originals: Originals) -> str:
    """Return a digest of what an evaluation depends on beside the checkpoint."""
    return digest_of([*originals.settings(), *originals.task_settings()])


def known_evaluations(work: Workspace, manifests: Mapping[str, CheckpointManifest], key: str) -> dict[str, Evaluation]:
    """Return the evaluations of these checkpoints that are there, with these settings (`settings_key`)."""
    found = {}
    for name, manifest in manifests.items():
        made_from = {"settings_sha256": key, "manifest_sha256": manifest.fingerprint()}
        known = valid(work, Evaluation, work.evaluation_file(name), **made_from)
        if known is not None:
            found[name] = known
    return found


def evaluate(work: Workspace, originals: Originals | None = None) -> dict[str, Evaluation]:
    """Evaluate every checkpoint on every held-out set, unless it was.

    Args:
        work: the recipe and its output directory.
        originals: the original on those sets, where another step needs it as well.

    Raises:
        BitladderError: see `data.samples.load_data` and `evaluation`.
    """
    if originals is None:
        with Originals(work) as originals:
            return evaluate(work, originals)
    manifests, key = work.manifests(), settings_key(originals)
    results = known_evaluations(work, manifests, key)
    arithmetic = work.measurement().arithmetic
    missing = [name for name in manifests if name not in results]
    if missing:
        with doing(work, "evaluate") as meter:
            references, asked = originals.references(meter), originals.answers(meter)
            for name in missing:
                with meter.phase(f"evaluate {name}"):
                    directory = work.checkpoint_directory(name)
                    result = evaluate_checkpoint(references, directory, work.progress, arithmetic, asked)
                results[name] = result.model_copy(update={"settings_sha256": key})
                results[name].write(work.evaluation_file(name))
    return {name: results[name] for name in manifests}
