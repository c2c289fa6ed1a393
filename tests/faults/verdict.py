"""How a trial ended, in one word; and what is the same in all kinds of trials."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faults.server import Job, Outcome, Server
from faults.tree import Tree, differences, result_tree, temporaries
from faults.world import World

REFUSED, RIGHT = "refused", "right"
WRONG, LATE, TRACEBACK, TOUCHED = "silently wrong", "late", "traceback", "touched outside"
UNCLEAR, LEFTOVER, LOST = "not one clear line", "leftover", "lost"
HELD = frozenset((REFUSED, RIGHT))


@dataclass(frozen=True)
class Result:
    """One trial: its kind, what was done, the verdict and what is to be seen."""

    kind: str
    name: str
    verdict: str
    detail: str = ""

    @property
    def held(self) -> bool:
        return self.verdict in HELD


class Failed(Exception):
    """A trial that doesn't hold: `Failed(verdict, detail)`."""


@dataclass
class Trial:
    """The runs of one trial; whatever they touch outside the output directory ends it."""

    server: Server
    world: World
    before: Tree = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.world.sentinels()

    def run(self, *argv: str | Path, **options: object) -> Outcome:
        """Return the outcome of `bitladder ARGV`.

        Raises:
            Failed: it touched something outside, or took too long.
        """
        return self.together(self.world.job(argv, **options))[0]  # type: ignore[arg-type]

    def together(self, *jobs: Job) -> list[Outcome]:
        """Return the outcomes of jobs beside each other; raises as `run` does."""
        outcomes = self.server.run(*jobs)
        touched = [*differences(self.before, self.world.sentinels()), *(p for o in outcomes for p in o.outside)]
        touched = [name for name in touched if not _of_a_killed(name, outcomes)]
        if touched:
            raise Failed(TOUCHED, " ".join(sorted(touched)[:5]))
        if any(outcome.late for outcome in outcomes):
            raise Failed(LATE, f"{outcomes[0].seconds:.1f} s; {last_line(outcomes[0])}")
        return outcomes

    def refused(self, outcome: Outcome) -> bool:
        """Return whether a run was refused as it should be; False: it ended with status 0.

        Raises:
            Failed: it ended otherwise, or left temporaries.
        """
        if "Traceback (most recent" in outcome.output:
            raise Failed(TRACEBACK, last_line(outcome))
        if outcome.status == 0:
            return False
        if not outcome.refused:
            raise Failed(f"exit {outcome.status}" if outcome.status != 2 else UNCLEAR, last_line(outcome))
        self.no_leftovers(unfinished=True)
        return True

    def no_leftovers(self, *, unfinished: bool = False) -> None:
        """Raise `Failed` where temporaries are left; `unfinished`: a measurement may be."""
        left = temporaries(self.world.out, self.world.around)
        if unfinished:
            left = [path for path in left if Path(path).name != "measuring"]
        if left:
            raise Failed(LEFTOVER, " ".join(left[:3]))

    def same_results(self, expected: Tree, ignored: Callable[[str], bool] = lambda _: False) -> None:
        """Raise `Failed` where the output directory isn't `expected`."""
        try:
            found = result_tree(self.world.out)
        except ValueError as error:
            raise Failed(WRONG, f"a record that is no JSON: {error}") from error
        other = [name for name in differences(expected, found) if not ignored(name)]
        if other:
            raise Failed(WRONG, f"{len(other)} files differ: {' '.join(other[:5])}")

    def succeeds(self, *argv: str | Path) -> None:
        """Raise `Failed` where a run that should succeed doesn't, or leaves temporaries."""
        outcome = self.run(*argv)
        if outcome.status:
            raise Failed(LOST, f"status {outcome.status}: {last_line(outcome)}")
        self.no_leftovers()


def _of_a_killed(name: str, outcomes: list[Outcome]) -> bool:
    """Whether a path is a temporary of a run that was killed; the run after it must have swept it."""
    return name.startswith("around/tmp") and any(outcome.status < 0 and outcome.struck for outcome in outcomes)


def last_line(outcome: Outcome) -> str:
    """Return the line that tells most of how a run ended."""
    lines = outcome.complaints or [line for line in outcome.output.splitlines() if line.strip()]
    return (lines[-1] if lines else "nothing was said")[:300]


@contextmanager
def judged(results: list[Result], kind: str, name: str) -> Iterator[list[str]]:
    """Add the result of a trial; its body appends to the list yielded what held, by default `RIGHT`."""
    held: list[str] = []
    try:
        yield held
    except Failed as failure:
        results.append(Result(kind, name, *failure.args))
    else:
        results.append(Result(kind, name, held[-1] if held else RIGHT))
