"""Damaged checkpoints, and checkpoints of an exporter that errs.

`verify` refuses every one. Of a damaged one the next run makes a right one, or refuses too. What an exporter writes
wrongly it lists wrongly too: file, digest and module record agree with each other, and not with the source or the
measurement.
"""

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import damage, reading
from faults.damage import Damage, Mutant
from faults.records import SOUND, make_sound, recipe_of
from faults.server import Server
from faults.verdict import REFUSED, WRONG, Failed, Result, Trial, judged
from faults.world import World

KIND, EXPORTER = "checkpoint mutant", "exporter mutant"
_PLACE = Path("checkpoints", "half")
_WEIGHTS, _MANIFEST = "model.safetensors", "bitladder_manifest.json"
_CONFIGS = ("config.json", "hf_quant_config.json")
_SIDES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
Entries = list[tuple[str, dict[str, Any]]]


def _entries(world: World, dtype: str | None = None, suffix: str = "") -> Entries:
    header, _ = reading.split(world.kept / SOUND / _PLACE / _WEIGHTS)
    header.pop("__metadata__", None)
    return [(n, e) for n, e in sorted(header.items()) if dtype in (None, e["dtype"]) and n.endswith(suffix)]


def _flip_weight(rng: random.Random, world: World) -> tuple[str, Damage]:
    name, entry = rng.choice(_entries(world, rng.choice(("F8_E4M3", "BF16", "F32"))))
    at, bit = rng.randrange(*entry["data_offsets"]), rng.randrange(8)

    def apply(directory: Path) -> None:
        header, data = reading.split(directory / _WEIGHTS)
        data[at] ^= 1 << bit
        reading.join(directory / _WEIGHTS, header, data)

    return f"bit {bit} of byte {at} ({name})", apply


def _exchange_tensors(rng: random.Random, world: World) -> tuple[str, Damage]:
    entries = _entries(world)
    pairs = [
        (a, b) for a, e in entries for b, f in entries if a < b and (e["dtype"], e["shape"]) == (f["dtype"], f["shape"])
    ]
    content = reading.tensors(world.kept / SOUND / _PLACE / _WEIGHTS)
    first, second = rng.choice([(a, b) for a, b in pairs if content[a].data != content[b].data])

    def apply(directory: Path) -> None:
        header, data = reading.split(directory / _WEIGHTS)
        header[first]["data_offsets"], header[second]["data_offsets"] = (
            header[second]["data_offsets"],
            header[first]["data_offsets"],
        )
        reading.join(directory / _WEIGHTS, header, data)

    return f"exchange {first} and {second}", apply


def _edit(rng: random.Random, names: tuple[str, ...]) -> tuple[str, Damage]:
    name, seed = rng.choice(names), rng.random()
    return f"edit {name} by {seed:.4f}", lambda directory: damage.edit_json(random.Random(seed), directory / name)


def _whole_file(rng: random.Random, world: World) -> tuple[str, Damage]:
    name, seed = rng.choice((*_CONFIGS, *_SIDES, _WEIGHTS, _MANIFEST)), rng.random()
    how = rng.choice(damage.WHOLE_FILE)
    return f"{how.__name__} {name}", lambda directory: how(random.Random(seed), directory / name)


def _extra(rng: random.Random, world: World) -> tuple[str, Damage]:
    names = "zz.safetensors model.safetensors.index.json modeling.py chat_template.jinja .x sub/a a.bin"
    name = rng.choice([*names.split(), "special_tokens_map.json"])

    def apply(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            reading.write(path, {"model.norm.weight": reading.Tensor("BF16", (16,), bytes(32))})
        else:
            path.write_text("{}")

    return f"one more file {name}", apply


def _linked(rng: random.Random, world: World) -> tuple[str, Damage]:
    def apply(directory: Path) -> None:
        (directory / _WEIGHTS).unlink()
        (directory / _WEIGHTS).symlink_to(world.model / _WEIGHTS)

    return "the weights are a link to the source's", apply


_DAMAGES: tuple[Callable[[random.Random, World], tuple[str, Damage]], ...] = (
    _flip_weight,
    _flip_weight,
    _flip_weight,
    _exchange_tensors,
    lambda rng, _: _edit(rng, _CONFIGS),
    _whole_file,
    _whole_file,
    lambda rng, _: _edit(rng, (*_SIDES, _MANIFEST)),
    _extra,
    _linked,
)


def damaged(rng: random.Random, world: World, *, times_kept: bool) -> Mutant:
    """Return one damage to a checkpoint, of which the times of change tell or don't tell."""
    number = rng.randrange(len(_DAMAGES))
    name, apply = _DAMAGES[number](rng, world)
    if times_kept:
        inner = apply
        return Mutant(f"{name}, times kept", lambda directory: damage.keep_times(directory, inner)(directory))
    return Mutant(name, apply)


def _reseal(directory: Path, manifest: Any) -> None:
    """Let the manifest list the files as they are, as the project's own writer writes it."""
    from bitladder.records import CheckpointManifest

    manifest.pop("content_sha256", None)
    for entry in manifest["files"]:
        content = (directory / entry["name"]).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    CheckpointManifest.model_validate(manifest).write(directory / _MANIFEST)


def _scale(rng: random.Random, world: World) -> tuple[str, Callable[[Path, Any], None]]:
    part = rng.choice(("weight_scale", "input_scale"))
    name, entry = rng.choice(_entries(world, "F32", part))
    factor = rng.choice((2.0, 0.5, 1.01, 1.0 + 2**-20, -1.0, 0.0, 1e6))

    def apply(directory: Path, manifest: Any) -> None:
        header, data = reading.split(directory / _WEIGHTS)
        begin, end = entry["data_offsets"]
        (old,) = struct.unpack("<f", data[begin:end])
        data[begin:end] = struct.pack("<f", old * factor)
        (new,) = struct.unpack("<f", data[begin:end])
        reading.join(directory / _WEIGHTS, header, data)
        for module in manifest["modules"]:
            if module["tensor"] == name.removesuffix(part) + "weight":
                module[part] = new

    return f"{name} times {factor}", apply


def _listed(kind: tuple[str, Damage]) -> tuple[str, Callable[[Path, Any], None]]:
    return kind[0], lambda directory, _: kind[1](directory)


def _unlisted(rng: random.Random, world: World) -> tuple[str, Callable[[Path, Any], None]]:
    name = rng.choice(_SIDES)

    def apply(directory: Path, manifest: Any) -> None:
        (directory / name).unlink()
        manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != name]

    return f"{name} is left out", apply


