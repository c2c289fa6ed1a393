"""Kills and failing disks: at every file operation of a run, then the run once more.

A run after a kill, or after the fault is gone, ends with status 0, leaves no temporary, and its results are those of a
run that nothing disturbed. With a fault the run itself is refused in one line, or gets over it and is right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from faults.hook import ERRORS, KILL, MEMORY, Fault, Operation
from faults.server import Server
from faults.tree import Tree, result_tree
from faults.verdict import REFUSED, Result, Trial, judged
from faults.world import World, sound_run

KINDS = (*ERRORS, MEMORY)
SCENARIOS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "changed": {},  # the same, over the results of `EARLIER`
    "compensated": {"measurement": {"rounding": "compensated"}},
    "searched": {
        "schemes": [{"name": "half", "coverage": 0.5}, {"name": "near", "max_kl": 0.02}],
        "controls": {"kinds": ["random"], "seeds": 1},
        "refine": {"evaluations": 4, "marginal": 1},
    },
}
_EARLIER = {
    "schemes": [{"name": "half", "coverage": 0.9}, {"name": "full", "coverage": 1.0}, {"name": "old", "coverage": 0.3}],
    "measurement": {"rounding": "compensated"},
}


@dataclass
class Scenario:
    """A run to disturb."""

    server: Server
    world: World
    name: str

    def prepare(self) -> Path:
        """Put everything where it is before the run, and return the recipe."""
        self.world.clear()
        if self.name == "changed":
            if not (self.world.kept / "earlier").exists():
                earlier = self.world.recipe(**_EARLIER)
                earlier["calibration"]["samples"] = 6
                sound_run(self.server, self.world, self.world.write(earlier, "earlier.yaml"))
                self.world.keep("earlier")
                self.world.clear()
            self.world.restore("earlier")
        return self.world.write(self.world.recipe(**SCENARIOS[self.name]))

    @cached_property
    def undisturbed(self) -> tuple[Tree, tuple[Operation, ...]]:
        """The results of a run that nothing disturbs, and its operations."""
        recipe = self.prepare()
        outcome = self.server.run(self.world.job(["run", recipe], list_operations=True))[0]
        if outcome.status:
            raise RuntimeError(f"an undisturbed run fails: {outcome.output[-2000:]}")
        return result_tree(self.world.out), outcome.operations


def kill(scenario: Scenario, at: int) -> Result:
    """Return the result of a kill at one operation."""
    expected, operations = scenario.undisturbed
    results: list[Result] = []
    recipe = scenario.prepare()
    with judged(results, f"kill {scenario.name}", _name(operations, at)):
        trial = Trial(scenario.server, scenario.world)
        trial.run("run", recipe, fault=Fault(KILL, at))
        trial.succeeds("run", recipe)
        trial.same_results(expected)
    return results[0]


def fail(scenario: Scenario, at: int, kind: str, *, lasting: bool) -> Result:
    """Return the result of an error at one operation, or at all from there on."""
    expected, operations = scenario.undisturbed
    results: list[Result] = []
    recipe = scenario.prepare()
    name = f"{kind}{' from' if lasting else ''} at {_name(operations, at)}"
    with judged(results, f"fault {scenario.name}", name) as held:
        trial = Trial(scenario.server, scenario.world)
        outcome = trial.run("run", recipe, fault=Fault(kind, at, lasting))
        if (lasting and outcome.refused) or trial.refused(outcome):  # nothing could be removed
            held.append(REFUSED)
        else:
            trial.same_results(expected)
        trial.succeeds("run", recipe)
        trial.same_results(expected)
    return results[0]


def small_files(scenario: Scenario, limit: int) -> Result:
    """Return the result of a real EFBIG: no file may grow beyond `limit` bytes."""
    return _limited(scenario, f"files of at most {limit} bytes", file_bytes=limit)


def few_addresses(scenario: Scenario, more: int) -> Result:
    """Return the result of a limit of addresses, `more` bytes above what is mapped."""
    return _limited(scenario, f"{more >> 20} MiB of addresses", more_bytes=more)


def _limited(scenario: Scenario, name: str, **limit: int) -> Result:
    """Return the result of a run within a limit: refused, or the same bytes."""
    expected, _ = scenario.undisturbed
    results: list[Result] = []
    recipe = scenario.prepare()
    with judged(results, f"fault {scenario.name}", name) as held:
        trial = Trial(scenario.server, scenario.world)
        if trial.refused(trial.run("run", recipe, **limit)):
            held.append(REFUSED)
        else:
            trial.same_results(expected)
        trial.succeeds("run", recipe)
        trial.same_results(expected)
    return results[0]


def _name(operations: Sequence[Operation], at: int) -> str:
    if at >= len(operations):
        return f"operation {at}"
    path = operations[at].path.split("/out/", 1)[-1]
    return f"operation {at}: {operations[at].event} {path}"


def kills(server: Server, world: World, every: int = 1, names: Sequence[str] = tuple(SCENARIOS)) -> Iterator[Result]:
    """Yield the results of kills at every `every`-th operation of all scenarios."""
    for name in names:
        scenario = Scenario(server, world, name)
        for at in range(every // 2, len(scenario.undisturbed[1]), every):
            yield kill(scenario, at)


def failures(server: Server, world: World, every: int = 1, names: Sequence[str] = ("fresh",)) -> Iterator[Result]:
    """Yield the results of every kind of error in turn, at every `every`-th operation of scenarios, and of limits."""
    for name in names:
        scenario = Scenario(server, world, name)
        for number, at in enumerate(range(every // 2, len(scenario.undisturbed[1]), every)):
            yield fail(scenario, at, KINDS[number % len(KINDS)], lasting=number // len(KINDS) % 2 == 1)
        for limit in (3000, 5000, 10_000, 20_000)[:: max(1, every // 4)]:
            yield small_files(scenario, limit)
