"""What every runtime would do with each checkpoint, by its rules."""

from bitladder.records import ProbeResult
from bitladder.runinfo import Meter
from bitladder.runtimes import preflight as rules
from bitladder.steps.known import forget_earlier, probe_path, probed
from bitladder.steps.workspace import Workspace


def preflight(work: Workspace) -> tuple[ProbeResult, ...]:
    """Say by each runtime's rules, from the files alone, what it would do with each checkpoint.

    Raises:
        RecordError: a scheme isn't exported yet.
    """
    manifests, meter = work.manifests(), Meter()
    results: list[ProbeResult] = []
    with meter.phase("preflight"):
        for name in manifests:
            results += rules.preflight(work.checkpoint_directory(name), tensor_parallel=work.recipe.tensor_parallel)
    forget_earlier(work, manifests)
    known = {result.fingerprint() for result in probed(work, manifests)}
    changed = [result for result in results if result.fingerprint() not in known]
    for result in changed:
        result.write(probe_path(work, result))
    if changed:
        work.finished("preflight", meter.phases)
    return tuple(results)