def _one_more(rng: random.Random, world: World) -> tuple[str, Callable[[Path, Any], None]]:
    name = rng.choice(("chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json", "zz.safetensors"))

    def apply(directory: Path, manifest: Any) -> None:
        if name.endswith(".safetensors"):
            reading.write(directory / name, {"model.extra.weight": reading.Tensor("BF16", (16,), bytes(32))})
        else:
            (directory / name).write_text("{}")
        manifest["files"].append({"name": name, "bytes": 0, "sha256": ""})

    return f"{name} is added", apply


def _module(rng: random.Random, world: World) -> tuple[str, Callable[[Path, Any], None]]:
    how = rng.choice(("dropped", "twice"))

    def apply(directory: Path, manifest: Any) -> None:
        manifest["modules"] = (
            manifest["modules"][1:] if how == "dropped" else manifest["modules"] + manifest["modules"][:1]
        )

    return f"a module's record {how}", apply


def erring(rng: random.Random, world: World) -> Mutant:
    """Return one consistent error of an exporter."""
    name, apply = rng.choice(
        (
            lambda: _scale(rng, world),
            lambda: _scale(rng, world),
            lambda: _scale(rng, world),
            lambda: _listed(_flip_weight(rng, world)),
            lambda: _listed(_exchange_tensors(rng, world)),
            lambda: _listed(_edit(rng, _CONFIGS)),
            lambda: _listed(_edit(rng, _CONFIGS)),
            lambda: _listed(_edit(rng, _SIDES)),
            lambda: _unlisted(rng, world),
            lambda: _one_more(rng, world),
            lambda: _module(rng, world),
        )
    )()

    def both(directory: Path) -> None:
        manifest = json.loads((directory / _MANIFEST).read_text())
        apply(directory, manifest)
        _reseal(directory, manifest)

    return Mutant(name, both)


def _content(directory: Path) -> dict[str, object]:
    """Return what the files of a checkpoint say: the manifest's values, however they are laid out, others' bytes."""
    found: dict[str, object] = {}
    for path in sorted(path for path in directory.rglob("*") if not path.is_dir()):
        found[path.relative_to(directory).as_posix()] = path.read_bytes() if path.is_file() else None
    with contextlib.suppress(KeyError, ValueError, TypeError, RecursionError):
        found[_MANIFEST] = json.loads(found[_MANIFEST])  # type: ignore[arg-type]
    return found


def trial(server: Server, world: World, mutant: Mutant, kind: str) -> Result:
    """Return the result of one damaged or wrongly exported checkpoint."""
    expected = make_sound(server, world)
    world.clear()
    world.restore(SOUND)
    recipe = world.write(recipe_of(world))
    before = _content(world.out / _PLACE)
    mutant.apply(world.out / _PLACE)
    same = _content(world.out / _PLACE) == before
    results: list[Result] = []
    with judged(results, kind, mutant.name) as held:
        trial_ = Trial(server, world)
        if not trial_.refused(trial_.run("verify", recipe)) and not same:
            raise Failed(WRONG, "`verify` accepts it")
        held.append(REFUSED)
        if kind == KIND and not same and not trial_.refused(trial_.run("run", recipe)):
            trial_.no_leftovers()
            trial_.same_results(expected)
    return results[0]


def mutants(server: Server, world: World, seed: int, count: int) -> Iterator[Result]:
    """Yield the results of `count` damaged checkpoints; half of them with the times of change kept."""
    make_sound(server, world)
    rng = random.Random(f"checkpoint {seed}")
    for number in range(count):
        yield trial(server, world, damaged(rng, world, times_kept=number % 2 == 1), KIND)


def exporters(server: Server, world: World, seed: int, count: int) -> Iterator[Result]:
    """Yield the results of `count` checkpoints of exporters that err."""
    make_sound(server, world)
    rng = random.Random(f"exporter {seed}")
    for _ in range(count):
        yield trial(server, world, erring(rng, world), EXPORTER)
