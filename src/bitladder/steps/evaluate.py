"""Evaluate every checkpoint on every held-out set."""

from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.records import Evaluation, digest_of
from bitladder.steps.originals import Originals
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import Workspace


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
    manifests, key = work.manifests(), digest_of([*originals.settings(), *originals.task_settings()])
    results: dict[str, Evaluation] = {}
    for name, manifest in manifests.items():
        made_from = {"settings_sha256": key, "manifest_sha256": manifest.fingerprint()}
        known = valid(work, Evaluation, work.evaluation_file(name), **made_from)
        if known is not None:
            results[name] = known
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
