"""Have the recipe's runtime load, and serve, each checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from bitladder.device import resolve_device
from bitladder.errors import RecipeError
from bitladder.records import ProbeResult
from bitladder.runinfo import Meter
from bitladder.runtimes.child import vllm_version
from bitladder.runtimes.vllm import load
from bitladder.steps.asking import serve_on
from bitladder.steps.originals import Originals
from bitladder.steps.probes import probe_path, probes
from bitladder.steps.workspace import Workspace


def probe(work: Workspace) -> tuple[ProbeResult, ...]:
    """Have the recipe's runtime load (and serve) each checkpoint, unless that version did; a failure is a result.

    Raises:
        RecipeError: the recipe names no runtime. BitladderError: it isn't installed in the environment that is named.
    """
    spec, manifests = work.recipe.runtimes.vllm, work.manifests()
    if spec is None:
        raise RecipeError(
            "the recipe names no runtime to probe; give --python PATH, or add `runtimes: {vllm: {python: PATH}}` "
            "(`make vllm-env` makes .venv-vllm/bin/python)"
        )
    python = Path(spec.python)
    version = vllm_version(python)
    known = {
        result.scheme: result
        for result in probes(work, manifests)
        if (result.runtime, result.version, result.stage) == ("vllm", version, spec.stage)
    }
    missing, meter = [name for name in manifests if name not in known], Meter()
    if missing and spec.stage == "load":
        for index, name in enumerate(missing):
            work.progress("probe: load", index, len(missing))
            with meter.phase(f"probe {name}: load"):
                known[name] = load.probe(work.checkpoint_directory(name), python, timeout=spec.timeout)
            known[name].write(probe_path(work, known[name]))
        work.progress("probe: load", len(missing), len(missing))
    elif missing:
        work.progress("probe: generate", 0, 0)
        with meter.phase("probe: generate"):
            directories = [work.checkpoint_directory(name) for name in missing]
            served = _serve(work, directories, python, spec.timeout)
        for name, result in zip(missing, served, strict=True):
            known[name] = result
            result.write(probe_path(work, result))
    if missing:
        work.finished("probe", meter.phases)
    return tuple(known[name] for name in manifests)


def _serve(work: Workspace, directories: Sequence[Path], python: Path, timeout: float) -> tuple[ProbeResult, ...]:
    """Serve checkpoints, and the original before them, on the first samples of every held-out set."""
    device = resolve_device(work.recipe.measurement.device)
    with Originals(work) as originals:
        return serve_on(originals.data, directories, work.model_directory, python, device=device, timeout=timeout)
