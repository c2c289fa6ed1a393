"""Loader check: does vLLM load a checkpoint, and would it run what the files say? `probe(directory, python)`.

The child (`child_load.py`) takes the checkpoint through vLLM's own loader in vLLM's environment, without an engine, and
writes down what happened: exceptions, which tensor went where, methods, kernels, scales. Here that is compared with
the checkpoint's manifest, layer by layer. Judging (`load_judging.py`) is pure, so that it can be tested without vLLM.
"""

from collections.abc import Sequence
from pathlib import Path

from bitladder.errors import ModelError
from bitladder.records import ProbeFinding, ProbeResult, RunInfo
from bitladder.runinfo import Meter
from bitladder.runtimes.child import VLLM_ENVIRONMENT, VLLM_PACKAGES, Outcome, installed_version, run_child
from bitladder.runtimes.files import read_manifest
from bitladder.runtimes.findings import Findings
from bitladder.runtimes.vllm.facts import Facts
from bitladder.runtimes.vllm.load_judging import child_findings, findings, probed_layers

SCRIPT = Path(__file__).with_name("child_load.py")
RUNTIME = "vllm"
_TAIL = 4000  # characters of a dead child's output that are kept


def judge(
    directory: Path,
    facts: Facts | None,
    *,
    version: str,
    device: str | None,
    extra: Sequence[ProbeFinding] = (),
    output: str | None = None,
    run: RunInfo | None = None,
) -> ProbeResult:
    """Return the result for one checkpoint.

    Args:
        directory: the checkpoint, for its manifest.
        facts: what the child found; None: it never began with this one.
        version: vLLM's.
        device: what vLLM chose.
        extra: what happened to the child itself; comes first.
        output: the end of what it printed, kept where no exception has a traceback.
        run: times and memory.
    """
    damage = Findings()
    manifest = read_manifest(directory, damage)
    layers = () if facts is None else probed_layers(facts, manifest)
    found = () if facts is None else findings(facts, manifest, layers)
    tracebacks = () if facts is None else tuple(failure.traceback for failure in facts.errors)
    return ProbeResult(
        checkpoint=directory.name,
        scheme=None if manifest is None else manifest.scheme,
        manifest_sha256=None if manifest is None else manifest.fingerprint(),
        runtime=RUNTIME,
        version=version,
        stage="load",
        reached="nothing" if facts is None else facts.reached,
        device=device,
        layers=layers,
        findings=(*extra, *found, *damage.records()),
        traceback="\n".join(tracebacks) or output,
        run=run,
    )


def _results(
    directories: Sequence[Path], outcome: Outcome, *, version: str, timeout: float, run: RunInfo
) -> list[ProbeResult]:
    """Return results for the checkpoints that a child began with, at least for the first one."""
    device = outcome.result.get("runtime", {}).get("device")
    parsed: list[Facts | None] = [Facts.model_validate(entry) for entry in outcome.result.get("checkpoints", [])]
    results = []
    for directory, facts in zip(directories, parsed or [None], strict=False):
        unfinished = facts is None or not facts.done
        results.append(
            judge(
                directory,
                facts,
                version=version,
                device=device,
                extra=child_findings(outcome, facts, timeout) if unfinished else (),
                output=outcome.output[-_TAIL:] if unfinished else None,
                run=run,
            )
        )
    return results


def _check(directories: Sequence[Path]) -> None:
    for directory in directories:
        if not directory.is_dir():
            raise ModelError(f"checkpoint directory {directory} does not exist; export it first, or name another one")


def load_all(
    directories: Sequence[Path], python: Path, *, isolated: bool = True, timeout: float = 600.0
) -> tuple[ProbeResult, ...]:
    """Return what vLLM's loader makes of each checkpoint, in order.

    Args:
        directories: the checkpoints.
        python: the interpreter of an environment with vLLM.
        isolated: a child each, so that none can disturb another. Otherwise one child for all, which spares some 10 s
            of imports a checkpoint; when it dies, the rest go to a new one.
        timeout: seconds a checkpoint.

    Raises:
        ModelError: there is no such directory.  BitladderError: no such interpreter.
    """
    _check(directories)
    version = installed_version(python)
    if version is None:
        finding = ProbeFinding(
            error_class="no_runtime",
            where=str(python),
            problem=f"none of {', '.join(VLLM_PACKAGES)} is installed there",
            remedy="name the interpreter of an environment with vLLM (`make vllm-env` makes one for CPUs)",
        )
        return tuple(judge(d, None, version="none", device=None, extra=(finding,)) for d in directories)
    results: list[ProbeResult] = []
    while len(results) < len(directories):
        rest = directories[len(results) :]
        batch = rest[:1] if isolated else rest
        job = {"directories": [str(directory.resolve()) for directory in batch]}
        limit = timeout * len(batch)
        meter = Meter()
        with meter.phase("load"):
            outcome = run_child(python, SCRIPT, job, timeout=limit, environment=VLLM_ENVIRONMENT)
        results += _results(batch, outcome, version=version, timeout=limit, run=meter.info())
    return tuple(results)


def probe(directory: Path, python: Path, *, timeout: float = 600.0) -> ProbeResult:
    """Return what vLLM's loader makes of one checkpoint.

    Raises:
        ModelError: there is no such directory.  BitladderError: no such interpreter.
    """
    return load_all([directory], python, timeout=timeout)[0]
