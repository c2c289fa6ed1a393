"""Damage that any file can take: bits, lengths, kinds; and edits of JSON. All by a given random generator."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Mutant:
    """A change to inputs or results.

    Attributes:
        name: what is changed.
        apply: does it, to a directory.
        must_refuse: no result can be right.
    """

    name: str
    apply: Damage
    must_refuse: bool = False


def flip_bit(rng: random.Random, path: Path) -> None:
    """Flip one bit somewhere."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(rng: random.Random, path: Path) -> None:
    """Keep some of the first bytes, or none."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice((0, 1, len(content) // 2, len(content) - 1, rng.randrange(len(content))))])


def append(rng: random.Random, path: Path) -> None:
    """Add bytes at the end."""
    path.write_bytes(path.read_bytes() + rng.choice((b"\0", b"}", b"\xff" * 100, b"\n{}")))


def garbage(rng: random.Random, path: Path) -> None:
    """Replace everything by noise, or by JSON of another kind."""
    noise = rng.randbytes(200)
    path.write_bytes(rng.choice((noise, b"null", b"[]", b"{}", b'"x"', b'{"a":' + b"[" * 100_000, b"\xff\xfe{\0}\0")))


def remove(_: random.Random, path: Path) -> None:
    """Remove the file."""
    path.unlink()


def other_kind(rng: random.Random, path: Path) -> None:
    """Put something in its place that is no regular file."""
    path.unlink()
    kind = rng.choice(("directory", "fifo", "dangling", "itself", "zero"))
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "/absent/file", "itself": path.name, "zero": "/dev/zero"}[kind])


WHOLE_FILE = (flip_bit, flip_bit, truncate, append, garbage, remove, other_kind)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (path, value) of everything in JSON that is no container."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, key))
    else:
        yield path, value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of everything in JSON below the top, containers too."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places(entry, (*path, key))


def holder(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the container of what lies at a path."""
    for key in path[:-1]:
        value = value[key]
    return value


def changed(rng: random.Random, value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + rng.choice((1, -1, 1000, -(10**6)))
    if isinstance(value, float):
        return rng.choice((value * 1.5 + 1, -value - 1e-3, value * 300 + 1e-9, 1e300, float("nan")))
    return rng.choice((value + "x", "", value[:-1] + ("0" if value[-1:] != "0" else "1"), "../../around/notes.txt"))


def edit_json(rng: random.Random, path: Path) -> None:
    """Change, remove, add or exchange one value of a file of JSON."""
    content = json.loads(path.read_text())
    how = rng.choice(("value", "value", "value", "delete", "type", "add"))
    found = [place for place, _ in leaves(content)] if how == "value" else list(places(content))
    if not found:
        path.write_text("[1]")
        return
    place = rng.choice(found)
    owner = holder(content, place)
    if how == "value":
        owner[place[-1]] = changed(rng, owner[place[-1]])
    elif how == "delete":
        del owner[place[-1]]
    elif how == "type":
        old = json.dumps(owner[place[-1]])
        new = [value for value in (None, [], {}, "x", -1, 0, 1e308, True, [[1]], {"a": 1}) if json.dumps(value) != old]
        owner[place[-1]] = rng.choice(new)
    else:
        content = {**content, "added": 1} if isinstance(content, dict) else [*content, 1]
    path.write_text(json.dumps(content, indent=1) + "\n")


def keep_times(directory: Path, damage: Damage) -> Damage:
    """Return the damage with every file's size kept where it is, and its time of change put back."""

    def apply(where: Path) -> None:
        before = {path: path.lstat() for path in directory.rglob("*")}
        damage(where)
        for path, status in before.items():
            if path.is_file():
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return apply


def replace(source: Path, path: Path) -> None:
    """Put a copy of another file or directory in the place of this one."""
    if path.is_dir():
        shutil.rmtree(path)
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)
