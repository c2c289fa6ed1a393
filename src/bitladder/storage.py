"""Files that are never half-written: write to a temporary, fsync, rename.

A crash leaves either the old file or the new one. Temporaries have one name, `.bitladder-tmp-*`, and while a run works
one place: the directory of that name in its output (`temporaries_in`), or, for files on another file system or beside
which others write, one that bears the run's key. Each run sweeps its own places before and after. Imports errors and
reading only.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bitladder.errors import LowMemory, OutputError
from bitladder.reading import open_file, read_bytes, read_text

TEMPORARY_PREFIX = ".bitladder-tmp-"
_SEAL = ".sha256"  # of the files that say what another file's digest is
_HASH_BLOCK_BYTES = 1 << 22
_FROM_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of renameat2(2), from Linux's headers
_KEPT_NAME = 100  # characters of a file's name that its temporary has too
_LEAST_LEFT = 64 << 20  # bytes of addresses; the products' own buffers were seen to take 2 MiB a thread
_places: list[Path] = []  # where temporaries go, of runs that are working
_number = itertools.count()


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """Return the hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path, read: Callable[[int], None] | None = None) -> str:
    """Return the hex SHA-256 of the file's content, read in blocks of 4 MiB; `read` is told how long each was."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if read is not None:
                read(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into one `OutputError`: space, permission, a file in the way."""
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
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            raise OutputError(
                f"something is in the way of {path} ({error.strerror}); move it or choose another output directory"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"the name of {path} is too long for the disk; choose a shorter one") from error
        where = "" if error.filename is None or str(error.filename) == str(path) else f", {error.filename}"
        reason = error.strerror or str(error)
        raise OutputError(f"{path} can't be written ({reason}{where}); choose another output directory") from error


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return where a path leads, absolute and through links; `~` is the home. A loop of links is left as it is."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def check_vacant(directory: Path) -> None:
    """Raise OutputError where a directory isn't vacant; see `is_vacant`."""
    if not is_vacant(directory):
        raise OutputError(f"{directory} is there already, and nothing is written over; name a new directory")


def is_vacant(directory: Path) -> bool:
    """Return whether nothing is there but an empty directory at most; a link that leads nowhere is something."""
    return not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir()))


def check_file(path: Path) -> None:
    """Check that a file can be put at `path`, as `check_writable` does.

    Raises:
        OutputError: no permission, something in the way, or a directory.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name a file in it")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Check that a file or a directory can be put at `path`, before what it will hold is made; nothing is touched.

    Where directories are lacking on the way, the last that is there is asked.

    Raises:
        OutputError: no permission, something in the way.
    """
    place = next(place for place in path.absolute().parents if os.path.lexists(place))
    with explain_os_errors(path):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def seal(path: Path) -> None:
    """Write beside a finished file what its SHA-256 is; see `unsealed`."""
    atomic_write(_seal_of(path), sha256_of_file(path))


def unsealed(directory: Path) -> list[Path]:
    """Return all below `directory` but files with the SHA-256 that is written beside them, and what holds them."""
    everything = sorted(directory.rglob("*"))
    whole = {path for path in everything if path.suffix != _SEAL and _is_sealed(path)}
    kept = {kept for path in whole for kept in (path, _seal_of(path), *path.parents)}
    return [path for path in everything if path not in kept]


def unseal(directory: Path) -> None:
    """Remove what `seal` wrote in `directory`."""
    for path in directory.glob(f"*{_SEAL}"):
        path.unlink()


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_SEAL}")


def _is_sealed(path: Path) -> bool:
    known = _seal_of(path)
    if any(one.is_symlink() or not one.is_file() for one in (path, known)):
        return False
    return read_bytes(known) == sha256_of_file(path).encode()


