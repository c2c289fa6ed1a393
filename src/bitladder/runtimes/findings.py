"""What pre-flight finds, collected: many of one kind become one line."""

from dataclasses import dataclass, field
from typing import Literal

from bitladder.records import ErrorClass, ProbeFinding

EXPORT_AGAIN = "export the scheme again"


@dataclass(frozen=True)
class _Problem:
    """What is wrong, the same wherever it is."""

    error_class: ErrorClass
    severity: Literal["error", "warning"]
    problem: str
    remedy: str


@dataclass
class Findings:
    """What was found, in the order of the checks; the same problem in many places is one finding."""

    found: dict[_Problem, list[str]] = field(default_factory=dict)

    def error(self, error_class: ErrorClass, where: str, problem: str, remedy: str) -> None:
        """Add something that goes wrong."""
        self.found.setdefault(_Problem(error_class, "error", problem, remedy), []).append(where)

    def warn(self, error_class: ErrorClass, where: str, problem: str, remedy: str) -> None:
        """Add something that is odd, and works."""
        self.found.setdefault(_Problem(error_class, "warning", problem, remedy), []).append(where)

    @property
    def failed(self) -> bool:
        """Whether there is an error."""
        return any(problem.severity == "error" for problem in self.found)

    def records(self) -> tuple[ProbeFinding, ...]:
        """Return the findings, each with the first place, and how many more there are."""
        return tuple(
            ProbeFinding(
                error_class=problem.error_class,
                severity=problem.severity,
                where=places[0],
                problem=problem.problem
                if len(places) == 1
                else f"{problem.problem}; the same in {len(places) - 1} more, the last {places[-1]}",
                remedy=problem.remedy,
            )
            for problem, places in self.found.items()
        )

    def copy(self) -> "Findings":
        """Return the same findings, to be added to."""
        return Findings({problem: [*places] for problem, places in self.found.items()})
