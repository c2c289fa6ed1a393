"""The tasks that a recipe asks for: what a checkpoint, its original, or a runtime answers to them."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from bitladder.errors import DataError
from bitladder.evaluation.harness.questions import fingerprint, lines_of
from bitladder.evaluation.task import accuracy, digits
from bitladder.models.loading import load_model
from bitladder.records import EvalResult, TaskSummary
from bitladder.runinfo import Progress

if TYPE_CHECKING:
    from bitladder.evaluation.harness.models import Row


@dataclass(frozen=True)
class Tasks:
    """What is asked, and how it is turned into tokens.

    Attributes:
        names: of the tasks, at least one.
        samples: questions of each, the first ones.
        tokenizer: the model's.
    """

    names: tuple[str, ...]
    samples: int
    tokenizer: Any

    def summaries(self) -> dict[str, TaskSummary]:
        """Return what tells each task from another."""
        harness = f"lm-eval {importlib.metadata.version('lm_eval')}"
        return {
            name: TaskSummary(
                source=f"package:evaluation/harness/{name}.jsonl",
                sha256=fingerprint(name, self.samples),
                samples=self.samples,
                harness=harness,
            )
            for name in self.names
        }

    def answers(self, model: Any, progress: Progress, phase: str) -> dict[str, str]:
        """Return task -> a digit a question: 1 where a loaded checkpoint's answer is right.

        Args:
            model: what `load_checkpoint` gives.
            progress: told of how many rows the model has read.
            phase: what that is called.
        """
        from bitladder.evaluation.harness.models import Loaded

        found = self._asked(Loaded(model, self.tokenizer, lambda read: progress(phase, read, 0)))
        progress(phase, 1, 1)
        return found

    def rows(self) -> "tuple[Row, ...]":
        """Return what a runtime is to score: the token ids of every question with each of its answers, each once."""
        from bitladder.evaluation.harness.models import Elsewhere

        asked: dict[Row, None] = {}

        def note(rows: "Sequence[Row]") -> list[list[float]]:
            asked.update(dict.fromkeys(rows))
            return [[0.0] * len(row) for row in rows]

        self._asked(Elsewhere(self.tokenizer, note))
        return tuple(asked)

    def answers_from(self, log_probs: "Mapping[Row, Sequence[float]]") -> dict[str, str]:
        """Return the same as `answers` from what a runtime gave the rows.

        Args:
            log_probs: row -> the log-probability in nats of each of its tokens but the first.
        """
        from bitladder.evaluation.harness.models import Elsewhere

        return self._asked(Elsewhere(self.tokenizer, lambda rows: [log_probs[row] for row in rows]))

    def check_length(self, positions: int | None) -> None:
        """Raise where a question with an answer is longer than the model reads; None: any length is fine.

        Raises:
            DataError: see above.
        """
        texts = [line for name in self.names for line in lines_of(name, self.samples)]
        if positions is None or positions >= max(len(text.encode()) for text in texts):
            return  # no token is shorter than a byte, so that nothing needs to be tokenised
        longest = max(map(len, self.rows()))
        if longest > positions:
            raise DataError(
                f"a question of tasks.names has {longest} tokens, more than the {positions} positions that the model "
                "knows (max_position_embeddings); leave tasks out"
            )

    def _asked(self, model: Any) -> dict[str, str]:
        from bitladder.evaluation.harness.models import ask

        return {name: digits(right) for name, right in ask(model, dict.fromkeys(self.names, self.samples)).items()}


@dataclass(frozen=True)
class TaskReference:
    """What the original answers, in float32 and (as the noise floor) in BF16 arithmetic: task -> a digit a question."""

    tasks: Tasks
    right: dict[str, str]
    bf16_right: dict[str, str]

    @classmethod
    def compute(cls, directory: Path, tasks: Tasks, *, device: str, progress: Progress) -> Self:
        """Ask the original.

        Args:
            directory: the original.
            tasks: what is asked.
            device: where it runs.
            progress: see `Tasks.answers`.

        Raises:
            ModelError: it can't be loaded.
        """
        right = tasks.answers(load_model(directory, torch.float32, device), progress, "tasks: original")
        bf16 = load_model(directory, torch.bfloat16, device)
        return cls(tasks, right, tasks.answers(bf16, progress, "tasks: original in BF16"))

    def results(self, model: Any, name: str, progress: Progress) -> list[EvalResult]:
        """Return a loaded checkpoint's accuracy on every task; `name` is what it is called in the progress."""
        answered = self.tasks.answers(model, progress, f"tasks: {name}")
        return [accuracy(task, right, self.right[task], self.bf16_right[task]) for task, right in answered.items()]
