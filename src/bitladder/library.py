"""Bitladder as a library: `Run` does the steps of a recipe, `load` opens a checkpoint.

The command line is made of these: one rule of what is done and still valid, one lock on the output directory. Nothing
is printed, no bar is drawn and other libraries are kept quiet, unless it is asked for. Each step imports what it needs
when it is called; planning and reporting need no torch.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.errors import RecipeError
from bitladder.recipe import Recipe, parse_recipe, read_recipe, resolve_path, with_absolute_paths
from bitladder.runinfo import Progress, no_progress
from bitladder.steps.workspace import Workspace
from bitladder.storage import real_path

if TYPE_CHECKING:
    import torch

    from bitladder.measuring.folding import Fold
    from bitladder.records import (
        CheckpointManifest,
        Evaluation,
        Evidence,
        Measurement,
        ProbeResult,
        Scheme,
        Verification,
    )
    from bitladder.report import Report
    from bitladder.steps.card import Upload
    from bitladder.steps.preview import Ahead

Tell = Callable[[str], None]


def tell_nobody(line: str) -> None:
    """Take a line for the user, and keep it."""


class Run:
    """A recipe and its output directory: each step is a method that returns its records.

    What is done and still valid is not done again; what a step needs of an earlier one must be there (`run` does them
    all, in order). Other processes are kept out of the output directory while a step works.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Mapping[str, Any],
        *,
        output: str | os.PathLike[str] | None = None,
        progress: Progress = no_progress,
        tell: Tell = tell_nobody,
        detail: Tell = tell_nobody,
        quiet: bool = True,
    ) -> None:
        """Read a recipe; nothing is computed and nothing written.

        Args:
            recipe: a YAML file, its paths relative to it; or what such a file holds, paths relative to the current
                directory.
            output: write here instead of the recipe's `output`; relative to the current directory.
            progress: called with a phase, how much of it is done and of how much (0: not known).
            tell: called with a line on what happens beside it (why something is measured again, say).
            detail: called with a line on each step that was done, and how long it took.
            quiet: keep warnings, log lines and bars of other libraries back while a step works.

        Raises:
            RecipeError: the file is missing, or one line of it is wrong.
        """
        if isinstance(recipe, Mapping):
            self.recipe = with_absolute_paths(parse_recipe(_plain(recipe), "recipe"), Path.cwd())
        else:
            self.recipe = read_recipe(Path(recipe))
        self.output = Path(self.recipe.output if output is None else resolve_path(os.fspath(output), Path.cwd()))
        self.done: tuple[str, ...] = ()  # the steps that the last call had to do
        self.progress, self.tell, self.detail, self._quiet = progress, tell, detail, quiet

    def __repr__(self) -> str:
        return f"Run({self.recipe.model.path!r} -> {str(self.output)!r})"

    @contextmanager
    def _working(
        self,
        first: "Callable[[Workspace], None] | None" = None,
        *,
        lock: bool = True,
        loading: bool = True,
        recipe: Recipe | None = None,
    ) -> Iterator[Workspace]:
        """Yield a new workspace: files may have changed since the last call, so nothing of it is kept.

        Args:
            first: looks at what a user may have got wrong, before anything is imported that takes long.
            lock: keep other processes out; a step may do so by itself.
            loading: whether a model may be loaded.
            recipe: another one than the run's.
        """
        self.done = ()
        work = Workspace(recipe or self.recipe, self.output, self.progress, self.tell, self.detail)
        with ExitStack() as stack:
            stack.callback(lambda: setattr(self, "done", tuple(work.done)))
            if first is not None:
                first(work)
            if self._quiet:
                stack.enter_context(quiet_libraries(loading=loading))
            if lock:
                stack.enter_context(work.locked())
            yield work

    def checkpoint(self, scheme: str) -> Path:
        """Return the directory of a scheme's checkpoint.

        Raises:
            RecipeError: the recipe has no such scheme.
        """
        self._check_scheme(scheme)
        return Workspace(self.recipe, self.output).checkpoint_directory(scheme)

    def _check_scheme(self, scheme: str) -> None:
        names = [spec.name for spec in self.recipe.schemes]
        if scheme not in names:
            raise RecipeError(f"the recipe has no scheme {scheme!r}; it has {', '.join(names)}")

    def run(self, measurement: str | os.PathLike[str] | None = None) -> "Report":
        """Do every step that isn't done yet, and return the report.

        Args:
            measurement: a `measurement.json` (with its files beside it) to use instead of measuring.

        Raises:
            BitladderError: the first step that fails; what is finished stays.
        """
        from bitladder.steps.glance import glance

        look = partial(glance, measuring=measurement is None, held_out=True, schemes=True)
        with self._working(look, lock=False) as work:  # `run` locks, once it has looked again
            from bitladder.steps.run import run

            return run(work, None if measurement is None else Path(measurement))

    def preview(self) -> "tuple[Ahead, ...]":
        """Return the steps of `run`, whether each has something to do and why, and how long it took before."""
        from bitladder.steps.glance import glance

        with self._working(partial(glance, held_out=True, schemes=True), lock=False) as work:
            from bitladder.steps.preview import preview

            return preview(work)

    def measure(self) -> "Measurement":
        """Measure the sensitivity of every quant group, once."""
        from bitladder.steps.glance import glance

        with self._working(glance) as work:
            from bitladder.steps.measure import measure

            return measure(work)

    def fold(self, directory: str | os.PathLike[str]) -> "tuple[Fold, ...]":
        """Write the model to a new directory with its norms folded into the weights that read them.

        Returns:
            Each norm, the modules that read it, and the channels' factors.

        Raises:
            BitladderError: see `steps.fold.fold`.
        """
        from bitladder.steps.glance import check_elsewhere, glance

        place = real_path(directory)

        def look(work: Workspace) -> None:
            check_elsewhere(work, place)
            glance(work)

        with self._working(look) as work:
            from bitladder.steps.fold import fold

            return fold(work, place)

    def plan(self) -> "tuple[Scheme, ...]":
        """Plan every scheme of the recipe."""
        from bitladder.steps.plan import plan

        with self._working(loading=self.recipe.chooses_by_kl) as work:
            return plan(work)

    def export(self) -> "dict[str, CheckpointManifest]":
        """Write one checkpoint a scheme; return scheme -> manifest."""
        from bitladder.steps.glance import check_planned

        with self._working(check_planned) as work:
            from bitladder.steps.export import export

            return export(work)

    def export_to(self, directory: str | os.PathLike[str], scheme: str | None = None) -> "CheckpointManifest":
        """Write one scheme's checkpoint to a directory outside the run, verify it, and return its manifest.

        Args:
            directory: it isn't there yet, or is empty; relative to the current directory.
            scheme: which; None: the recipe has one only.

        Raises:
            OutputError: there is something in `directory`, or it can't be written.
            VerificationFailed: what was written isn't the scheme's.
        """
        from bitladder.steps.glance import check_elsewhere, check_planned

        names, place = [spec.name for spec in self.recipe.schemes], real_path(directory)
        if scheme is None and len(names) > 1:
            raise RecipeError(f"one checkpoint goes there, and the recipe has {', '.join(names)}; name the scheme")
        name = names[0] if scheme is None else scheme
        self._check_scheme(name)

        def look(work: Workspace) -> None:
            check_elsewhere(work, place)
            check_planned(work)

        with self._working(look) as work:
            from bitladder.steps.elsewhere import export_elsewhere

            return export_elsewhere(work, name, place)

    def verify(self) -> "Verification":
        """Read every byte of the checkpoints against their schemes, the source and each other.

        Raises:
            VerificationFailed: something is wrong; `verification.json` has all findings.
        """
        from bitladder.steps.glance import check_exported

        with self._working(check_exported) as work:
            from bitladder.steps.verify import verify

            return verify(work)

    def preflight(self) -> "tuple[ProbeResult, ...]":
        """Say by each runtime's rules what it would do with each checkpoint; `ok` says whether it takes it."""
        from bitladder.steps.glance import check_exported

        with self._working(check_exported) as work:
            from bitladder.steps.preflight import preflight

            return preflight(work)

    def probe(
        self,
        *,
        python: str | os.PathLike[str] | None = None,
        stage: str | None = None,
        timeout: float | None = None,
    ) -> "tuple[ProbeResult, ...]":
        """Have vLLM load (and serve) each checkpoint; a failure is a result, whose `ok` is False.

        Args:
            python: the interpreter of vLLM's environment; None: the recipe's.
            stage: `load` or `generate`; None: the recipe's, else `load`.
            timeout: seconds for one checkpoint; None: the recipe's, else 1800.

        Raises:
            RecipeError: neither the recipe nor `python` names an environment, or there is no such stage.
        """
        from bitladder.steps.glance import check_exported

        given = {"python": None if python is None else os.path.abspath(python), "stage": stage, "timeout": timeout}
        given = {key: value for key, value in given.items() if value is not None}
        recipe, known = self.recipe, self.recipe.runtimes.vllm
        if given and (known is not None or python is not None):
            vllm = {**(known.model_dump() if known else {}), **given}
            recipe = parse_recipe({**recipe.model_dump(), "runtimes": {"vllm": vllm}}, "probe")
        with self._working(check_exported, recipe=recipe) as work:
            from bitladder.steps.probe import probe

            return probe(work)

    def evaluate(self) -> "dict[str, Evaluation]":
        """Evaluate every checkpoint against the original on the held-out data; return scheme -> evaluation."""
        from bitladder.steps.glance import check_exported

        with self._working(check_exported) as work:
            from bitladder.steps.evaluate import evaluate

            return evaluate(work)

    def controls(self) -> "Evidence | None":
        """Evaluate other choices of groups at each scheme's bits; None where there are none."""
        from bitladder.steps.glance import check_planned

        with self._working(check_planned) as work:
            from bitladder.steps.controls import evaluate_controls

            return evaluate_controls(work)

    def cards(
        self, schemes: Sequence[str] = (), *, base_model: str | None = None, license: str | None = None
    ) -> "dict[str, Upload]":
        """Write model cards again from the records that are there; return scheme -> what an upload to a hub needs.

        Args:
            schemes: whose checkpoints; empty: all that the recipe has.
            base_model: id of the original on the Hub; None: the recipe's, or the one it came from.
            license: id of its licence; None: the recipe's, or what the original's card says.

        Raises:
            RecordError: a scheme has no checkpoint yet.
        """
        from bitladder.steps.card import write_again

        for scheme in schemes:
            self._check_scheme(scheme)
        given = {key: value for key, value in (("base_model", base_model), ("license", license)) if value is not None}
        card = {**self.recipe.card.model_dump(), **given}
        recipe = parse_recipe({**self.recipe.model_dump(), "card": card}, "card") if given else self.recipe
        with self._working(loading=False, recipe=recipe) as work:
            return write_again(work, schemes or [spec.name for spec in recipe.schemes])

    def report(self, *, figures: bool = False) -> "Report":
        """Write the report and the model cards from the records that are there.

        Args:
            figures: also write the plots as SVG and PNG to `figures/`, which needs `bitladder[figures]`.
        """
        from bitladder import report
        from bitladder.steps.report import make_report

        if figures:
            report.check_figures()
        with self._working(loading=False) as work:
            result = make_report(work)
            if figures:
                report.write_figures(result, work.output / "figures")
            return result


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype" = "float32",
    device: str = "cpu",
    serve_on: str | None = None,
) -> Any:
    """Return the transformers model that a checkpoint is: weights as its codes say, inputs rounded as it asks for.

    A model's own directory in 16 bits is loaded as it is.

    Args:
        directory: of the checkpoint.
        dtype: of the arithmetic: `float32`, `bfloat16`, or a torch dtype.
        device: a torch device, or `auto`: a GPU where there is one.
        serve_on: the kind of device whose arithmetic it has, as in a recipe; None: every format as it is stored.

    Raises:
        RecipeError: no such kind of device.
        ModelError: a file, tensor or scale is missing, or is not what it should be.
    """
    import torch

    from bitladder.device import resolve_device, resolve_dtype
    from bitladder.evaluation.reading import load_checkpoint
    from bitladder.formats import FORMATS
    from bitladder.formats.targets import TARGETS, served

    if serve_on is not None and serve_on not in TARGETS:
        raise RecipeError(f"serve_on {serve_on!r} is unknown; use {', '.join(TARGETS)}")
    place = resolve_device(device)
    if not isinstance(dtype, torch.dtype):
        if dtype not in ("auto", "float32", "bfloat16"):
            raise RecipeError(f"dtype {dtype!r} is unknown; use float32, bfloat16, auto, or a torch dtype")
        dtype = resolve_dtype(dtype, place)
    with quiet_libraries():
        return load_checkpoint(Path(directory), dtype, place, {} if serve_on is None else served(FORMATS, serve_on))


def _plain(value: Any) -> Any:
    """Return what a recipe's file would hold: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def quiet_libraries(*, loading: bool = True) -> Iterator[None]:
    """Keep warnings, log lines and bars of other libraries back while the body runs; then all is as it was.

    The settings are those of the process: threads beside this one are quiet too.

    Args:
        loading: whether the body may load a model: then transformers, which draws bars, is imported if it wasn't.
    """
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(level, logging.WARNING))
        try:
            with _quiet_transformers() if loading else nullcontext():
                yield
        finally:
            logging.disable(level)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
