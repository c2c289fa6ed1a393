"""What a report says of tasks: accuracy, question by question beside the original, as evaluated and as served."""

from collections.abc import Iterator
from typing import Any

from bitladder.records import Paired
from bitladder.report.numbers import NONE, exact, markdown_table, percent, runtime_name
from bitladder.report.types import Report, ReportedScheme

_EVALUATED = "evaluation"


def answers(report: Report) -> dict[str, Any]:
    """Return the table of answers to tasks, and where their questions come from; {} where there are none."""
    rows = [row for scheme in report.schemes for row in _rows(report, scheme)]
    if not rows:
        return {}
    header = ["scheme", "task", "asked in", "accuracy ± SE", "original", "difference (95% interval)", "questions"]
    sources = [
        f"{name}: `{task.source}`, {exact(task.samples)} questions, SHA-256 {task.sha256}; asked by {task.harness}"
        for name, task in report.tasks.items()
    ]
    return {"table": markdown_table([*header, "lost", "gained", "p", "as evaluated"], rows, left=3), "sources": sources}


def _rows(report: Report, scheme: ReportedScheme) -> Iterator[list[str]]:
    evaluated = {result.split: result.paired for result in scheme.results or () if result.paired is not None}
    for name, paired in evaluated.items():
        yield [scheme.name, name, _EVALUATED, *_cells(paired), NONE]
    for probe in report.probes:
        for task in probe.tasks if probe.scheme == scheme.name else ():
            own = evaluated.get(task.task)
            yield [scheme.name, task.task, runtime_name(probe), *_cells(task.answers), _as_evaluated(task.answers, own)]


def _cells(paired: Paired) -> list[str]:
    low, high = paired.interval
    return [
        f"{percent(paired.accuracy, 1)} ± {percent(paired.standard_error, 1)}",
        percent(paired.original, 1),
        f"{100 * paired.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        exact(len(paired.right)),
        exact(paired.lost),
        exact(paired.gained),
        f"{paired.p_value:.2g}",
    ]


def _as_evaluated(served: Paired, evaluated: Paired | None) -> str:
    """Return on how many questions a runtime is as right, or as wrong, as our evaluation of the same files."""
    if evaluated is None or len(evaluated.right) != len(served.right):
        return NONE
    same = sum(ours == theirs for ours, theirs in zip(evaluated.right, served.right, strict=True))
    return f"{exact(same)} of {exact(len(served.right))}"
