"""Two runs at once: in one output directory, and in two that put their checkpoints into one."""

from collections.abc import Iterator
from pathlib import Path

from faults.server import Outcome, Server
from faults.tree import result_tree
from faults.verdict import LOST, Failed, Result, Trial, judged, last_line
from faults.world import World, sound_run

KIND = "two at once"
_DELAYS = (0.0, 0.02, 0.1, 0.3, 0.6, 1.0)  # seconds; a run takes about one


def _one_output(server: Server, world: World, delay: float) -> Result:
    """Two runs of one recipe: one is refused or waits for nothing; the results are one run's."""
    world.clear()
    recipe = world.write(world.recipe())
    sound_run(server, world, recipe)
    expected = result_tree(world.out)
    world.clear()
    recipe = world.write(world.recipe())
    results: list[Result] = []
    with judged(results, KIND, f"one output, {delay} s apart"):
        trial = Trial(server, world)
        outcomes = trial.together(world.job(["run", recipe]), world.job(["run", recipe], delay=delay))
        for outcome in outcomes:
            _right_or_locked(outcome)
        if all(outcome.status for outcome in outcomes):
            raise Failed(LOST, "neither run went on")
        trial.no_leftovers()
        trial.same_results(expected)
        trial.succeeds("run", recipe)
        trial.same_results(expected)
    return results[0]


def _right_or_locked(outcome: Outcome) -> None:
    if outcome.status and not (outcome.refused and "another bitladder process" in outcome.output):
        raise Failed(LOST, f"status {outcome.status}: {last_line(outcome)}")


def _one_parent(server: Server, world: World, delay: float) -> Result:
    """Two outputs whose checkpoints lie in one directory: both runs do what they do alone."""

    def recipes() -> list[Path]:
        world.clear()
        world.out.mkdir()
        made = []
        for name in "ab":
            content = world.recipe(output=str(world.out / name), layout={"checkpoints": f"../shared/{name}-{{scheme}}"})
            made.append(world.write(content, f"{name}.yaml"))
        return made

    for recipe in recipes():
        sound_run(server, world, recipe)
    expected = result_tree(world.out)
    first, second = recipes()
    results: list[Result] = []
    with judged(results, KIND, f"one parent of checkpoints, {delay} s apart"):
        trial = Trial(server, world)
        for outcome in trial.together(world.job(["run", first]), world.job(["run", second], delay=delay)):
            if outcome.status:
                raise Failed(LOST, f"status {outcome.status}: {last_line(outcome)}")
        trial.no_leftovers()
        trial.same_results(expected)
    return results[0]


def pairs(server: Server, world: World, delays: tuple[float, ...] = _DELAYS) -> Iterator[Result]:
    """Yield the results of all pairs."""
    for delay in delays:
        yield _one_output(server, world, delay)
        yield _one_parent(server, world, delay)