def fsync_path(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporaries_in(places: Sequence[Path], key: str) -> Iterator[None]:
    """Let temporaries lie in one directory of each place, and sweep those directories before and after.

    Args:
        places: directories, one on each file system that is written to.
        key: of the run: others that write to the same places have other keys, and their temporaries stay.

    Raises:
        OutputError: one can't be removed at the end of a body that came through.
    """
    own = [place / f"{TEMPORARY_PREFIX}{key}" for place in places]
    for directory in own:
        _remove(directory)
    _places.extend(own)
    try:
        yield
    finally:
        for directory in own:
            _places.remove(directory)
            _remove(directory)
    for directory in own:
        if directory.exists():  # what could not be swept is tried again, and told
            with explain_os_errors(directory):
                directory.rmdir()


def temporary_of(path: Path) -> Path:
    """Return a path that nothing has, on the file system of `path`, whose directory must exist.

    Raises:
        OutputError: no space, no permission.
    """
    name = f"{TEMPORARY_PREFIX}{os.getpid()}-{next(_number)}-{path.name[:_KEPT_NAME]}"
    device = path.parent.stat().st_dev
    for directory in sorted(_places, key=lambda place: not path.is_relative_to(place.parent)):
        if directory.parent.is_dir() and directory.parent.stat().st_dev == device:
            with explain_os_errors(path):
                directory.mkdir(exist_ok=True)
            return directory / name
    return path.parent / name


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory for files that nobody needs afterwards: where a run's temporaries lie, else the system's."""
    place = next((directory for directory in _places if directory.parent.is_dir()), None)
    if place is not None:
        place.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bitladder-", dir=place))
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(path: Path) -> None:
    """Remove a file or a directory, whatever it is; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary to write to; on success flush it and rename it to `path`, with the usual permissions.

    Raises:
        OutputError: no space, no permission, something in the way. LowMemory: as `check_memory`.
    """
    check_memory()
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(path)
    try:
        with explain_os_errors(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # safetensors' writer leaves 0600
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_memory() -> None:
    """Refuse to keep what a process found that came close to its limit of addresses (`ulimit -v`).

    Where MKL gets no memory for its buffers, a product of matrices takes another way without a word, and its sums
    differ (scores by 10⁻⁵): results would depend on the limit.

    Raises:
        LowMemory: less than 64 MiB were left at some time.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    peak = _peak_addresses()
    if peak is not None and limit - peak < _LEAST_LEFT:
        raise LowMemory(
            f"the limit of {limit >> 20} MiB of addresses (ulimit -v) left {max(0, limit - peak) >> 20} MiB at one "
            f"time; with less than {_LEAST_LEFT >> 20} results may differ, so none is kept: raise the limit, or lower "
            "batch_size and sequence_length"
        )


def _peak_addresses() -> int | None:
    """Return the most bytes of addresses that this process had at one time; None: the system doesn't say."""
    try:
        status = read_text(Path("/proc/self/status"))
    except OSError:
        return None
    found = re.search(r"^VmPeak:\s+(\d+) kB", status, re.MULTILINE)
    return None if found is None else int(found[1]) << 10


def _umask() -> int:
    """Return the process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it takes the place of `path` (which it replaces).

    Every file in it must have been flushed by the writer. On failure it is removed and `path` is untouched.

    Raises:
        OutputError: no space, no permission, something in the way.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, replaced = temporary_of(path), temporary_of(path)
    try:
        with explain_os_errors(path):
            temporary.mkdir()
            if path.is_dir():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))  # whoever might read it may go on
            yield temporary
            fsync_path(temporary)
            if not path.exists():
                os.replace(temporary, path)
            elif not _exchange(temporary, path):
                os.replace(path, replaced)
                try:
                    os.replace(temporary, path)
                except OSError:
                    os.replace(replaced, path)
                    raise
            fsync_path(path.parent)
    finally:
        _remove(temporary)
        _remove(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths exchange what they name in one step; False: the system can't.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    done = rename(_FROM_HERE, os.fsencode(first), _FROM_HERE, os.fsencode(second), _RENAME_EXCHANGE) == 0
    if not done and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return bool(done)


def discard(path: Path) -> None:
    """Remove a file or directory so that a crash leaves all of it or nothing under its name."""
    if not path.exists() and not path.is_symlink():
        return
    temporary = temporary_of(path)
    with explain_os_errors(path):
        os.replace(path, temporary)
    _remove(temporary)


def remove_leftovers(directory: Path) -> None:
    """Remove all temporaries in `directory`, whoever left them: nobody else may be writing there."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        _remove(leftover)
