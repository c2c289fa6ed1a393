"""One recipe and its output directory: all names of files in it, its lock, what it knows.

What needs torch is imported where it is used: `plan` and `report` work without it.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bitladder.errors import ModelError, OutputError, PlanError, RecipeError, RecordError, StaleRecord, reason_of
from bitladder.formats import in_order
from bitladder.measured import MEASUREMENT_FILE
from bitladder.models.weights import DigestCache, commit_of, model_source
from bitladder.reading import read_bytes
from bitladder.recipe import SCHEME_PLACE, Recipe, resolve_model
from bitladder.records import (
    CheckpointManifest,
    Measurement,
    ModelSource,
    PhaseCost,
    QuantGroup,
    Record,
    RunState,
    Scheme,
    digest_of,
)
from bitladder.runinfo import Progress, no_progress
from bitladder.storage import (
    TEMPORARY_PREFIX,
    atomic_write,
    check_file,
    check_writable,
    explain_os_errors,
    is_vacant,
    remove_leftovers,
    temporaries_in,
)

if TYPE_CHECKING:
    from bitladder.data.batches import DataSet
    from bitladder.models.splitting import Split
    from bitladder.models.target import Target
    from bitladder.planning.speed import SpeedModel

SIMULATED_FILE = "simulated.json"
KL_POINTS_FILE = "kl_points.json"
REFINEMENTS_FILE = "refinements.json"
VERIFICATION_FILE = "verification.json"
EVIDENCE_FILE = "evidence.json"
PROBES = "probes"  # directory
LOCK_FILE = ".lock"
_LONGEST_HOLDER = 32  # bytes of a lock's file that are read
_KEY_CHARACTERS = 12  # of the digest that tells one output's temporaries from another's
RecordT = TypeVar("RecordT", bound=Record)


def _holder_in(lock: int) -> str | None:
    """Return the process id that a lock's file names; "": it is empty; None: it holds something else."""
    text = os.pread(lock, _LONGEST_HOLDER, 0).decode("ascii", "replace").strip()
    return text if text.isdigit() or not text else None


def _hold(lock: int, holder: str) -> None:
    """Write whose a lock is into its file, for those who find it taken; "": nobody's any more."""
    if _holder_in(lock) is not None:
        os.ftruncate(lock, 0)
        os.pwrite(lock, holder.encode(), 0)


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


def local_model(model: str, revision: str | None) -> Path:
    """Return the directory of a model that a command names: a path as it is written, or a Hub id."""
    return fetch_model(resolve_model(model, Path.cwd()), revision)


