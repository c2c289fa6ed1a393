"""What a run would do and why, without doing it: `preview(work)`. Nothing is written."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitladder.measured import MEASUREMENT_FILE
from bitladder.recipe import GENERATED, OtherRowsSpec
from bitladder.records import Evidence, KvDamage, Scheme, Verification
from bitladder.runtimes.child import vllm_version
from bitladder.steps import known
from bitladder.steps.controls import settings_of
from bitladder.steps.data import is_written
from bitladder.steps.evaluate import known_evaluations, settings_key
from bitladder.steps.export import is_intact
from bitladder.steps.kl_points import known_kl_points
from bitladder.steps.kv_damage import known_kv_damage
from bitladder.steps.look import look
from bitladder.steps.measure import known_measurement
from bitladder.steps.originals import Originals
from bitladder.steps.probe import known_probes
from bitladder.steps.refine import known_refinements, leaves_choice
from bitladder.steps.step import valid
from bitladder.steps.workspace import (
    EVIDENCE_FILE,
    KL_POINTS_FILE,
    REFINEMENTS_FILE,
    VERIFICATION_FILE,
    Workspace,
)

_UNWRITTEN = "the model has to write the rows of kind generated"


@dataclass(frozen=True)
class Ahead:
    """A step of a run.

    Attributes:
        step: the command that does it alone.
        why: why there is something to do; None: it is done, and valid.
        seconds: that it took when this output directory last saw it; None: it never did.
    """

    step: str
    why: str | None
    seconds: float | None


def preview(work: Workspace) -> tuple[Ahead, ...]:
    """Return the steps of a run in their order.

    Raises:
        BitladderError: what a run would be refused for at its start.
    """
    look(work, held_out=True)
    found: list[Ahead] = []
    before = None  # the first step with something to do: what comes after it follows
    for step, why_not_done in _steps(work):
        why = why_not_done() if before is None else f"follows from {before}"
        if why is not None and before is None:
            before = step
        phases = work.state.phases.get(step)
        found.append(Ahead(step, why, None if phases is None else sum(phase.seconds for phase in phases)))
    return (*found, Ahead("report", "is written from the records each time", None))


def _steps(work: Workspace) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield each step with what says why it has something to do, where those before it have nothing."""
    yield "measure", lambda: _measure(work)
    yield "plan", lambda: _plan(work)
    yield "export", lambda: _export(work)
    yield "verify", lambda: _verify(work)
    if work.recipe.runtimes.vllm is not None:
        yield "probe", lambda: _probe(work)
    yield "evaluate", lambda: _evaluate(work)
    if work.recipe.controls.kinds:
        yield "controls", lambda: _controls(work)


def _measure(work: Workspace) -> str | None:
    if not (work.output / MEASUREMENT_FILE).exists():
        return "nothing is measured yet"
    specs = [spec for spec in work.recipe.calibration if spec.data.kind == GENERATED]
    return known_measurement(work)[1] if all(is_written(work, spec, spec.data) for spec in specs) else _UNWRITTEN


def _plan(work: Workspace) -> str | None:
    measurement = work.measurement()
    missing = []
    for spec in work.recipe.scheme_specs():
        scheme = work.known(Scheme, work.scheme_file(spec.name))
        if scheme is None or (scheme.asked, scheme.measurement_sha256) != (spec, measurement.fingerprint()):
            missing.append(spec.name)
    if missing:
        return f"not planned as asked: {', '.join(missing)}"
    return _choose(work) if work.recipe.chooses_by_kl else None


def _choose(work: Workspace) -> str | None:
    """Return why the KLs that choose schemes have to be measured; None: they are, and valid."""
    recipe = work.recipe
    if not _is_written(work, recipe.validation):
        return _UNWRITTEN
    refined = recipe.refine.evaluations > 0 and any(map(leaves_choice, work.schemes()))
    records = (
        (recipe.maps_kl, known_kl_points, KL_POINTS_FILE),
        (recipe.shares_kv_cache, known_kv_damage, KvDamage.FILE_NAME),
        (refined, known_refinements, REFINEMENTS_FILE),
    )
    missing = [name for needed, known_record, name in records if needed and known_record(work) is None]
    return f"KL isn't measured so: {', '.join(missing)}" if missing else None


def _is_written(work: Workspace, sets: Sequence[OtherRowsSpec]) -> bool:
    """Return whether the model has written the rows of those sets that are of kind generated."""
    sources = [(one, work.recipe.data_of(one)) for one in sets]
    return all(is_written(work, one, source) for one, source in sources if source.kind == GENERATED)


def _export(work: Workspace) -> str | None:
    missing = [s.name for s in work.schemes() if not is_intact(work, s, work.checkpoint_directory(s.name))]
    return f"no whole checkpoint of {', '.join(missing)}" if missing else None


def _verify(work: Workspace) -> str | None:
    digests = known.fingerprints(work.manifests())
    found = valid(work, Verification, work.output / VERIFICATION_FILE, manifest_sha256=digests, ok=True)
    return "these checkpoints aren't verified" if found is None else None


def _probe(work: Workspace) -> str | None:
    spec, manifests = work.recipe.runtimes.vllm, work.manifests()
    assert spec is not None
    version = vllm_version(Path(spec.python))
    done = known_probes(work, spec, manifests, version)
    missing = [name for name in manifests if name not in done]
    return f"vLLM {version} wasn't asked about {', '.join(missing)}" if missing else None


def _evaluate(work: Workspace) -> str | None:
    if not _is_written(work, (*work.recipe.validation, *work.recipe.held_out)):
        return _UNWRITTEN
    manifests = work.manifests()
    with Originals(work) as originals:
        done = known_evaluations(work, manifests, settings_key(originals))
    missing = [name for name in manifests if name not in done]
    return f"not evaluated so: {', '.join(missing)}" if missing else None


def _controls(work: Workspace) -> str | None:
    spec = work.recipe.controls
    arms = known.control_arms(work.measurement(), work.schemes(), spec)
    with Originals(work) as originals:
        key = settings_of(originals, spec, arms)
    found = valid(work, Evidence, work.output / EVIDENCE_FILE, settings_sha256=key)
    done = 0 if found is None else len(found.arms) + len(found.left_out)
    return f"{len(arms) - done} of {len(arms)} arms aren't evaluated" if done < len(arms) else None
