"""`python -m faults`: all trials, or some (`make test-faults`)."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import checkpoints, figures, growth, interrupted, models, recipes, records, together
from faults.server import Server
from faults.verdict import Result
from faults.world import World

_Series = Callable[[Server, World, int, float], Iterator[Result]]


def _times(count: int, share: float) -> int:
    return max(1, round(count * share))


SERIES: dict[str, _Series] = {
    "kills": lambda server, world, seed, share: interrupted.kills(server, world, _times(1, 1 / share)),
    "faults": lambda server, world, seed, share: interrupted.failures(server, world, _times(1, 1 / share)),
    "recipes": lambda server, world, seed, share: recipes.mutants(server, world, seed, _times(500, share)),
    "models": lambda server, world, seed, share: models.mutants(server, world, seed, _times(500, share)),
    "records": lambda server, world, seed, share: records.mutants(server, world, seed, _times(400, share)),
    "checkpoints": lambda server, world, seed, share: checkpoints.mutants(server, world, seed, _times(200, share)),
    "exporters": lambda server, world, seed, share: checkpoints.exporters(server, world, seed, _times(100, share)),
    "together": lambda server, world, seed, share: together.pairs(server, world),
    "growth": lambda server, world, seed, share: growth.steps(server, world),
}


def main() -> int:
    """Run the series asked for; the exit status is 1 where a trial doesn't hold."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the mutants")
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES), help="these series")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each series, for a quick look")
    parser.add_argument("--write", action="store_true", help="write the figures and the page's table")
    asked = parser.parse_args()
    results: list[Result] = []
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        world = World.make(Path(directory).resolve() / "world")
        with Server(world.environment) as server:
            for name in asked.only:
                start = time.monotonic()
                for result in SERIES[name](server, world, asked.seed, asked.share):
                    results.append(result)
                    if not result.held:
                        print(f"{result.kind} | {result.name} | {result.verdict} | {result.detail}", flush=True)
                seconds[name] = time.monotonic() - start
                held = sum(result.held for result in results)
                print(f"{name}: {seconds[name]:.0f} s; held so far {held} of {len(results)}", flush=True)
    content = figures.figures(results, asked.seed, asked.share, seconds)
    print(figures.table(content))
    if asked.write:
        figures.write(content)
    return int(content["held"] != content["tried"])


if __name__ == "__main__":
    sys.exit(main())
