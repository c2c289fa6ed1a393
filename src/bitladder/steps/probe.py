"""Have the recipe's runtime load, and serve, each checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bitladder.device import resolve_device
from bitladder.errors import RecipeError
from bitladder.evaluation.harness.tasks import Tasks
from bitladder.recipe import VllmSpec
from bitladder.records import CheckpointManifest, ProbeResult
from bitladder.runinfo import Meter
from bitladder.runtimes.child import vllm_version
from bitladder.runtimes.vllm import load
from bitladder.steps.asking import serve_samples
from bitladder.steps.known import forget_earlier, probe_path, probed
from bitladder.steps.originals import Originals, tasks_of
from bitladder.steps.step import doing
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
    forget_earlier(work, manifests)
    known = known_probes(work, spec, manifests, vllm_version(python))
    missing = [name for name in manifests if name not in known]
    if missing:
        ranks = work.recipe.tensor_parallel
        if ranks > 1:
            work.tell(
                f"the probe runs each checkpoint on one device, not on the {ranks} of tensor_parallel; pre-flight says "
                "whether these can share it"
            )
        with doing(work, "probe") as meter:
            ask = _load_each if spec.stage == "load" else _serve_all
            for result in ask(work, missing, python, spec.timeout, meter):
                known[str(result.scheme)] = result
                result.write(probe_path(work, result))
    return tuple(known[name] for name in manifests)


def known_probes(
    work: Workspace, spec: VllmSpec, manifests: Mapping[str, CheckpointManifest], version: str
) -> dict[str, ProbeResult]:
    """Return what this version of vLLM is known to do with these checkpoints as far as is asked, tasks included."""
    asked = tasks_of(work) if spec.stage == "generate" else None
    return {
        str(result.scheme): result
        for result in probed(work, manifests)
        if (result.runtime, result.version, result.stage) == ("vllm", version, spec.stage) and _answers(result, asked)
    }


def _answers(result: ProbeResult, asked: Tasks | None) -> bool:
    """Return whether a result has answers to the tasks that are asked, or says why it can't have any."""
    if asked is None or not result.ok:
        return True
    return {(name, one.sha256) for name, one in asked.summaries().items()} <= {
        (one.task, one.sha256) for one in result.tasks
    }


def _load_each(
    work: Workspace, names: Sequence[str], python: Path, timeout: float, meter: Meter
) -> Iterator[ProbeResult]:
    """Yield what vLLM's loader makes of each scheme's checkpoint, one after the other."""
    for index, name in enumerate(names):
        work.progress("probe: load", index, len(names))
        with meter.phase(f"probe {name}: load"):
            result = load.probe(work.checkpoint_directory(name), python, timeout=timeout)
        yield result
    work.progress("probe: load", len(names), len(names))


def _serve_all(
    work: Workspace, names: Sequence[str], python: Path, timeout: float, meter: Meter
) -> tuple[ProbeResult, ...]:
    """Return what vLLM's engine makes of the checkpoints."""
    work.progress("probe: generate", 0, 0)
    with meter.phase("probe: generate"):
        return _serve(work, [work.checkpoint_directory(name) for name in names], python, timeout)


def _serve(work: Workspace, directories: Sequence[Path], python: Path, timeout: float) -> tuple[ProbeResult, ...]:
    """Serve checkpoints, and the original before them, on the first samples of every held-out set."""
    device = resolve_device(work.recipe.measurement.device)
    with Originals(work) as originals:
        return serve_samples(
            originals.data,
            directories,
            work.model_directory,
            python,
            device=device,
            timeout=timeout,
            tasks=originals.asked,
        )
