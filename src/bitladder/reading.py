"""How files are opened and parsed: only regular ones, within limits; what goes wrong is an OSError or a ValueError.

A pipe would be waited for, a device read for ever, and a text nested a thousand deep ends in a RecursionError: none of
that reaches a caller, who turns these two kinds into a line that says what the file is for. Nobody else opens a file to
read it (tests/test_boundaries.py). Imports nothing of ours.
"""

import contextlib
import errno
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

_MOST_YAML_BYTES = 2**20
_MOST_YAML_DEPTH = 50  # collections in one another
_MOST_YAML_NODES = 20_000  # with every alias written out


def open_file(path: Path) -> io.BufferedReader:
    """Return a regular file, opened for reading; the caller closes it.

    Raises:
        OSError: missing, no permission, or a directory, pipe, device or socket.
    """
    name = str(path)
    if "\0" in name:
        raise OSError(errno.EINVAL, "its name holds a NUL character", name)
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "its name is no Unicode text", ascii(name)) from None
    # Without waiting: a pipe that nobody writes to would hold the caller here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        raise OSError(errno.EINVAL, "it is no regular file", name)
    return os.fdopen(descriptor, "rb")


def check_regular(path: Path) -> None:
    """Raise OSError where `path` is no regular file that can be opened: for files that a library opens by itself."""
    open_file(path).close()


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Yield a file of tensors, opened with safetensors' own reader; its tensors come on the CPU.

    Raises:
        OSError: as `open_file`. ValueError: no safetensors file, or it lacks a tensor that the body asks for.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Return all tensors of a safetensors file, by name, on the CPU; raises OSError, ValueError."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_bytes(path: Path) -> bytes:
    """Return a regular file's content; raises OSError."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """Return a regular file's content, which is UTF-8; raises OSError, ValueError."""
    return read_bytes(path).decode("utf-8").replace("\r\n", "\n")


def read_json(path: Path, **how: Any) -> Any:
    """Return what a JSON file holds; raises OSError, ValueError. `how`: see `parse_json`."""
    return parse_json(read_bytes(path), **how)


def parse_json(
    text: bytes | str, *, parse_constant: Callable[[str], Any] | None = None, keys_once: bool = False
) -> Any:
    """Return what JSON (UTF-8) says.

    Args:
        text: the JSON.
        parse_constant: called with NaN and the infinities.
        keys_once: refuse an object that says a key twice, of which Python takes the last.

    Raises:
        ValueError: no JSON, nested too deeply, a key twice.
    """
    try:
        words = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(words, parse_constant=parse_constant, object_pairs_hook=_each_once if keys_once else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{_twice(key for key, _ in pairs)[0]} is described twice")
    return found


def _twice(keys: Iterable[str]) -> list[str]:
    """Return the keys that are there more than once, sorted."""
    return sorted(key for key, times in Counter(keys).items() if times > 1)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: `yes`, `1:30` and `2020-01-01` are text, and no key is written twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; refuses what is nested too deeply."""
        self.depth += 1
        if self.depth > _MOST_YAML_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_YAML_DEPTH} levels of nesting", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; YAML's own way takes the last of equal keys."""
        twice = _twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Return a whole number; YAML 1.1 takes 010 for eight."""
        text = str(self.construct_scalar(node))
        return int(text, 16 if text.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_SURPRISES = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in _SURPRISES]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Source: YAML 1.2, 10.3.2, core schema.
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _written_out(node: Any, sizes: dict[int, int]) -> int:
    """Return how many nodes a node has with every alias written out."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
    sizes[id(node)] = 1 + sum(_written_out(one, sizes) for one in flat)
    return sizes[id(node)]


def read_yaml(path: Path) -> Any:
    """Return what a YAML file of one document holds.

    Raises:
        OSError: missing, or no regular file.
        ValueError: not UTF-8, not YAML, or more than a person writes: too long, nested too deeply, an alias of aliases.
    """
    content = read_bytes(path)
    if len(content) > _MOST_YAML_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, at most {_MOST_YAML_BYTES:,} are read")
    text, loader = content.decode("utf-8"), None
    try:
        loader = _Loader(text)  # it looks at every character at once
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_YAML_NODES:
            raise ValueError(f"its aliases stand for more than {_MOST_YAML_NODES:,} values; write out what is meant")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()
