"""YAML as recipes are written in: no surprises, and no more of it than a person writes.

A module of its own, since the library is imported with it: who plans from a measurement, or compares, reads none.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from bitladder.reading import twice

_MOST_BYTES = 2**20
_MOST_DEPTH = 50  # collections in one another
_MOST_NODES = 20_000  # with every alias written out


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: `yes`, `1:30` and `2020-01-01` are text, and no key is written twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; refuses what is nested too deeply."""
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_DEPTH} levels of nesting", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; YAML's own way takes the last of equal keys."""
        again = twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if again:
            raise yaml.constructor.ConstructorError(None, None, f"the key {again[0]!r} is given twice", node.start_mark)
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


def parse_yaml(content: bytes) -> Any:
    """Return what YAML (UTF-8) of one document says.

    Raises:
        ValueError: not UTF-8, not YAML, or more than a person writes: too long, nested too deeply, an alias of aliases.
    """
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, at most {_MOST_BYTES:,} are read")
    text, loader = content.decode("utf-8"), None
    try:
        loader = _Loader(text)  # it looks at every character at once
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_NODES:
            raise ValueError(f"its aliases stand for more than {_MOST_NODES:,} values; write out what is meant")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_said(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _said(error: yaml.YAMLError) -> str:
    """Return a complaint of the library in one line, without the snippets that it draws."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    begun = getattr(error, "context", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{f' ({begun})' if begun else ''}"


def line_of(content: bytes, location: Sequence[int | str]) -> int | None:
    """Return the line, from 1, of the last part of `location` that YAML which was parsed has; None: it has none.

    Args:
        content: what `parse_yaml` took.
        location: keys of mappings and places in lists, from the top.
    """
    loader, line = _Loader(content.decode("utf-8")), None
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    for part in location:
        found: Any = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part],) * 2
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line
