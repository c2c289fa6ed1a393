"""How verification reads: safetensors' own reader, JSON without duplicate keys, differences by their paths."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bitladder import reading
from bitladder.errors import RecordError

INDEX = "model.safetensors.index.json"
_MISSING = object()
_SHOWN = 60  # characters of a value in a message


class Tensors:
    """All tensors of some weight files, each opened once, read with safetensors' own reader."""

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self.files: dict[str, tuple[str, Any]] = {}
        self.broken: dict[str, str] = {}  # file -> why it can't be read
        self.twice: list[tuple[str, str, str]] = []  # (tensor, file, the file before)
        self.metadata: dict[str, Any] = {}
        for path in paths:
            try:
                handle: Any = stack.enter_context(reading.open_safetensors(path))
            except (OSError, ValueError) as error:
                self.broken[path.name] = str(error)
                continue
            self.metadata[path.name] = handle.metadata()
            names = list(handle.keys())
            self.twice += [(name, path.name, self.file(name)) for name in names if name in self.files]
            self.files.update((name, (path.name, handle)) for name in names)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU."""
        tensor: torch.Tensor = self.files[name][1].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        return tuple(self.files[name][1].get_slice(name).get_shape())

    def file(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self.files[name][0] if name in self.files else "*.safetensors"


def weight_files(source: Path) -> list[Path]:
    """Return the weight files of the original: those that its index names, or the one of the usual name."""
    index = source / INDEX
    if not index.exists():
        return [source / "model.safetensors"]
    return [source / name for name in sorted(set(reading.read_json(index)["weight_map"].values()))]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes, [bytes] uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_json(path: Path) -> Any:
    """Return a file's content.

    Raises:
        RecordError: missing, not JSON, or with a key twice in one object; the message names no file.
    """
    try:
        return reading.read_json(path, keys_once=True)
    except FileNotFoundError:
        raise RecordError("missing") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"not readable as JSON ({error})") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def differences(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, how it differs) of what two JSON values differ in; 1, 1.0 and true are three values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(found.get(key, _MISSING), wanted.get(key, _MISSING), inner)
    elif found is _MISSING:
        yield path, f"is missing, it should be {_shown(wanted)}"
    elif wanted is _MISSING:
        yield path, f"is {_shown(found)}, it should not be there"
    elif isinstance(found, list) and isinstance(wanted, list):
        yield from _in_lists(found, wanted, path)
    elif json.dumps(found) != json.dumps(wanted):
        yield path, f"is {_shown(found)}, it should be {_shown(wanted)}"


def _in_lists(found: list[Any], wanted: list[Any], path: str) -> Iterator[tuple[str, str]]:
    texts, others = ([json.dumps(item, sort_keys=True) for item in items] for items in (found, wanted))
    if texts == others:
        return
    lacking = [item for item in others if item not in texts]
    added = [item for item in texts if item not in others]
    if lacking:
        yield path, f"lacks {_shown(json.loads(lacking[0]))}"
    if added:
        yield path, f"has {_shown(json.loads(added[0]))}, it should not"
    if not lacking and not added:
        yield path, "has its entries in another order or number"
