"""Files that are never half-written: write to a temporary sibling, fsync, rename.

A crash leaves either the old file or the new one, plus at most a sibling named `.bitladder-tmp-*`, which the next
run removes. Imports errors only.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bitladder.errors import OutputError

TEMPORARY_PREFIX = ".bitladder-tmp-"
_HASH_BLOCK_BYTES = 1 << 22


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """Return the hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hex SHA-256 of the file's content, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota, a missing permission or a file in the way of `path` into one `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left on the device while writing {path}; free space or choose another output directory, "
                "then run the same command again: finished steps are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"no permission to write {path}; choose another output directory") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise OutputError(
                f"something is in the way of {path} ({error.strerror}); move it or choose another output directory"
            ) from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success fsync it and rename it to `path`.

    Raises:
        OutputError: no space, no permission, something in the way.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
    try:
        with explain_os_errors(path):
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it takes the place of `path` (which it replaces).

    Every file in it must have been flushed by the writer. On failure the sibling is removed and `path` is untouched.

    Raises:
        OutputError: no space, no permission, something in the way.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
    replaced = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-old-{path.name}"
    try:
        with explain_os_errors(path):
            temporary.mkdir()
            yield temporary
            fsync_path(temporary)
            if path.exists():
                os.replace(path, replaced)
            try:
                os.replace(temporary, path)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, path)
                raise
            fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary siblings that a killed run left in `directory`."""
    if not directory.is_dir():
        return
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
