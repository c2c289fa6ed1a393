"""All steps of a recipe in one directory: what is done and still valid is skipped, the rest is (re)done.

    run.json                    marks the directory as ours; the resolved recipe; what each step took
    measurement.json            + measurement.safetensors
    simulated.json              until all is planned: the KLs of what was simulated for that
    kl_points.json              where a scheme is asked for by its KL
    refinements.json            where schemes are refined
    schemes/<name>.json
    checkpoints/<name>/
    verification.json
    evaluations/<name>.json
    evidence.json               control arms
    generated/                  rows of kind generated, which the model wrote
    probes/<name>--<runtime>-<version>-<stage>.json
    report.html, report.md, report.json

The recipe's `layout` may place the checkpoints elsewhere, manifests beside them, and a copy of the report.

A step is valid when its record names the digest of what it was made from: the measurement that of model, data and
settings; a checkpoint that of scheme and measurement; an evaluation that of checkpoint, held-out data and arithmetic.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from bitladder import (
    calibration,
    checkpoint,
    controls,
    evaluation,
    generation,
    kv_cache,
    planning,
    probing,
    report,
    sensitivity,
    targets,
    verification,
)
from bitladder.errors import (
    DataError,
    InfeasibleTarget,
    MeasurementError,
    ModelError,
    OutputError,
    PlanError,
    RecipeError,
    RecordError,
    StaleRecord,
    VerificationFailed,
    reason_of,
)
from bitladder.formats import get_format
from bitladder.prediction import KlMap
from bitladder.reading import read_bytes
from bitladder.recipe import (
    GENERATED,
    MESSAGES,
    PAIR_KINDS,
    SCHEME_PLACE,
    ControlSpec,
    DataSpec,
    HeldOutSpec,
    Recipe,
    SampleSpec,
    SchemeSpec,
)
from bitladder.records import (
    BF16,
    CheckpointManifest,
    ControlArm,
    DataSummary,
    Evaluation,
    Evidence,
    KlPoint,
    KlPoints,
    Measurement,
    ModelSource,
    PhaseCost,
    ProbeResult,
    Record,
    Refinement,
    Refinements,
    RunState,
    Scheme,
    SimulatedKls,
    Verification,
    digest_of,
)
from bitladder.refinement import refine, with_formats
from bitladder.runinfo import Meter, Progress, no_progress
from bitladder.runtimes import load
from bitladder.runtimes import preflight as rules
from bitladder.runtimes.child import vllm_version
from bitladder.simulation import Simulation
from bitladder.storage import (
    TEMPORARY_PREFIX,
    atomic_write,
    discard,
    explain_os_errors,
    remove_leftovers,
    temporaries_in,
)
from bitladder.weights import DigestCache, model_source

LOCK_FILE = ".lock"
_KEY_CHARACTERS = 12  # of the digest that tells one output's temporaries from another's
EVIDENCE_FILE = "evidence.json"
KL_POINTS_FILE = "kl_points.json"
SIMULATED_FILE = "simulated.json"
REFINEMENTS_FILE = "refinements.json"
_KL_POINT_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the searched weights; schemes between which KL is interpolated
PROBES = "probes"  # directory

RecordT = TypeVar("RecordT", bound=Record)


def fetch_model(path: str, revision: str | None) -> Path:
    """Return the model's directory; a Hub id is downloaded (or found in the local cache).

    Raises:
        ModelError: no such directory, no such model, no network.
    """
    directory = Path(path)
    if directory.is_absolute():
        if not directory.is_dir():
            raise ModelError(f"model directory {directory} does not exist; check model.path")
        return directory
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision))
    except Exception as error:  # the hub's client raises its own and the network's errors
        reason = reason_of(error)
        raise ModelError(f"model {path} can't be fetched from the Hub ({reason}); name a local directory") from error


@dataclass
class Workspace:
    """One recipe and its output directory."""

    recipe: Recipe
    output: Path
    progress: Progress = no_progress
    tell: Callable[[str], None] = lambda line: None  # takes a line for the user
    state: RunState = field(init=False)
    cache: DigestCache = field(init=False)
    done: list[str] = field(default_factory=list)  # the steps that this process had to do
    loaded: dict[str, calibration.DataSet] = field(default_factory=dict)  # sets that this process has read
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> None:
        """Read what the output directory knows; nothing is written before a step has done something.

        Raises:
            OutputError: it isn't a directory of ours.
        """
        path = self.output / RunState.FILE_NAME
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"output {self.output} is a file; choose another output directory")
        known = self.known(RunState, path)
        self.state = known or RunState(recipe={})
        if known is None and not path.exists() and self.output.is_dir():
            ours = (LOCK_FILE, TEMPORARY_PREFIX)  # all that a run that was killed at its start leaves
            foreign = any(not entry.name.startswith(ours) for entry in self.output.iterdir())
            if foreign and Measurement.read_if_whole(self.output / sensitivity.MEASUREMENT_FILE) is None:
                raise OutputError(
                    f"output {self.output} holds something that Bitladder didn't write; choose another directory"
                )
        self.cache = DigestCache(self.state.digests)
        self.state = self.state.model_copy(update={"recipe": self.recipe.model_dump(mode="json")})

    def known(self, kind: type[RecordT], path: Path) -> RecordT | None:
        """Return what an earlier run wrote to `path`; None: nothing, or something damaged, which is told."""
        try:
            return kind.read(path) if path.exists() else None
        except RecordError as error:
            line = f"made again: {str(error).partition(';')[0]}"
            if line not in self._told:
                self.tell(line)
            self._told.add(line)
            return None

    def save(self) -> None:
        """Write `run.json`, where it changed."""
        known = {path: entry for path, entry in self.cache.known.items() if Path(path).exists()}
        self.state = self.state.model_copy(update={"digests": known})
        path = self.output / RunState.FILE_NAME
        if RunState.read_if_whole(path) != self.state:
            self.state.write(path)

    def finished(self, step: str, phases: Sequence[PhaseCost]) -> None:
        """Note that a step was done, and what it took."""
        self.done.append(step)
        self.state = self.state.model_copy(update={"phases": {**self.state.phases, step: tuple(phases)}})
        self.save()

    def note_measured_with(self, sections: dict[str, Any]) -> None:
        """Note the sections of a recipe that the measurement which is there was made with, where they are others."""
        if self.state.measured_with != sections:
            self.state = self.state.model_copy(update={"measured_with": sections})
            self.save()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the output directory, and let no temporary of any run stay in it.

        Raises:
            OutputError: another process is working there, or the directory can't be written.
        """
        with explain_os_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
            # Not through a link, and nothing is truncated: the lock is all that the file is for.
            lock = os.open(self.output / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(f"another bitladder process is working in {self.output}; wait for it") from None
            remove_leftovers(self.output)
            key = digest_of([str(self.output)])[:_KEY_CHARACTERS]
            with temporaries_in(self._places(), key):
                self._open()  # another process may have worked there since this one looked
                self.save()
                yield
        finally:
            os.close(lock)

    def _places(self) -> list[Path]:
        """Return the directories that a run writes to."""
        report = [] if self.recipe.layout.report is None else [self._placed(self.recipe.layout.report).parent]
        return list(dict.fromkeys([self.output, self.checkpoint_directory("any").parent, *report]))

    @cached_property
    def model_directory(self) -> Path:
        """Where the original model's files are."""
        return fetch_model(self.recipe.model.path, self.recipe.model.revision)

    @cached_property
    def target(self) -> targets.Target:
        """What of the model is searched."""
        return targets.find_target(self.model_directory)

    @cached_property
    def most_positions(self) -> int | None:
        """How many tokens a sequence of the model may have; None: there is no limit."""
        return targets.most_positions(self.model_directory)

    def source(self) -> ModelSource:
        """Return the identity of the model as it is now."""
        spec = self.recipe.model
        return model_source(self.model_directory, path=spec.path, revision=spec.revision, cache=self.cache)

    def checkpoint_directory(self, scheme: str) -> Path:
        """Return where a scheme's checkpoint lies."""
        return self._placed(self.recipe.layout.checkpoints.replace(SCHEME_PLACE, scheme))

    def _placed(self, path: str) -> Path:
        """Return a path of the recipe's layout as absolute."""
        return Path(os.path.normpath(self.output / path))

    def check_place(self, directory: Path) -> None:
        """Refuse to replace a checkpoint outside the output directory that isn't one of ours.

        Raises:
            OutputError: there is something else in `directory`.
        """
        report = self.recipe.layout.report
        if report is not None and self._placed(report).is_relative_to(directory):
            raise OutputError(f"layout.report {report!r} lies in the checkpoint {directory}; name another place")
        if directory.is_relative_to(self.output) or (directory / CheckpointManifest.FILE_NAME).exists():
            return
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise OutputError(f"{directory} holds something that Bitladder didn't write; move it away")

    def place_manifests(self, schemes: Sequence[Scheme], manifests: Mapping[str, CheckpointManifest]) -> None:
        """Write what the recipe's layout wants beside the checkpoints: scheme and manifest of each in one file."""
        if not self.recipe.layout.manifests:
            return
        for scheme in schemes:
            directory = self.checkpoint_directory(scheme.name)
            parts = {"scheme": scheme, "checkpoint": manifests[scheme.name]}
            content = json.dumps({key: part.model_dump(mode="json") for key, part in parts.items()}, indent=1) + "\n"
            path = directory.with_name(f"{directory.name}.manifest.json")
            if not path.is_file() or read_bytes(path) != content.encode():
                atomic_write(path, content)

    def place_report(self) -> None:
        """Copy `report.md` to where the recipe's layout wants it."""
        if self.recipe.layout.report is not None:
            atomic_write(self._placed(self.recipe.layout.report), read_bytes(self.output / report.MARKDOWN_FILE))

    def measurement(self) -> Measurement:
        """Return the measurement, checked to be of this model and of this recipe's formats.

        Raises:
            RecordError: there is none. StaleRecord: it is of another model, or of changed weights.
        """
        measurement = Measurement.read(self.output / sensitivity.MEASUREMENT_FILE)
        source = self.source()
        if measurement.model.sha256 != source.sha256:
            raise StaleRecord(
                f"{self.output / sensitivity.MEASUREMENT_FILE} was measured on other weights "
                f"({measurement.model.path}) than {source.path} has now; measure again"
            )
        return measurement

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the recipe's schemes as planned.

        Raises:
            RecordError: one isn't planned yet.
        """
        return tuple(Scheme.read(self.scheme_file(spec.name)) for spec in self.recipe.schemes)

    def orphans(self) -> list[Path]:
        """Return what lies in the output of schemes that the recipe doesn't have any more; nobody removes it."""
        names = {spec.name for spec in self.recipe.schemes}
        gone = sorted(path.stem for path in (self.output / "schemes").glob("*.json") if path.stem not in names)
        places = (self.scheme_file, self.checkpoint_directory, self.evaluation_file)
        return [path for name in gone for place in places if (path := place(name)).exists()]

    def scheme_file(self, scheme: str) -> Path:
        """Return where a planned scheme lies."""
        return self.output / "schemes" / f"{scheme}.json"

    def evaluation_file(self, scheme: str) -> Path:
        """Return where a checkpoint's evaluation lies."""
        return self.output / "evaluations" / f"{scheme}.json"

    def manifests(self) -> dict[str, CheckpointManifest]:
        """Return the manifests of all checkpoints.

        Raises:
            RecordError: one isn't exported yet.
        """
        return {
            spec.name: CheckpointManifest.read(self.checkpoint_directory(spec.name) / CheckpointManifest.FILE_NAME)
            for spec in self.recipe.schemes
        }


def look(work: Workspace, *, held_out: bool = False) -> None:
    """Look at everything that a user may have got wrong, before the model is hashed or anything is computed.

    Args:
        work: the recipe and its output directory.
        held_out: whether held-out data will be needed.

    Raises:
        BitladderError: a format or device that isn't there, a model that can't be searched, a pattern that matches
            nothing of it, data that can't be used, no runtime in the environment that is named.
    """
    recipe, directory = work.recipe, work.model_directory
    for name in recipe.measurement.formats:
        get_format(name)
    sensitivity.measuring_device(recipe.measurement, recipe.workers)
    if recipe.runtimes.vllm is not None:
        vllm_version(Path(recipe.runtimes.vllm.python))
    if not (work.output / sensitivity.MEASUREMENT_FILE).exists():
        sensitivity.check_engine(recipe.measurement, work.target)
    for scheme in recipe.schemes:
        patterns = (*(scheme.include or ()), *scheme.exclude)
        if patterns:
            planning.matching_groups(work.target, scheme.name, patterns)
    for spec in recipe.calibration:
        _check_asked_length(work, spec.sequence_length, spec.data)
    for one in recipe.held_out if held_out else ():
        _check_asked_length(work, one.sequence_length, one.data or recipe.calibration[0].data)
    processor = calibration.load_processor(directory)
    readable = [spec for spec in recipe.calibration if spec.data.kind != GENERATED]  # others the model has to write
    sets = _calibration_sets(work, readable, processor)
    for one in recipe.held_out if held_out else ():
        source = one.data or recipe.calibration[0].data
        if source.kind != GENERATED:
            seen = calibration.interleaved(sets).summary if sets else None
            _load_set(work, one, source, processor, seen)


def calibration_data(work: Workspace) -> calibration.DataSet:
    """Return the recipe's calibration batches; several sets are interleaved, and have no sample in common.

    Raises:
        BitladderError: see `calibration.load_data` and `generation`.
    """
    processor = calibration.load_processor(work.model_directory)
    return calibration.interleaved(_calibration_sets(work, work.recipe.calibration, processor))


def _calibration_sets(work: Workspace, specs: Sequence[SampleSpec], processor: Any) -> list[calibration.DataSet]:
    """Return the batches of calibration sets, none of which has a sample of one before."""
    sets: list[calibration.DataSet] = []
    for spec in specs:
        seen = calibration.interleaved(sets).summary if sets else None
        sets.append(_load_set(work, spec, spec.data, processor, seen))
    return sets


def _load_set(
    work: Workspace, spec: SampleSpec | HeldOutSpec, source: DataSpec, processor: Any, avoid: DataSummary | None
) -> calibration.DataSet:
    """Return one set's batches, of samples that `avoid` doesn't have; a process reads each once."""
    key = digest_of([spec.model_dump_json(), source.model_dump_json(), *(avoid.sample_ids if avoid else ())])
    if key not in work.loaded:
        _check_asked_length(work, spec.sequence_length, source)
        found = calibration.load_data(
            source,
            processor,
            samples=spec.samples,
            sequence_length=spec.sequence_length,
            batch_size=spec.batch_size,
            seed=spec.seed,
            avoid=avoid,
            vocabulary=targets.embedding_rows(work.model_directory),
            written=_written_rows(work, spec, source, processor) if source.kind == GENERATED else None,
        )
        _check_width(work, source, max(batch.labels.shape[1] for batch in found.batches))
        if found.summary.null_rows:
            work.tell(f"{source.path}: {found.summary.null_rows} of the rows that were read hold null and are left out")
        work.loaded[key] = found
    return work.loaded[key]


def _check_asked_length(work: Workspace, length: int, source: DataSpec) -> None:
    """Raise for rows longer than the model has positions for, before any is made; not where it is only a bound."""
    limit = work.most_positions
    if source.kind not in (*PAIR_KINDS, MESSAGES) and limit is not None and length > limit:
        raise DataError(
            f"sequence_length {length} is more than the {limit} positions that the model knows "
            f"(max_position_embeddings); set sequence_length to at most {limit}"
        )


def _check_width(work: Workspace, source: DataSpec, width: int) -> None:
    """Raise for samples of more tokens than the model has positions for.

    Args:
        work: the recipe and its output directory.
        source: where they come from.
        width: tokens of the longest sample.
    """
    limit = work.most_positions
    if limit is not None and width > limit:
        remedy = (
            "use smaller pictures or shorter texts" if source.kind in PAIR_KINDS else f"set sequence_length: {limit}"
        )
        raise DataError(
            f"{source.path or calibration.GENERATED_SOURCE}: a sample has {width} tokens, more than the {limit} "
            f"positions that the model knows (max_position_embeddings); {remedy}"
        )


def _written_rows(work: Workspace, spec: SampleSpec | HeldOutSpec, source: DataSpec, processor: Any) -> torch.Tensor:
    """Return the rows [samples, sequence_length] that the model wrote, which it does once."""
    tokenizer = calibration.tokenizer_of(processor)
    start, kept = generation.start_of(tokenizer)
    writing = generation.Writing(
        samples=spec.samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        temperature=1.0 if source.temperature is None else source.temperature,
        start=start,
        kept=kept,
        known_tokens=len(tokenizer),
        dtype=work.recipe.measurement.dtype,
        device=work.recipe.measurement.device,
    )
    path = generation.file_of(work.output, writing, work.source().sha256)
    if not path.exists():
        meter = Meter()
        with meter.phase(generation.PHASE):
            generation.write(work.model_directory, writing, path, work.progress)
        work.finished("generate", meter.phases)
    return generation.read(path, writing)


def measure(work: Workspace) -> Measurement:
    """Measure once, or return the measurement that is there and valid.

    Raises:
        BitladderError: see `sensitivity.measure`.
    """
    look(work)
    source, directory, data = work.source(), work.model_directory, calibration_data(work)
    path = work.output / sensitivity.MEASUREMENT_FILE
    key = sensitivity.settings_sha256(source, data, work.recipe.measurement)
    if path.exists():
        known = Measurement.read(path)
        amax = work.output / sensitivity.AMAX_FILE
        has_amax = amax.is_file() and work.cache.sha256(amax) == known.amax_sha256
        has_codes = _codes_are_intact(work, known, work.output)
        if known.settings_sha256 == key and has_amax and has_codes:
            sensitivity.forget_partial(work.output)  # of a run that was killed when it had measured
            work.note_measured_with(deciding(work.recipe))  # nor had it noted this
            return known
        work.tell(f"measuring again: {why_again(work, known, source, data, has_amax=has_amax, has_codes=has_codes)}")
    target = work.target
    if any(spec.kv_cache == "fp8" for spec in work.recipe.scheme_specs()):
        kv_cache.check_layers(target.groups)
    measurement = sensitivity.measure(
        directory, source, target, data, work.recipe.measurement, work.output, work.progress, work.recipe.workers
    )
    work.note_measured_with(deciding(work.recipe))
    work.finished("measure", measurement.run.phases if measurement.run else ())
    return measurement


def deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the sections of a recipe that decide its measurement."""
    return recipe.model_dump(mode="json", include={"model", "calibration", "measurement"})


def why_again(
    work: Workspace,
    known: Measurement,
    source: ModelSource,
    data: calibration.DataSet,
    *,
    has_amax: bool,
    has_codes: bool,
) -> str:
    """Say in a line what is not as it was when the measurement that is there was made."""
    before = work.state.measured_with
    changes = _changes(before, deciding(work.recipe)) if before else []
    if known.model.sha256 != source.sha256:
        changes.append("the model's files are others")
    if known.calibration.sha256 != data.summary.sha256 and not any(line.startswith("calibration") for line in changes):
        changes.append("the calibration samples are others")
    if not has_amax:
        changes.append(f"{sensitivity.AMAX_FILE} is missing or damaged")
    if not has_codes:
        changes.append(f"{sensitivity.CODES} is missing or damaged")
    return ", ".join(changes) or "the settings are others than those that it was made with"


def _changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Return what differs between two parts of a recipe, as lines like "calibration.samples 48 → 40"."""
    if before == after:
        return []
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return [f"{name}: {len(before)} → {len(after)} entries"]
        names = [f"{name}[{index}]" for index in range(len(after))] if len(after) > 1 else [name]
        pairs = list(zip(names, before, after, strict=True))
    elif isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys((*before, *after))
        pairs = [(f"{name}.{key}" if name else key, before.get(key), after.get(key)) for key in keys]
    else:
        return [f"{name} {before} → {after}"]
    return [line for part, old, new in pairs for line in _changes(old, new, part)]


def _codes_are_intact(work: Workspace, measurement: Measurement, directory: Path) -> bool:
    """Return whether the compensated codes of a measurement, where it has some, lie in `directory` as they were."""
    try:
        sensitivity.read_codes(measurement, directory, work.cache.sha256)
    except RecordError:
        return False
    return True


def take_over(work: Workspace, path: Path) -> Measurement:
    """Use the measurement at `path`, with `measurement.safetensors` beside it, instead of measuring.

    Raises:
        RecordError: it isn't one, or its amax file is missing or another's. StaleRecord: it is of another model.
        MeasurementError: it was imported without amax values, so that nothing can be exported from it.
    """
    known, source = Measurement.read(path), work.source()
    amax = path.parent / sensitivity.AMAX_FILE
    if known.amax_sha256 is None:
        raise MeasurementError(f"{path} has no amax values ({known.engine}): it is good for planning only; measure")
    if known.model.sha256 != source.sha256:
        raise StaleRecord(
            f"{path} was measured on other weights ({known.model.path}) than {source.path} has; measure, or name the "
            "model that it is of"
        )
    if not amax.is_file() or work.cache.sha256(amax) != known.amax_sha256:
        raise RecordError(f"{amax} is missing or not the one that {path} was written with; copy both files together")
    if not _codes_are_intact(work, known, path.parent):
        raise RecordError(
            f"{path.parent / sensitivity.CODES} does not hold the codes that {path} was written with; copy it too"
        )
    own = work.output / sensitivity.MEASUREMENT_FILE
    if path.resolve() != own.resolve():
        atomic_write(work.output / sensitivity.AMAX_FILE, read_bytes(amax))
        sensitivity.copy_codes(known, path.parent, work.output)
        generation.copy_rows(path.parent, work.output)
        known.write(own)
        work.note_measured_with({})  # another recipe's, which isn't known here
        work.finished("measure", known.run.phases if known.run else ())
    return known


def _scored_calibration_data(work: Workspace, measurement: Measurement) -> calibration.DataSet:
    """Return the calibration batches that were scored.

    Raises:
        StaleRecord: the data isn't what was measured on.
    """
    data = calibration_data(work)
    if data.summary.sha256 != measurement.calibration.sha256:
        raise StaleRecord("the calibration data is not what was measured on; measure again")
    return dataclasses.replace(data, batches=data.batches[: len(measurement.score_weights)])


@contextmanager
def kl_on(work: Workspace, measurement: Measurement, data: calibration.DataSet) -> Iterator[Callable[[Scheme], float]]:
    """Give the KL of any scheme of the measurement on `data`, in nats per token, simulated in memory.

    Each is kept as soon as it is known, so that a killed run doesn't simulate it again. The original runs on the data
    only where something has to be simulated.

    Raises:
        BitladderError: see `simulation`.
    """
    path = work.output / SIMULATED_FILE
    key = digest_of([measurement.fingerprint(), data.summary.sha256, str(len(data.batches)), evaluation.ARITHMETIC])
    known = work.known(SimulatedKls, path)
    kls = dict(known.kl) if known is not None and known.settings_sha256 == key else {}
    device = sensitivity.resolve_device(work.recipe.measurement.device)
    with ExitStack() as stack:
        prepared: list[tuple[evaluation.Reference, Simulation]] = []

        def kl(scheme: Scheme) -> float:
            name = digest_of(f"{group} {format_}" for group, format_ in sorted(scheme.formats.items()))
            if name not in kls:
                if not prepared:
                    reference = evaluation.Reference.compute(
                        work.model_directory, data, split="calibration", device=device
                    )
                    prepared.append((stack.enter_context(reference), simulation_of(work, measurement, device)))
                reference, simulation = prepared[0]
                kls[name] = simulation.results([reference], scheme)[0].value
                SimulatedKls(settings_sha256=key, kl=kls).write(path)
            return kls[name]

        yield kl


def simulation_of(work: Workspace, measurement: Measurement, device: str) -> Simulation:
    """Return the original, ready to take any scheme with the codes and scales of the measurement."""
    amax = sensitivity.read_amax(measurement, work.output)
    codes = sensitivity.read_codes(measurement, work.output, work.cache.sha256)
    return Simulation(work.model_directory, measurement, amax, device, codes)


def measure_kl_points(work: Workspace) -> KlPoints:
    """Simulate a few schemes on the scored calibration samples, to learn which KL a predicted score means, once.

    Raises:
        BitladderError: see `simulation`.
    """
    measurement = work.measurement()
    data, schemes = _scored_calibration_data(work, measurement), kl_point_schemes(measurement)
    key = digest_of([evaluation.ARITHMETIC, str(len(data.batches)), *(scheme.fingerprint() for scheme in schemes)])
    path = work.output / KL_POINTS_FILE
    known = work.known(KlPoints, path)
    if known is not None and known.settings_sha256 == key:
        return known
    meter, points = Meter(), []
    with meter.phase("measure KL of a few schemes"), kl_on(work, measurement, data) as kl:
        for index, scheme in enumerate(schemes):
            work.progress("measure KL of a few schemes", index, len(schemes))
            points.append(KlPoint(name=scheme.name, score=scheme.predicted_score, kl=kl(scheme)))
        work.progress("measure KL of a few schemes", len(schemes), len(schemes))
    result = KlPoints(
        measurement_sha256=measurement.fingerprint(),
        settings_sha256=key,
        data=data.summary,
        samples=sum(len(batch.labels) for batch in data.batches),
        points=tuple(points),
        run=meter.info(),
    )
    result.write(path)
    work.finished("measure KL of a few schemes", meter.phases)
    return result


def kl_point_schemes(measurement: Measurement) -> tuple[Scheme, ...]:
    """Return schemes that span the range of predicted scores: a ladder, and random choices, each once."""
    ladder = []
    for share in _KL_POINT_SHARES:
        with contextlib.suppress(InfeasibleTarget):  # less than the first group of a small model
            spec = SchemeSpec(name=f"top{100 * share:g}", coverage=share, format=measurement.formats[0])
            ladder.append(planning.plan(measurement, spec))
    middle = ladder[len(ladder) // 2]
    found = {
        tuple(scheme.formats.items()): scheme
        for scheme in (*ladder, *controls.arms(measurement, middle, kinds=("random", "inverse"), seeds=2))
    }
    return tuple(found.values())


def _kl_map(work: Workspace) -> KlMap | None:
    """Return the map from predicted scores to KL where a scheme is asked for by KL."""
    if all(spec.max_kl is None for spec in work.recipe.schemes):
        return None
    points = measure_kl_points(work).points
    fitted = KlMap.fit([point.score for point in points], [point.kl for point in points])
    if fitted is None:
        raise PlanError(
            f"max_kl: KL was measured on {len(points)} schemes, too few to say which KL a score means "
            f"(see {work.output / KL_POINTS_FILE}); ask for coverage or effective_bits"
        )
    return fitted


def plan(work: Workspace) -> tuple[Scheme, ...]:
    """Plan every scheme of the recipe (it takes well under a second) and write those that changed.

    Where one is asked for by KL, a few schemes are simulated first: `measure_kl_points`. Where the recipe wants schemes
    refined, that follows: `refine_schemes`.

    Raises:
        PlanError: infeasible, or two schemes are equal. MeasurementError: keys and values of some layer have no scale,
            and an FP8 KV cache is asked for.
    """
    kl_map, meter = _kl_map(work), Meter()
    with meter.phase("plan"):
        measurement = work.measurement()
        schemes = planning.plan_all(measurement, work.recipe.scheme_specs(), kl_map)
        if any(scheme.kv_cache_format for scheme in schemes) and measurement.amax_sha256 is not None:
            sensitivity.kv_amax(measurement, sensitivity.read_amax(measurement, work.output))  # all layers have scales
    if work.recipe.refine.evaluations:
        schemes = refine_schemes(work, schemes)
    changed = []
    for scheme in schemes:
        path = work.scheme_file(scheme.name)
        if work.known(Scheme, path) != scheme:
            changed.append((path, scheme))
    for path, scheme in changed:
        scheme.write(path)
    if changed:
        work.finished("plan", meter.phases)
    discard(work.output / SIMULATED_FILE)  # it has served
    return schemes


def refine_schemes(work: Workspace, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Swap groups at each scheme's edge while its KL on the scored calibration samples falls, unless that was done.

    Schemes that leave no choice, or name their groups, stay as they are.

    Raises:
        PlanError: see `refinement.refine`. DuplicateSchemes: two schemes come out equal.
    """
    measurement, spec, path = work.measurement(), work.recipe.refine, work.output / REFINEMENTS_FILE
    data = _scored_calibration_data(work, measurement)
    key = digest_of([evaluation.ARITHMETIC, str(len(data.batches)), spec.model_dump_json()])
    known = work.known(Refinements, path)
    done = {} if known is None or known.settings_sha256 != key else {r.planned_sha256: r for r in known.refinements}
    open_ = [scheme for scheme in schemes if BF16 in scheme.formats.values() and "include" not in scheme.asked]
    missing = [scheme for scheme in open_ if scheme.fingerprint() not in done]
    if missing:
        meter = Meter()
        with meter.phase("refine schemes"), kl_on(work, measurement, data) as kl:
            for index, scheme in enumerate(missing):
                work.progress("refine schemes", index, len(missing))
                asked = SchemeSpec.model_validate(scheme.asked)
                found = refine(
                    measurement.weigh_images(asked.image_weight),
                    scheme,
                    kl,
                    evaluations=spec.evaluations,
                    marginal=spec.marginal,
                    excluded=planning.matching_groups(measurement, scheme.name, asked.exclude),
                )
                done[scheme.fingerprint()] = Refinement(
                    scheme=scheme.name,
                    planned_sha256=scheme.fingerprint(),
                    kl_planned=found.before,
                    kl_refined=found.after,
                    evaluations=found.evaluations,
                    changes={group: found.scheme.formats[group] for group in found.swapped},
                )
            work.progress("refine schemes", len(missing), len(missing))
        Refinements(
            measurement_sha256=measurement.fingerprint(),
            settings_sha256=key,
            data=data.summary,
            samples=sum(len(batch.labels) for batch in data.batches),
            refinements=tuple(done[scheme.fingerprint()] for scheme in open_),
            run=meter.info(),
        ).write(path)
        work.finished("refine schemes", meter.phases)
    return planning.related([_refined(measurement, scheme, done.get(scheme.fingerprint())) for scheme in schemes])


def _refined(measurement: Measurement, scheme: Scheme, refinement: Refinement | None) -> Scheme:
    if refinement is None:
        return scheme
    weight = SchemeSpec.model_validate(scheme.asked).image_weight
    return with_formats(measurement.weigh_images(weight), scheme, refinement.changes)


def _is_intact(work: Workspace, scheme: Scheme, directory: Path) -> bool:
    """Return whether the checkpoint in `directory` is this scheme's, whole, and without a file of somebody else's.

    Files whose size and modification time are known are not read again.
    """
    manifest = work.known(CheckpointManifest, directory / CheckpointManifest.FILE_NAME)
    if manifest is None or manifest.scheme_sha256 != scheme.fingerprint():
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
        BitladderError: see `checkpoint.export`.
    """
    measurement, schemes = work.measurement(), work.schemes()
    amax = sensitivity.read_amax(measurement, work.output)
    codes = sensitivity.read_codes(measurement, work.output, work.cache.sha256)
    missing = [s for s in schemes if not _is_intact(work, s, work.checkpoint_directory(s.name))]
    for scheme in missing:
        work.check_place(work.checkpoint_directory(scheme.name))
    if missing:
        meter = Meter()
        with meter.phase(f"export {len(missing)} scheme{'s' if len(missing) > 1 else ''}"):
            directories = {scheme.name: work.checkpoint_directory(scheme.name) for scheme in missing}
            checkpoint.export_all(missing, measurement, amax, work.model_directory, directories, work.progress, codes)
        if work.recipe.export.share_files:
            checkpoint.share_equal_files([work.checkpoint_directory(scheme.name) for scheme in schemes])
        for scheme in schemes:
            _is_intact(work, scheme, work.checkpoint_directory(scheme.name))  # fills the cache of digests
        work.finished("export", meter.phases)
    manifests = work.manifests()
    work.place_manifests(schemes, manifests)
    return manifests


def verify(work: Workspace, *, trust_times: bool = False) -> Verification:
    """Verify all checkpoints against their schemes, the source and each other.

    Args:
        work: the recipe and its output directory.
        trust_times: files whose size and modification time haven't changed since this run's directory read them are not
            read again, and what was verified before stays verified. False: every byte is read, the source's too.

    Raises:
        VerificationFailed: something is wrong; `verification.json` has all findings.
    """
    if not trust_times:
        work.cache = DigestCache()
    measurement, schemes, manifests = work.measurement(), work.schemes(), work.manifests()
    path = work.output / "verification.json"
    wanted = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    result = None
    if trust_times and path.exists() and all(_is_intact(work, s, work.checkpoint_directory(s.name)) for s in schemes):
        known = work.known(Verification, path)
        if known is not None and {c.scheme: c.manifest_sha256 for c in known.checkpoints} == wanted and known.ok:
            result = known
    if result is None:
        meter = Meter()
        with meter.phase("verify"):
            directories = {scheme.name: work.checkpoint_directory(scheme.name) for scheme in schemes}
            amax = sensitivity.read_amax(measurement, work.output)
            result = verification.verify(schemes, measurement, amax, work.model_directory, directories, work.progress)
        result = result.model_copy(update={"times_trusted": trust_times})
        result.write(path)
        work.finished("verify", meter.phases)
    findings = [(c.scheme, f) for c in result.checkpoints for f in c.findings]
    findings += [(f"{p.first} and {p.second}", f) for p in result.pairs for f in p.findings]
    if findings:
        where, first = findings[0]
        tensor = f", {first.tensor}" if first.tensor else ""
        raise VerificationFailed(
            f"verification found {len(findings)} problem(s); the first: {where}: {first.file}{tensor}: "
            f"{first.problem}; {first.remedy} (all in {path})"
        )
    return result


class Originals:
    """The original on every held-out set, run once and only when it is needed. A context manager.

    Evaluating the checkpoints and the control arms needs the same outputs, gigabytes of them.
    """

    def __init__(self, work: Workspace) -> None:
        self.work = work
        processor = calibration.load_processor(work.model_directory)
        calibrated = work.measurement().calibration
        self._stack = ExitStack()
        self._references: list[evaluation.Reference] = []
        self._tasks: list[evaluation.Task | None] = []
        self.data: dict[str, calibration.DataSet] = {}
        for spec in work.recipe.held_out:
            data = _load_set(work, spec, spec.data or work.recipe.calibration[0].data, processor, calibrated)
            self.data[spec.name] = data
            exact = spec.task == "exact_match"
            self._tasks.append(evaluation.Task.exact_match(data.samples, processor) if exact else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def settings(self) -> list[str]:
        """Return what an evaluation depends on beside the checkpoint."""
        parts = [
            part
            for spec in self.work.recipe.held_out
            for part in (spec.name, self.data[spec.name].summary.sha256, str(spec.task))
        ]
        return [self.work.measurement().model.sha256, evaluation.ARITHMETIC, *parts]

    def references(self, meter: Meter) -> list[evaluation.Reference]:
        """Return the original's outputs on every set.

        Raises:
            ModelError: it can't be loaded, or gives NaN or Inf.
        """
        if not self._references:
            device = sensitivity.resolve_device(self.work.recipe.measurement.device)
            with meter.phase("evaluate original"):
                for (split, data), task in zip(self.data.items(), self._tasks, strict=True):
                    reference = evaluation.Reference.compute(
                        self.work.model_directory,
                        data,
                        task=task,
                        split=split,
                        device=device,
                        progress=self.work.progress,
                    )
                    self._references.append(self._stack.enter_context(reference))
        return self._references


def evaluate(work: Workspace, originals: Originals | None = None) -> dict[str, Evaluation]:
    """Evaluate every checkpoint on every held-out set, unless it was.

    Args:
        work: the recipe and its output directory.
        originals: the original on those sets, where another step needs it as well.

    Raises:
        BitladderError: see `calibration.load_data` and `evaluation`.
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
                result = evaluation.evaluate_checkpoint(
                    references, work.checkpoint_directory(name), progress=work.progress
                )
            results[name] = result.model_copy(update={"settings_sha256": key})
            results[name].write(work.evaluation_file(name))
        work.finished("evaluate", meter.phases)
    return {name: results[name] for name in manifests}


def evaluate_controls(work: Workspace, originals: Originals | None = None) -> Evidence | None:
    """Evaluate the control arms of every scheme in memory, as far as time allows, unless that was done.

    Returns None where there are none: none are asked for, or no scheme leaves a choice.

    Args:
        work: the recipe and its output directory.
        originals: the original on the held-out sets, where another step needs it as well.

    Raises:
        BitladderError: see `controls.arms` and `simulation`.
    """
    spec, measurement, schemes = work.recipe.controls, work.measurement(), work.schemes()
    path = work.output / EVIDENCE_FILE
    arms = control_arms(measurement, schemes, spec)
    if not arms:
        path.unlink(missing_ok=True)
        return None
    if originals is None:
        with Originals(work) as originals:
            return evaluate_controls(work, originals)
    key = digest_of([*originals.settings(), spec.model_dump_json(), *(arm.fingerprint() for arm in arms)])
    evidence = work.known(Evidence, path)
    if evidence is None or evidence.settings_sha256 != key:
        evidence = Evidence(
            measurement_sha256=measurement.fingerprint(),
            settings_sha256=key,
            data={split: data.summary for split, data in originals.data.items()},
            arithmetic=evaluation.ARITHMETIC,
            arms=(),
        )
    found = list(evidence.arms)
    if len(found) + len(evidence.left_out) == len(arms):
        return evidence
    meter, start = Meter(), time.monotonic()
    references = originals.references(meter)
    with meter.phase("control arms"):
        simulation = simulation_of(work, measurement, references[0].device)
        for index, arm in enumerate(arms[len(found) :], start=len(found)):
            work.progress("control arms", index, len(arms))
            if time.monotonic() - start > spec.max_seconds:
                break
            found.append(ControlArm(scheme=arm, results=simulation.results(references, arm)))
            evidence.model_copy(update={"arms": tuple(found)}).write(path)  # a killed run goes on after it
        work.progress("control arms", len(arms), len(arms))
    left_out = tuple(arm.name for arm in arms[len(found) :])
    evidence = evidence.model_copy(update={"arms": tuple(found), "left_out": left_out, "run": meter.info()})
    evidence.write(path)
    work.finished("controls", meter.phases)
    return evidence


def control_arms(measurement: Measurement, schemes: Sequence[Scheme], spec: ControlSpec) -> tuple[Scheme, ...]:
    """Return the control arms of all schemes, the first of each before any second: short of time, all have some."""
    rows = [controls.arms(measurement, scheme, kinds=spec.kinds, seeds=spec.seeds) for scheme in schemes]
    return tuple(arm for column in itertools.zip_longest(*rows) for arm in column if arm is not None)


def _probe_path(work: Workspace, result: ProbeResult) -> Path:
    version = re.sub(r"[^A-Za-z0-9.+]+", "_", result.version)
    return work.output / PROBES / f"{result.scheme}--{result.runtime}-{version}-{result.stage}.json"


def probes(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> tuple[ProbeResult, ...]:
    """Return what is known of how the runtimes treat these checkpoints; results of earlier ones are removed."""
    digests = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    found = []
    for path in sorted((work.output / PROBES).glob("*.json")):
        result = work.known(ProbeResult, path)
        if result is None or result.scheme is None or _probe_path(work, result) != path:
            continue  # not what its name says: written again where it belongs, else none of ours
        if digests.get(result.scheme) == result.manifest_sha256:
            found.append(result)
        else:
            path.unlink()
    return tuple(found)


def preflight(work: Workspace) -> tuple[ProbeResult, ...]:
    """Say by each runtime's rules, from the files alone, what it would do with each checkpoint.

    Raises:
        RecordError: a scheme isn't exported yet.
    """
    manifests, meter = work.manifests(), Meter()
    results: list[ProbeResult] = []
    with meter.phase("preflight"):
        for name in manifests:
            results += rules.preflight(work.checkpoint_directory(name))
    known = {result.fingerprint() for result in probes(work, manifests)}
    changed = [result for result in results if result.fingerprint() not in known]
    for result in changed:
        result.write(_probe_path(work, result))
    if changed:
        work.finished("preflight", meter.phases)
    return tuple(results)


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
            known[name].write(_probe_path(work, known[name]))
        work.progress("probe: load", len(missing), len(missing))
    elif missing:
        work.progress("probe: generate", 0, 0)
        with meter.phase("probe: generate"):
            directories = [work.checkpoint_directory(name) for name in missing]
            served = _serve(work, directories, python, spec.timeout)
        for name, result in zip(missing, served, strict=True):
            known[name] = result
            result.write(_probe_path(work, result))
    if missing:
        work.finished("probe", meter.phases)
    return tuple(known[name] for name in manifests)


def _serve(work: Workspace, directories: Sequence[Path], python: Path, timeout: float) -> tuple[ProbeResult, ...]:
    """Serve checkpoints, and the original before them, on the first samples of every held-out set."""
    device = sensitivity.resolve_device(work.recipe.measurement.device)
    with Originals(work) as originals:
        return probing.serve_on(
            originals.data, directories, work.model_directory, python, device=device, timeout=timeout
        )


def make_report(work: Workspace) -> report.Report:
    """Write `report.html`, `report.md`, `report.json` and each checkpoint's model card from the records that are there.

    Raises:
        RecordError: there is no measurement or no plan yet.
    """
    measurement, schemes = work.measurement(), work.schemes()
    manifests: dict[str, CheckpointManifest] = {}
    evaluations: dict[str, Evaluation] = {}
    for scheme in schemes:
        manifest_path = work.checkpoint_directory(scheme.name) / CheckpointManifest.FILE_NAME
        if manifest_path.exists():
            manifest = CheckpointManifest.read(manifest_path)
            if manifest.scheme_sha256 != scheme.fingerprint():
                continue  # of an earlier plan: not exported yet
            manifests[scheme.name] = manifest
            evaluation_path = work.evaluation_file(scheme.name)
            if evaluation_path.exists():
                known = Evaluation.read(evaluation_path)
                if known.manifest_sha256 == manifest.fingerprint():
                    evaluations[scheme.name] = known
    path = work.output / "verification.json"
    verified = Verification.read(path) if path.exists() else None
    wanted = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    if verified and {c.scheme: c.manifest_sha256 for c in verified.checkpoints} != wanted:
        verified = None  # of earlier checkpoints
    refined = Refinements.read_if_whole(work.output / REFINEMENTS_FILE) if work.recipe.refine.evaluations else None
    result = report.build_report(
        recipe=work.state.recipe,
        measurement=measurement,
        schemes=schemes,
        manifests=manifests,
        verification=verified,
        evaluations=evaluations,
        phases=[phase for step in work.state.phases.values() for phase in step],
        standard_errors=standard_errors(measurement, schemes),
        text_only_changes=text_only_changes(measurement, schemes),
        probes=probes(work, manifests),
        evidence=_evidence(work, measurement, schemes),
        refinements=refined,
    )
    report.write_report(result, work.output)
    work.place_report()
    for name in manifests:
        card = work.checkpoint_directory(name) / CheckpointManifest.CARD_NAME
        atomic_write(card, report.render_card(result, name))
    return result


def _evidence(work: Workspace, measurement: Measurement, schemes: Sequence[Scheme]) -> Evidence | None:
    """Return the control arms of these very schemes, where they were evaluated."""
    path = work.output / EVIDENCE_FILE
    if not path.exists():
        return None
    known = Evidence.read(path)
    wanted = {arm.fingerprint() for arm in control_arms(measurement, schemes, work.recipe.controls)}
    return known if {arm.scheme.fingerprint() for arm in known.arms} <= wanted else None


def standard_errors(measurement: Measurement, schemes: Sequence[Scheme]) -> Mapping[str, float | None]:
    """Return the standard error of each scheme's predicted score over the scoring batches."""
    return {
        scheme.name: planning.standard_error(
            measurement.weigh_images(SchemeSpec.model_validate(scheme.asked).image_weight), scheme.formats
        )
        for scheme in schemes
    }


def text_only_changes(measurement: Measurement, schemes: Sequence[Scheme]) -> Mapping[str, int | None]:
    """Return in how many groups each scheme would have another format if only text positions counted.

    None: what was asked can't be met then. A scheme asked for by its KL is compared at its bits. Empty where the scores
    of image positions are not known apart.
    """
    if not all(candidate.image_scores for candidate in measurement.candidates):
        return {}
    changes: dict[str, int | None] = {}
    for scheme in schemes:
        changed: dict[str, float | None] = {"image_weight": 0.0}
        if scheme.asked.get("max_kl") is not None:  # which score has that KL is known of both parts together alone
            changed |= {"max_kl": None, "effective_bits": scheme.effective_bits}
        spec = SchemeSpec.model_validate(scheme.asked).model_copy(update=changed)
        try:
            formats = planning.plan(measurement, spec).formats
        except InfeasibleTarget:  # a bound on the predicted score below what text alone gives
            changes[scheme.name] = None
        else:
            changes[scheme.name] = sum(scheme.formats.get(group) != name for group, name in formats.items())
    return changes


def run(work: Workspace, measurement: Path | None = None) -> report.Report:
    """Do every step that isn't done; `work.done` names those that were needed.

    Args:
        work: the recipe and its output directory.
        measurement: a measurement to use instead of measuring; see `take_over`.

    Raises:
        BitladderError: the first step that fails; what is finished stays.
    """
    planning.refuse_unattainable(work.recipe.schemes, work.recipe.measurement.formats)
    for spec in work.recipe.schemes:
        work.check_place(work.checkpoint_directory(spec.name))
    with work.locked():
        if measurement is None:
            look(work, held_out=True)
            measure(work)
        else:
            take_over(work, measurement)
        plan(work)
        export(work)
        verify(work, trust_times=True)
        preflight(work)
        if work.recipe.runtimes.vllm is not None:
            probe(work)
        with Originals(work) as originals:
            evaluate(work, originals)
            evaluate_controls(work, originals)
        result = make_report(work)
        orphans = work.orphans()
        if orphans:
            names = ", ".join(os.path.relpath(path, work.output) for path in orphans)
            work.tell(f"of schemes that the recipe doesn't have any more, to be removed by you: {names}")
        return result
