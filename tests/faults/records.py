"""Damaged records between two runs: every record of a finished output directory, by bits, values, exchange, strays.

The next run refuses in a line, or makes again what is damaged: then all results are what they were.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import damage
from faults.damage import Mutant
from faults.server import Server
from faults.tree import Tree, result_tree
from faults.verdict import REFUSED, Result, Trial, judged
from faults.world import World, sound_run

KIND = "record mutant"
SOUND, OTHER = "sound", "other"  # of `World.kept`
_STRAY = "zz-stray"
_DIRECTORIES = ("schemes", "evaluations", "probes", "codes", "checkpoints")


def recipe_of(world: World, **changes: Any) -> dict[str, Any]:
    """Return the recipe of the finished directory: it has every record that there is."""
    return world.recipe(
        measurement={"rounding": "compensated"},
        schemes=[
            {"name": "half", "coverage": 0.5},
            {"name": "near", "max_kl": 0.2},
        ],
        controls={"kinds": ["random"], "seeds": 1},
        refine={"evaluations": 4, "marginal": 1},
        **changes,
    )


def make_sound(server: Server, world: World) -> Tree:
    """Keep a finished directory (`SOUND`), and one of other calibration data; return the former's results."""
    if not (world.kept / SOUND).exists():
        for name in (OTHER, SOUND):
            world.clear()
            content = recipe_of(world)
            content["calibration"]["seed"] = 0 if name == SOUND else 7
            for _ in range(2):
                sound_run(server, world, world.write(content))
            world.keep(name)
    return result_tree(world.kept / SOUND)


def _names(world: World) -> list[str]:
    """Return the records' names, relative to the output directory."""
    kept = world.kept / SOUND
    found = [p for p in kept.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")]
    names = sorted(str(p.relative_to(kept)) for p in found)
    return [n for n in names if not n.startswith("checkpoints/") or n.endswith("bitladder_manifest.json")]


def mutant(rng: random.Random, world: World) -> Mutant:
    """Return one damage to the records."""
    name, seed = rng.choice(_names(world)), rng.random()
    how = rng.choice(("edit", "edit", "edit", "edit", "file", "file", "exchange", "other", "stray", "no directory"))
    if how == "edit" and name.endswith(".json"):
        return Mutant(f"edit {name} by {seed:.4f}", lambda out: damage.edit_json(random.Random(seed), out / name))
    twins = [n for n in _names(world) if Path(n).parent == Path(name).parent and n != name]
    if how == "exchange" and twins:
        other = rng.choice(twins)
        return Mutant(f"exchange {name} and {other}", lambda out: _exchange(out / name, out / other))
    if how == "other" and (world.kept / OTHER / name).exists():
        return Mutant(f"another run's {name}", lambda out: damage.replace(world.kept / OTHER / name, out / name))
    if how == "stray":
        directory = rng.choice(_DIRECTORIES[:-1])
        return Mutant(f"a stray in {directory} like {name}", lambda out: _stray(out / name, out / directory))
    if how == "no directory":
        directory = rng.choice(_DIRECTORIES)
        text = rng.choice((None, "a file"))
        return Mutant(f"{directory} is {text or 'absent'}", lambda out: _no_directory(out / directory, text))
    kind = rng.choice(damage.WHOLE_FILE)
    return Mutant(f"{kind.__name__} {name}", lambda out: kind(random.Random(seed), out / name))


def _exchange(first: Path, second: Path) -> None:
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def _stray(model: Path, directory: Path) -> None:
    suffix = ".safetensors" if directory.name == "codes" else model.suffix
    shutil.copyfile(next(iter(directory.glob(f"*{suffix}")), model), directory / f"{_STRAY}{suffix}")


def _no_directory(directory: Path, text: str | None) -> None:
    shutil.rmtree(directory)
    if text is not None:
        directory.write_text(text)


def trial(server: Server, world: World, change: Mutant, expected: Tree) -> Result:
    """Return the result of one damage to the records."""
    world.clear()
    world.restore(SOUND)
    recipe = world.write(recipe_of(world))
    change.apply(world.out)
    results: list[Result] = []
    with judged(results, KIND, change.name) as held:
        trial_ = Trial(server, world)
        if trial_.refused(trial_.run("run", recipe)):
            held.append(REFUSED)
        else:
            trial_.no_leftovers()
            trial_.same_results(expected, ignored=lambda name: _STRAY in name)
    return results[0]


def mutants(server: Server, world: World, seed: int, count: int) -> Iterator[Result]:
    """Yield the results of `count` damages to the records."""
    expected = make_sound(server, world)
    rng = random.Random(f"record {seed}")
    for _ in range(count):
        yield trial(server, world, mutant(rng, world), expected)
