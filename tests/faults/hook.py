"""What happens at a run's file operations: they are counted, listed, failed, or the last that the run does.

Python tells an audit hook of every file that it opens, renames, removes; `os.fsync`, where a full or failing disk often
speaks first, tells nobody and is wrapped. What extension modules write by themselves is not seen here; the sentinels of
`world` see it.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NoReturn

KILL, MEMORY = "SIGKILL", "MemoryError"
ERRORS = ("ENOSPC", "EROFS", "EIO", "EFBIG")  # names of `errno`
_CHANGING = frozenset(
    [
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "os.utime",
    ]
)
_DIRECTORY = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2}  # which argument is a directory's descriptor
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS = ("/dev/", "/proc/")


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th operation (from 0) and, where `lasting`, at all after it.

    `kind` is `KILL`, `MEMORY` or one of `ERRORS`.
    """

    kind: str
    at: int
    lasting: bool = False


@dataclass(frozen=True)
class Operation:
    """One file operation in an allowed place."""

    event: str
    path: str


def install(
    allowed: tuple[str, ...], fault: Fault | None, report: Path, *, list_operations: bool
) -> Callable[[], None]:
    """Hook into this process for the rest of its life; the function returned reports the number of files opened.

    Args:
        allowed: places in which operations count; writing elsewhere is reported.
        fault: what happens, and when.
        report: a file that gets lines of JSON: `struck`, `outside`, `operation`, `opened`.
        list_operations: whether operations are reported too.
    """
    lines = os.open(report, os.O_WRONLY | os.O_APPEND)
    count = opened = 0
    inside = False  # the hook's own work is no operation

    def tell(key: str, value: object) -> None:
        os.write(lines, json.dumps({key: value}).encode() + b"\n")

    def operation(event: str, path: str) -> None:
        nonlocal count
        if list_operations:
            tell("operation", astuple(Operation(event, path)))
        number, count = count, count + 1
        if fault is not None and (number == fault.at or (fault.lasting and number > fault.at)):
            tell("struck", number)
            _strike(fault.kind, path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside, opened
        if inside or not (event == "open" or event in _CHANGING):
            return
        opened += event == "open"
        if event == "open" and not _writes(arguments):
            return
        inside = True
        try:
            paths = _paths(event, arguments)
        finally:
            inside = False
        known = [path for path in paths if path is not None and not path.startswith(_HARMLESS)]
        if not known or _nothing_to_do(event, known[0]):
            return
        for path in known:
            if not path.startswith(tuple(f"{place}/" for place in allowed)) and path not in allowed:
                tell("outside", path)
        operation(event, known[-1])

    real = os.fsync

    def fsync(descriptor: int) -> None:
        operation("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
    return lambda: tell("opened", opened)


def _nothing_to_do(event: str, path: str) -> bool:
    """Whether the operation leaves everything as it is: a directory made again, something absent removed."""
    return os.path.isdir(path) if event == "os.mkdir" else event == "os.remove" and not os.path.lexists(path)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & _WRITING)


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str | None]:
    """Return the paths that an operation changes."""
    if event in ("os.rename", "os.link"):
        first, second, *descriptors = arguments
        return [_absolute(first, descriptors[0]), _absolute(second, descriptors[1])]
    if event == "os.symlink":
        return [_absolute(arguments[1], arguments[2])]
    directory = arguments[_DIRECTORY[event]] if event in _DIRECTORY else -1
    return [_absolute(arguments[0], directory)]


def _absolute(path: object, directory: int) -> str | None:
    """Return where a path leads to, links of its directory resolved; None: a descriptor."""
    if isinstance(path, bytes | os.PathLike | str):
        name = os.fsdecode(path)
        if directory >= 0:
            name = os.path.join(f"/proc/self/fd/{directory}", name)
        return os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
    return None


def _strike(kind: str, path: str) -> NoReturn:
    if kind == KILL:
        os.killpg(0, signal.SIGKILL)
    if kind == MEMORY:
        raise MemoryError
    number = getattr(errno, kind)
    raise OSError(number, os.strerror(number), path)
