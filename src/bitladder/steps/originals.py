"""The original on every held-out set, run once and only where something needs it."""

from contextlib import ExitStack
from typing import Self

from bitladder.data.batches import DataSet
from bitladder.data.processors import tokenizer_of
from bitladder.device import resolve_device
from bitladder.evaluation.evaluate import ARITHMETIC
from bitladder.evaluation.harness import check_installed
from bitladder.evaluation.harness.tasks import TaskReference, Tasks
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.task import Task
from bitladder.runinfo import Meter
from bitladder.steps.data import held_out_set, validation_sets
from bitladder.steps.workspace import Workspace


def tasks_of(work: Workspace) -> Tasks | None:
    """Return the tasks of lm-evaluation-harness that the recipe asks for; None: none.

    Raises:
        RecipeError: the harness isn't installed.
    """
    spec = work.recipe.tasks
    if not spec.names:
        return None
    check_installed()
    return Tasks(spec.names, spec.samples, tokenizer_of(work.processor))


class Originals:
    """The original on every held-out set, run once and only when it is needed. A context manager.

    Evaluating the checkpoints and the control arms needs the same outputs, gigabytes of them.
    """

    def __init__(self, work: Workspace) -> None:
        self.work = work
        calibrated = work.measurement().calibration
        self._stack = ExitStack()
        self._references: list[Reference] = []
        self._tasks: list[Task | None] = []
        self.asked = tasks_of(work)
        self._answers: TaskReference | None = None
        self.data: dict[str, DataSet] = {}
        choosing = validation_sets(work, calibrated)
        for spec in work.recipe.held_out:
            data = held_out_set(work, spec, calibrated, choosing)
            self.data[spec.name] = data
            exact = spec.task == "exact_match"
            self._tasks.append(Task.exact_match(data.samples, work.processor) if exact else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def settings(self) -> list[str]:
        """Return what an evaluation on the sets depends on beside the checkpoint."""
        parts = [
            part
            for spec in self.work.recipe.held_out
            for part in (spec.name, self.data[spec.name].summary.sha256, str(spec.task))
        ]
        return [self.work.measurement().model.sha256, ARITHMETIC, *parts]

    def task_settings(self) -> list[str]:
        """Return what else the answers to tasks depend on."""
        return [] if self.asked is None else [one.model_dump_json() for one in self.asked.summaries().values()]

    def references(self, meter: Meter) -> list[Reference]:
        """Return the original's outputs on every set.

        Raises:
            ModelError: it can't be loaded, or gives NaN or Inf.
        """
        if not self._references:
            device = resolve_device(self.work.recipe.measurement.device)
            with meter.phase("evaluate original"):
                for (split, data), task in zip(self.data.items(), self._tasks, strict=True):
                    reference = Reference.compute(
                        self.work.model_directory,
                        data,
                        task=task,
                        split=split,
                        device=device,
                        progress=self.work.progress,
                    )
                    self._references.append(self._stack.enter_context(reference))
        return self._references

    def answers(self, meter: Meter) -> TaskReference | None:
        """Return the original's answers to the recipe's tasks; None: it has none.

        Raises:
            ModelError: it can't be loaded.
        """
        if self._answers is None and self.asked is not None:
            device = resolve_device(self.work.recipe.measurement.device)
            with meter.phase("tasks: original"):
                self._answers = TaskReference.compute(
                    self.work.model_directory, self.asked, device=device, progress=self.work.progress
                )
        return self._answers