@dataclass
class Workspace:
    """One recipe and its output directory."""

    recipe: Recipe
    output: Path
    progress: Progress = no_progress
    tell: Callable[[str], None] = lambda line: None  # takes a line for the user
    detail: Callable[[str], None] = lambda line: None  # takes a line on what was done, for who wants to know it
    state: RunState = field(init=False)
    cache: DigestCache = field(init=False)
    done: list[str] = field(default_factory=list)  # the steps that this process had to do
    loaded: "dict[str, DataSet]" = field(default_factory=dict)  # sets that this process has read
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
            if foreign and Measurement.read_if_whole(self.output / MEASUREMENT_FILE) is None:
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
        self.detail(f"{step}: done in {sum(phase.seconds for phase in phases):.1f} s")
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
            # Not through a link, and nothing of somebody else's is truncated (`_hold`).
            lock = os.open(self.output / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = _holder_in(lock)
                which = f" (process {holder}), or end it: kill {holder}" if holder else ""
                raise OutputError(
                    f"another bitladder process is working in {self.output}; wait for it{which}"
                ) from None
            _hold(lock, str(os.getpid()))
            try:
                remove_leftovers(self.output)
                key = digest_of([str(self.output)])[:_KEY_CHARACTERS]
                with temporaries_in(self._places(), key):
                    self._open()  # another process may have worked there since this one looked
                    self.save()
                    self.detail(f"working in {self.output}, as process {os.getpid()}")
                    yield
            finally:
                _hold(lock, "")
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
    def target(self) -> "Target":
        """What of the model is searched."""
        from bitladder.models.target import find_target

        return find_target(self.model_directory, in_order(self.recipe.measurement.formats))

    @cached_property
    def split(self) -> "Split":
        """How the model is shared among the GPUs that serve it.

        Raises:
            RecipeError: its heads can't be.
        """
        from bitladder.models.splitting import WHOLE, Split
        from bitladder.models.weights import read_config

        if self.recipe.tensor_parallel == 1:
            return WHOLE
        found = Split.of(read_config(self.model_directory), self.recipe.tensor_parallel)
        if found.why_not is not None:
            raise RecipeError(f"tensor_parallel: {found.why_not}; name another number")
        return found

    @cached_property
    def processor(self) -> Any:
        """The model's processor, or its tokenizer."""
        from bitladder.data.processors import load_processor

        return load_processor(self.model_directory)

    @cached_property
    def model_config(self) -> Any:
        """The model's configuration, as transformers reads it."""
        from bitladder.models.loading import load_config

        return load_config(self.model_directory)

    @cached_property
    def most_positions(self) -> int | None:
        """How many tokens a sequence of the model may have; None: there is no limit."""
        from bitladder.models.loading import most_positions

        return most_positions(self.model_config)

    def source(self) -> ModelSource:
        """Return the identity of the model as it is now."""
        spec = self.recipe.model
        revision = commit_of(self.model_directory) or spec.revision
        return model_source(
            self.model_directory, path=spec.path, revision=revision, cache=self.cache, progress=self.progress
        )

    def checkpoint_directory(self, scheme: str) -> Path:
        """Return where a scheme's checkpoint lies."""
        return self._placed(self.recipe.layout.checkpoints.replace(SCHEME_PLACE, scheme))

    def _placed(self, path: str) -> Path:
        """Return a path of the recipe's layout as absolute."""
        return Path(os.path.normpath(self.output / path))

    def check_place(self, directory: Path) -> None:
        """Refuse to replace a checkpoint outside the output directory that isn't one of ours, or what can't be written.

        Raises:
            OutputError: there is something else in `directory`, or nothing can be put there, or no report beside it.
        """
        report = self.recipe.layout.report
        if report is not None:
            if self._placed(report).is_relative_to(directory):
                raise OutputError(f"layout.report {report!r} lies in the checkpoint {directory}; name another place")
            check_file(self._placed(report))
        if self.recipe.layout.manifests:
            check_file(self._manifest_beside(directory))
        if directory.is_relative_to(self.output) or (directory / CheckpointManifest.FILE_NAME).exists():
            return
        if not is_vacant(directory):
            raise OutputError(f"{directory} holds something that Bitladder didn't write; move it away")
        check_writable(directory)

    @staticmethod
    def _manifest_beside(directory: Path) -> Path:
        return directory.with_name(f"{directory.name}.manifest.json")

    def place_manifests(self, schemes: Sequence[Scheme], manifests: Mapping[str, CheckpointManifest]) -> None:
        """Write what the recipe's layout wants beside the checkpoints: scheme and manifest of each in one file."""
        if not self.recipe.layout.manifests:
            return
        for scheme in schemes:
            directory = self.checkpoint_directory(scheme.name)
            parts = {"scheme": scheme, "checkpoint": manifests[scheme.name]}
            content = json.dumps({key: part.model_dump(mode="json") for key, part in parts.items()}, indent=1) + "\n"
            path = self._manifest_beside(directory)
            if not path.is_file() or read_bytes(path) != content.encode():
                atomic_write(path, content)

    def place_report(self) -> None:
        """Copy `report.md` to where the recipe's layout wants it."""
        if self.recipe.layout.report is not None:
            from bitladder import report

            atomic_write(self._placed(self.recipe.layout.report), read_bytes(self.output / report.MARKDOWN_FILE))

    def measurement(self) -> Measurement:
        """Return the measurement, checked to be of this model and of this recipe's formats.

        Raises:
            RecordError: there is none. StaleRecord: it is of another model, or of changed weights.
        """
        measurement = Measurement.read(self.output / MEASUREMENT_FILE)
        source = self.source()
        if measurement.model.sha256 != source.sha256:
            raise StaleRecord(
                f"{self.output / MEASUREMENT_FILE} was measured on other weights "
                f"({measurement.model.path}) than {source.path} has now; measure again"
            )
        return measurement

    def speed_model(self, groups: Sequence[QuantGroup]) -> "SpeedModel | None":
        """Return what predicts speeds of schemes of these groups; None: the recipe names no profile.

        Raises:
            RecordError: there is no such profile. PlanError: it is of another model, or of another number of ranks.
        """
        if self.recipe.profile is None:
            return None
        from bitladder.planning.shipped import profile_named
        from bitladder.planning.speed import Load, SpeedModel

        profile, ranks = profile_named(self.recipe.profile), self.recipe.tensor_parallel
        if profile.tensor_parallel != ranks:
            raise PlanError(
                f"the recipe's tensor_parallel is {ranks}, its profile is of {profile.tensor_parallel}: run `bitladder "
                f"profile --tensor-parallel {ranks}`, or set tensor_parallel: {profile.tensor_parallel}"
            )
        load = Load(**self.recipe.load.model_dump())
        return SpeedModel(profile, [self.split.group(group) for group in groups], load)

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
