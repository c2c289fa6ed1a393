"""How work grows with the number of layers: every step at n and at 2n, in processor time and in files opened.

Time is the lesser of two runs, so that other work on the machine counts little; it has no place in CI. The number of
files opened is exact, and tells of most of what grows wrongly.
"""

from collections.abc import Iterator
from pathlib import Path

from faults.server import Server
from faults.verdict import Failed, Result, Trial, judged, last_line
from faults.world import World, make_model

KIND, SLOW = "growth", "grows too fast"
STEPS = ("inspect", "measure", "plan", "export", "verify", "preflight", "evaluate", "report")
MOST = 2.5  # times as much at twice the layers
_LAYERS, _RUNS = 60, 2


def _measure(trial: Trial, layers: int, runs: int) -> dict[str, tuple[float, int]]:
    """Return step -> (processor seconds, files opened) at a number of layers."""
    model = trial.world.kept / f"layers{layers}"
    if not model.exists():
        make_model(model, layers)
        trial.before = trial.world.sentinels()
    found: dict[str, tuple[float, int]] = {}
    for _ in range(runs):
        trial.world.clear()
        recipe = trial.world.write(trial.world.recipe(model={"path": str(model)}))
        trial.before = trial.world.sentinels()
        for step in STEPS:
            subject: Path = model if step == "inspect" else recipe
            outcome = trial.run(step, subject, seconds=60.0)
            if outcome.status:
                raise Failed(f"exit {outcome.status}", f"{step}: {last_line(outcome)}")
            seconds = min(outcome.seconds, found.get(step, (outcome.seconds, 0))[0])
            found[step] = seconds, outcome.opened
    return found


def steps(server: Server, world: World, layers: int = _LAYERS, *, timed: bool = True) -> Iterator[Result]:
    """Yield a result for every step; `timed`: of its time too, else of files opened only."""
    world.clear()
    trial = Trial(server, world)
    results: list[Result] = []
    few: dict[str, tuple[float, int]] = {}
    many: dict[str, tuple[float, int]] = {}
    with judged(results, KIND, "all steps run"):
        few, many = (_measure(trial, count, _RUNS if timed else 1) for count in (layers, 2 * layers))
    for step in STEPS if few and many else ():
        (seconds, opened), (more_seconds, more_opened) = few[step], many[step]
        figures = (
            f"{seconds:.2f} s and {opened} files at {layers} layers, {more_seconds:.2f} s and {more_opened} at twice"
        )
        with judged(results, KIND, f"{step}: {figures}"):
            if more_opened > MOST * opened or (timed and more_seconds > MOST * seconds):
                raise Failed(SLOW, figures)
    yield from results
