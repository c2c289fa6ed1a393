"""Damaged recipes: every key deleted, renamed or given a wrong value, and YAML that means something else than it says.

A run refuses one in a line, or does just what it says: the resolved recipe in `run.json` has every value of the recipe,
of the same type, and `verify` passes.
"""

import copy
import datetime
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from faults import damage
from faults.damage import Mutant
from faults.server import Server
from faults.verdict import REFUSED, WRONG, Failed, Result, Trial, judged
from faults.world import Json, World

KIND = "recipe mutant"
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    10**30,
    2**63,
    math.nan,
    math.inf,
    5e-324,
    "zzz",
    "",
    [],
    [1, "a", None],
    {},
    {"a": {"b": 1}},
    "ä☃\u202e",
    "a\0b",
    "n" * 300,
    "../../../around/notes.txt",
    datetime.date(2020, 1, 1),
    b"\xff\xfe",
    "a/b",
    "<b>",
    "1e400",
    "~nobody_zz/x",
    "/dev/null",
    "/dev/zero",
    "tpu",
    "cuda",
    "meta",
    "2",
    "1:30",
    "yes",
    1e308,
    "[!",
    "{scheme}",
    ".",
    "..",
)


class _WithoutDates(yaml.SafeLoader):
    """YAML as the project takes it: what looks like a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in entries if not tag.endswith(":timestamp")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _full(world: World) -> Json:
    """Return a recipe that has every part."""
    return world.recipe(
        model={"path": str(world.model), "search": "language_model"},
        measurement={
            "engine": "native",
            "method": "fisher",
            "formats": ["fp8"],
            "share_fused_scales": True,
            "rounding": "compensated",
            "damping": 0.1,
            "score_samples": 4,
            "device": "cpu",
        },
        workers={"count": 0},
        schemes=[
            {"name": "half", "coverage": 0.5, "exclude": [], "kv_cache": "none"},
            {"name": "bits", "effective_bits": 10.0},
            {"name": "score", "max_predicted_score": 100.0},
        ],
        refine={"evaluations": 0, "marginal": 6},
        export={"share_files": False},
        layout={"checkpoints": "checkpoints/{scheme}", "manifests": False},
    )


def _dump(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _structural(rng: random.Random, world: World) -> Mutant:
    content = _full(world)
    place = rng.choice([p for p in damage.places(content) if p != ("output",)])
    owner = damage.holder(content, place)
    how = rng.choice(("delete", "rename", "set", "set", "set", "set"))
    refuse, value = False, None
    if how == "delete":
        del owner[place[-1]]
    elif how == "rename" and isinstance(owner, dict):
        owner[f"{place[-1]}s"] = owner.pop(place[-1])
        refuse = True
    else:
        value = rng.choice(_VALUES)
        owner[place[-1]] = value
    name = f"{how} {'.'.join(map(str, place))}" + (f" = {str(value)[:30]!r}" if how == "set" else "")
    return _text(name, _dump(content), refuse)


def _text(name: str, content: str | bytes, must_refuse: bool = False) -> Mutant:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def apply(where: Path) -> None:
        (where / "recipe.yaml").write_bytes(data)

    return Mutant(name, apply, must_refuse)


def _yaml(rng: random.Random, world: World) -> Mutant:
    base = _dump(_full(world))
    bomb = "\n".join(
        [
            "a0: &a0 [x, x, x, x, x, x, x, x, x]",
            *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    )
    seed = "seed: 0"
    texts: list[tuple[str, str | bytes, bool]] = [
        ("empty", "", True),
        ("scalar", "hello", True),
        ("list", "- 1\n- 2", True),
        ("two documents", base + "---\n" + base, True),
        ("tab", "\tmodel: x", True),
        ("unclosed", "model: {path: x", True),
        ("key twice", base + f"output: {world.out}2\n", True),
        ("nested key twice", base.replace("coverage: 0.5", "coverage: 0.5\n  coverage: 0.9"), True),
        ("python tag", base.replace(seed, "seed: !!python/object/apply:os.system ['touch evil']", 1), True),
        ("impossible date", base.replace("name: half", "name: 2020-13-45"), False),
        ("undefined alias", base.replace(seed, "seed: *nope", 1), True),
        ("recursive", base.replace("schemes:\n", "schemes: &s\n- *s\n"), True),
        ("bomb in keys", bomb + "\n" + base, True),
        ("bomb in a value", bomb + "\n" + base.replace(seed, "seed: *a8", 1), True),
        ("deep", "model: " + "[" * 5000 + "]" * 5000, True),
        ("deep maps", "model: " + "{a: " * 3000 + "1" + "}" * 3000, True),
        ("5000 digits", base.replace("samples: 4", "samples: " + "9" * 5000, 1), True),
        ("UTF-16", base.encode("utf-16"), False),
        ("BOM", "\ufeff" + base, False),
        ("Latin-1", base.encode("latin1") + b"# \xe4\n", True),
        ("CRLF", base.replace("\n", "\r\n"), False),
        ("NUL", base + "\0", True),
        ("sexagesimal", base.replace("samples: 4", "samples: 1:30", 1), True),
        ("yes for a number", base.replace("samples: 4", "samples: yes", 1), True),
        ("true seed", base.replace(seed, "seed: true", 1), True),
        ("coverage yes", base.replace("coverage: 0.5", "coverage: yes", 1), True),
        ("bytes", base.replace(seed, "seed: !!binary aGk=", 1), True),
        ("coverage off", base.replace("coverage: 0.5", "coverage: off", 1), True),
        ("merge key", base + "zz: {<<: {a: 1}}\n", True),
    ]
    name, content, refuse = rng.choice(texts)
    return _text(f"YAML: {name}", content, refuse)


def _schemes(rng: random.Random, world: World) -> Mutant:
    half = {"name": "a", "coverage": 0.5}
    lists: list[tuple[list[Any], bool]] = [
        ([], True),
        ([half, half], True),
        ([half, {"name": "b", "coverage": 0.5}], True),
        ([half, {"name": "A", "coverage": 1.0}], False),
        ([{"name": "a", "coverage": 0.5, "effective_bits": 9}], True),
        ([{"name": "a", "coverage": 1e-300}], False),
        ([{"name": "a", "effective_bits": 7.9}], True),
        ([{"name": "a", "effective_bits": 1e308}], False),
        ([{"name": "a", "max_kl": 1e-300}], False),
        ([{"name": "a", "include": ["zzz*"]}], True),
        ([{"name": "a", "include": ["[!"]}], True),
        ([{"name": "a", "include": ["*"], "exclude": ["*"]}], True),
        ([{"name": "a", "coverage": 0.5, "format": "int4"}], True),
        ([{"name": "a", "coverage": -0.1}], True),
        ([{"name": "a", "coverage": 1.1}], True),
        ([{"name": "a", "coverage": math.nan}], True),
        *[
            ([{"name": n, "coverage": 0.5}], True)
            for n in ("..", "../x", "a/b", "", ".x", "a\nb", "x" * 256, "a\0b", "-x")
        ],
        *[
            ([{"name": n, "coverage": 0.5}], False)
            for n in ("a b", "ü", "CON", "x" * 200, "run.json", "schemes", "<b>", "%s", "$(id)", "a;b")
        ],
    ]
    schemes, refuse = rng.choice(lists)
    return _text(f"schemes {str(schemes)[:70]}", _dump({**_full(world), "schemes": schemes}), refuse)


def _layout(rng: random.Random, world: World) -> Mutant:
    around, scheme = str(world.around), "half"
    kinds: list[tuple[Json, str, bool]] = [
        ({"report": name}, scheme, True)
        for name in (
            "run.json",
            "measurement.json",
            ".lock",
            "run.log",
            "checkpoints",
            "checkpoints/half/config.json",
            "checkpoints/half",
            "verification.json",
            "schemes/half.json",
            "evaluations/half.json",
            str(world.around / "notes.txt"),
            str(world.model / "config.json"),
            "/dev/null",
            str(world.around / "link"),
            str(world.around / "private"),
            "measurement.safetensors",
            "report.html",
        )
    ]
    kinds += [
        ({"checkpoints": f"{around}/{{scheme}}"}, name, True)
        for name in ("another_model", "private", "notes.txt", "link")
    ]
    kinds += [
        ({"checkpoints": place}, scheme, True)
        for place in ("/proc/{scheme}", "schemes/{scheme}.json", "../around", "x", "")
    ]
    kinds += [
        ({"checkpoints": f"{place}/{{scheme}}"}, scheme, True)
        for place in ("measuring", "codes", "run.json", "schemes", "evaluations", "probes")
    ]
    kinds += [
        ({"checkpoints": "{scheme}"}, name, True)
        for name in ("schemes", "evaluations", "probes", "run.json", "checkpoints", "codes")
    ]
    kinds += [
        ({"checkpoints": "here/{scheme}"}, scheme, False),
        ({"report": "deep/er/report.md"}, scheme, False),
        ({"manifests": True}, scheme, False),
    ]
    layout, name, refuse = rng.choice(kinds)
    content = _full(world) | {"layout": layout, "schemes": [{"name": name, "coverage": 0.5}]}
    return _text(f"layout {layout} of {name}", _dump(content), refuse and name != "checkpoints")


def _paths(rng: random.Random, world: World) -> Mutant:
    content = _full(world)
    place, value = rng.choice(
        [
            *[
                (("model", "path"), v)
                for v in (
                    "",
                    "/",
                    "~nobody_zz/x",
                    "absent/model",
                    "../..",
                    "a/b/c",
                    "x" * 300,
                    str(world.base),
                    str(world.base / "calibration.txt"),
                )
            ],
            *[
                (("calibration", "data", "path"), v)
                for v in (
                    "/dev/zero",
                    "/dev/null",
                    "/proc/self/mem",
                    str(world.base),
                    "",
                    "~",
                    str(world.model / "model.safetensors"),
                )
            ],
            *[
                (("output",), v)
                for v in (
                    "",
                    "/",
                    "/dev/null",
                    "/proc/x",
                    str(world.base),
                    str(world.around),
                    str(world.around / "notes.txt"),
                    str(world.around / "private"),
                    "a" * 300,
                    "\0",
                )
            ],
            *[(("measurement", "device"), v) for v in ("cuda:0", "mps", "meta", "tpu", "cpu:99", " ")],
            *[(("calibration", "data", "kind"), v) for v in ("jsonl", "coco", "image_text", "huggingface", "chat")],
        ]
    )
    damage.holder(content, place)[place[-1]] = value
    return _text(f"{'.'.join(place)} = {str(value)[:60]!r}", _dump(content), place[-1] in ("output", "device", "kind"))


_MAKERS = (_structural, _structural, _structural, _structural, _yaml, _schemes, _layout, _paths)


def trial(server: Server, world: World, mutant: Mutant) -> Result:
    """Return the result of one damaged recipe."""
    world.clear()
    mutant.apply(world.trial)
    recipe = world.trial / "recipe.yaml"
    results: list[Result] = []
    with judged(results, KIND, mutant.name) as held:
        trial_ = Trial(server, world)
        if trial_.refused(trial_.run("run", recipe)):
            held.append(REFUSED)
        elif mutant.must_refuse:
            raise Failed(WRONG, "taken, though it can't be meant")
        else:
            trial_.no_leftovers()
            if trial_.refused(trial_.run("verify", recipe)):
                raise Failed(WRONG, "`verify` refuses what `run` accepted")
            _says_the_same(recipe, world)
    return results[0]


def _says_the_same(recipe: Path, world: World) -> None:
    """Raise `Failed` where the resolved recipe has another value than the recipe says."""
    asked = yaml.load(recipe.read_bytes(), _WithoutDates)
    resolved = yaml.safe_load((world.out / "run.json").read_text())["recipe"]
    for key in ("calibration", "held_out"):  # one may stand for a list of one
        if isinstance(resolved.get(key), list) and isinstance(asked.get(key), dict):
            asked[key] = [asked[key]]
    for place, value in damage.leaves(copy.deepcopy(asked)):
        found = resolved
        try:
            for key in place:
                found = found[key]
        except (KeyError, IndexError, TypeError):
            raise Failed(WRONG, f"{place} = {value!r} has no effect") from None
        if value is None or "path" in place or place[-1] in ("output", "python"):
            continue  # none: the default; paths are made absolute
        number = isinstance(value, int | float) and isinstance(found, int | float)
        same_kind = isinstance(value, bool) == isinstance(found, bool)
        if not (found == value and same_kind and (number or type(found) is type(value))):
            raise Failed(WRONG, f"{place} = {value!r} was read as {found!r}")


def mutants(server: Server, world: World, seed: int, count: int) -> Iterator[Result]:
    """Yield the results of `count` damaged recipes."""
    rng = random.Random(f"recipe {seed}")
    for number in range(count):
        yield trial(server, world, _MAKERS[number % len(_MAKERS)](rng, world))
