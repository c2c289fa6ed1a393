"""Records of quality: evaluations and control arms."""

import math
from typing import Self

from pydantic import Field, model_validator

from bitladder.records.base import Grown, Part, Record, RunInfo
from bitladder.records.measurement import DataSummary
from bitladder.records.scheme import Scheme

KL = "kl"  # the main metric: of the original's next-token distribution to the checkpoint's
TASK_ACCURACY = "task_accuracy"
_Z = 1.959964  # of the normal distribution, for an interval of 95%


class Paired(Part):
    """The same questions answered by a checkpoint and by the original; a digit a question, 1 where it is right."""

    right: str = Field(pattern="^[01]+$", description="the checkpoint's answers")
    reference: str = Field(pattern="^[01]+$", description="the original's")

    @model_validator(mode="after")
    def _of_the_same(self) -> Self:
        if len(self.right) != len(self.reference):
            raise ValueError("two numbers of questions")
        return self

    @property
    def accuracy(self) -> float:
        """The share of the questions that the checkpoint answers rightly."""
        return self.right.count("1") / len(self.right)

    @property
    def standard_error(self) -> float:
        """The standard error of the checkpoint's accuracy, over draws of questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))

    @property
    def original(self) -> float:
        """The share of the questions that the original answers rightly."""
        return self.reference.count("1") / len(self.reference)

    @property
    def lost(self) -> int:
        """The questions that the original alone answers rightly."""
        return sum(ours < theirs for ours, theirs in zip(self.right, self.reference, strict=True))

    @property
    def gained(self) -> int:
        """The questions that the checkpoint alone answers rightly."""
        return sum(ours > theirs for ours, theirs in zip(self.right, self.reference, strict=True))

    @property
    def difference(self) -> float:
        """The checkpoint's accuracy less the original's."""
        return (self.gained - self.lost) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference, over draws of questions: Wald's with half a question in every cell.

        Source: A. Agresti, Y. Min, Simple improved confidence intervals for comparing matched proportions, Statistics
        in Medicine 24 (2005), 729-740.
        """
        count, lost, gained = len(self.right) + 2, self.lost + 0.5, self.gained + 0.5
        middle = (gained - lost) / count
        half = _Z * math.sqrt(lost + gained - (gained - lost) ** 2 / count) / count
        return max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def p_value(self) -> float:
        """The probability of a split at least as uneven of what one alone answers rightly: McNemar's exact test."""
        changed = self.lost + self.gained
        tail = sum(math.comb(changed, count) for count in range(min(self.lost, self.gained) + 1))
        return float(min(1.0, 2 * tail / 2**changed))


class EvalResult(Grown):
    """One number about one checkpoint, or about the original where `checkpoint_sha256` is None."""

    later = frozenset({"paired"})

    metric: str = Field(description="kl, perplexity, top1_agreement, task_accuracy")
    split: str = Field(description="name of the held-out set, or of the task")
    unit: str
    value: float
    standard_error: float | None
    samples: int
    noise_floor: float | None = Field(description="the same metric for the original in BF16 instead of float32")
    reference: float | None = Field(default=None, description="the same metric for the original, where it has one")
    paired: Paired | None = Field(default=None, description="task_accuracy only: question by question")


class TaskSummary(Part):
    """A task of lm-evaluation-harness: enough to see that it is the same."""

    source: str
    sha256: str = Field(description="SHA-256 of the questions that are asked")
    samples: int
    harness: str = Field(description="which version asks")


class Evaluation(Grown, Record):
    """One checkpoint on every held-out set, against the original."""

    later = frozenset({"tasks"})
    written_by = "evaluate"
    volatile = frozenset({"run"})

    scheme: str
    manifest_sha256: str = Field(description="fingerprint of the checkpoint's manifest")
    model_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    tasks: dict[str, TaskSummary] = Field(default={}, description="name of the task -> its questions")
    arithmetic: str
    settings_sha256: str = ""
    results: tuple[EvalResult, ...]
    run: RunInfo | None = None

    @model_validator(mode="after")
    def _of_known_sets(self) -> Self:
        seen = [(result.split, result.metric) for result in self.results]
        unknown = sorted({split for split, _ in seen} - {*self.data, *self.tasks})
        if unknown:
            raise ValueError(f"result on unknown held-out set {unknown[0]}")
        twice = sorted(self.data.keys() & self.tasks.keys())
        if twice:
            raise ValueError(f"a task and a held-out set are named {twice[0]}")
        if len(set(seen)) != len(seen):
            raise ValueError("two results have the same metric and held-out set")
        return self

    def result(self, metric: str, split: str | None = None) -> EvalResult | None:
        """Return the metric's result on the held-out set `split` (None: the first set), or None."""
        wanted = (metric, next(iter(self.data)) if split is None else split)
        return next((result for result in self.results if (result.metric, result.split) == wanted), None)


class ControlArm(Part):
    """Another choice of groups at a scheme's bits, and what it does."""

    scheme: Scheme = Field(description="`asked` says which control it is, and beside which scheme it stands")
    results: tuple[EvalResult, ...]


class Evidence(Record):
    """What the search is worth: control arms beside the schemes, evaluated in memory on the same held-out sets."""

    written_by = "controls"
    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    arithmetic: str
    arms: tuple[ControlArm, ...]
    left_out: tuple[str, ...] = Field(default=(), description="arms for which there was no time")
    run: RunInfo | None = None
