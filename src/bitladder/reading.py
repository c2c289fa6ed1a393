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
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


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
        raise ValueError(f"{twice(key for key, _ in pairs)[0]} is described twice")
    return found


def twice(keys: Iterable[str]) -> list[str]:
    """Return the keys that are there more than once, sorted."""
    return sorted(key for key, times in Counter(keys).items() if times > 1)
