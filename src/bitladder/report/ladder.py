"""The ladder's table: a row a scheme, one rule for every cell."""

from collections.abc import Sequence
from typing import Any

from bitladder.records import KL, TASK_ACCURACY, EvalResult
from bitladder.report.damage import beside_the_original, worst_task
from bitladder.report.numbers import (
    KL_EXPONENT,
    NONE,
    NOT_RUN,
    SHARES,
    Column,
    exponent_for,
    number_column,
    percent,
    share_with_error,
    with_unit,
)
from bitladder.report.types import Report, ReportedScheme


def verified(verified: bool | None) -> str:
    """Return the cell that says whether a checkpoint was verified."""
    return NOT_RUN if verified is None else "yes" if verified else "NO"


class Ladder:
    """The rows that the page's summary and the terminal's closing table share."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.evaluated = any(scheme.results is not None for scheme in report.schemes)
        self.split = report.splits[0] if report.splits else ""
        self.further = report.splits[1:]
        first = report.first_result(KL, self.split)
        self.kl_unit = with_unit(KL_EXPONENT, first.unit if first else "nats per token")
        self.kl_columns = {split: self._kl_column_of(split) for split in (self.split, *self.further)}
        self.kl_column = self.kl_columns[self.split]
        predicted = [scheme.predicted_score for scheme in report.schemes]
        exponent = exponent_for(predicted, report.score_unit)
        self.predicted_unit = with_unit(exponent, report.score_unit)
        self.predicted_column = number_column(predicted, [s.predicted_standard_error for s in report.schemes], exponent)
        asked = (*report.splits, *report.tasks)
        self.tasks = tuple(
            name for name in asked if report.first_result(TASK_ACCURACY, name)
        )  # sets with one, and tasks
        self.task_split = self.tasks[0] if len(self.tasks) == 1 else None
        self.has_task = bool(self.tasks)
        elsewhere = f" on {self.task_split}" if self.task_split != self.split else ""
        self.task_title = "worst task" if len(self.tasks) > 1 else f"task accuracy{elsewhere}"

    def _kl_column_of(self, split: str) -> Column:
        kls = [result for scheme in self.report.schemes if (result := scheme.result(KL, split))]
        return number_column([r.value for r in kls], [r.standard_error for r in kls], KL_EXPONENT)

    def _cells(self, kls: Sequence[str], perplexity: float | None, top1: float | None, task: str) -> list[str]:
        cells = [*kls, NONE if perplexity is None else f"{perplexity:,.2f}", percent(top1)]
        return [*cells, task] if self.has_task else cells

    def task(self, scheme: ReportedScheme) -> str:
        """Return the accuracy on the only task, or on the worst of several how it stands beside the original's."""
        worst = worst_task(scheme.results or ())
        if worst is None or self.task_split is not None:
            return share_with_error(worst)
        return f"{worst.split} {points(worst)}"

    def _not_run(self) -> list[str]:
        return [NOT_RUN] * (len(self.kl_columns) + 2 + self.has_task)

    def scheme(self, scheme: ReportedScheme) -> list[str]:
        """Return a scheme's KL on each held-out set, perplexity, top-1 agreement and, where there is one, accuracy."""
        if scheme.results is None:
            return self._not_run()
        kls = []
        for split, column in self.kl_columns.items():
            kl = scheme.result(KL, split)
            kls.append(column.show(kl.value, kl.standard_error) if kl else NONE)
        perplexity, top1 = (scheme.result(metric, self.split) for metric in ("perplexity", "top1_agreement"))
        return self._cells(
            kls,
            perplexity.value if perplexity else None,
            top1.value if top1 else None,
            self.task(scheme),
        )

    def original(self) -> list[str]:
        """Return the original's own values of these metrics."""
        if not self.evaluated:
            return self._not_run()
        perplexity, task = self._first("perplexity"), self._first(TASK_ACCURACY)
        return self._cells(
            ["0"] * len(self.kl_columns),
            perplexity.reference if perplexity else None,
            1.0,
            percent(task.reference, 1) if task else "0",
        )

    def noise_floor(self) -> list[str]:
        """Return what BF16 arithmetic alone does to the original."""
        if not self.evaluated:
            return self._not_run()
        kls = []
        for split, column in self.kl_columns.items():
            kl = self.report.first_result(KL, split)
            kls.append(column.show(kl.noise_floor if kl else None))
        perplexity, top1, task = (
            result.noise_floor if (result := self._first(metric)) else None
            for metric in ("perplexity", "top1_agreement", TASK_ACCURACY)
        )
        return self._cells(kls, perplexity, top1, percent(task, 1))

    def _first(self, metric: str) -> EvalResult | None:
        """Return a scheme's result of the metric, on the held-out set that the table shows it of."""
        split = self.task_split if metric == TASK_ACCURACY else self.split
        return self.report.first_result(metric, split) if split is not None else None


def points(result: EvalResult) -> str:
    """Return a task's accuracy less the original's, in percentage points."""
    return f"{100 * beside_the_original(result):+.1f}".replace("-", "−")


def of_all(split: str, ladder: Ladder) -> str:
    """Return how a column names its held-out set, where there are several."""
    return f" on {split}" if ladder.further else ""


def metric_format(result: EvalResult, ladder: Ladder) -> tuple[Any, str]:
    """Return how a metric's numbers are shown, and in which unit."""
    if result.metric == KL:
        return ladder.kl_columns[result.split].show, with_unit(KL_EXPONENT, result.unit)
    if result.metric in SHARES:
        return percent, "percent"
    column = Column(exponent=0, decimals=3)
    return column.show, result.unit
