"""Evaluate every checkpoint on every held-out set."""

from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.records import Evaluation, digest_of
from bitladder.runinfo import Meter
from bitladder.steps.originals import Originals
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
    manifests, key = work.manifests(), digest_of(originals.settings())
    results: dict[str, Evaluation] = {}
    for name, manifest in manifests.items():
        path = work.evaluation_file(name)
        known = work.known(Evaluation, path)
        if known and known.settings_sha256 == key and known.manifest_sha256 == manifest.fingerprint():
            results[name] = known
    missing = [name for name in manifests if name not in results]
    if missing:
        meter = Meter()
        references = originals.references(meter)
        for name in missing:
            with meter.phase(f"evaluate {name}"):
                result = evaluate_checkpoint(references, work.checkpoint_directory(name), progress=work.progress)
            results[name] = result.model_copy(update={"settings_sha256": key})
            results[name].write(work.evaluation_file(name))
        work.finished("evaluate", meter.phases)
    return {name: results[name] for name in manifests}
