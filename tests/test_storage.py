"""Files are old or new, never half; a full disk or a missing permission is one line for the user."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitladder import storage
from bitladder.errors import LowMemory, OutputError
from bitladder.storage import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_path,
    atomic_write,
    check_vacant,
    check_writable,
    is_vacant,
    remove_leftovers,
    scratch_directory,
    sha256_of_bytes,
    sha256_of_file,
    temporaries_in,
)


def failing(number: int) -> Any:
    """A function that raises the operating system's error `number`, whatever it is called with."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_replaces_and_makes_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    atomic_write(path, "old")
    atomic_write(path, b"new \xc3\xa9")
    assert path.read_text(encoding="utf-8") == "new é"
    assert names(path.parent) == ["file.json"]


def test_text_is_utf_8(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "⊂")
    assert (tmp_path / "file").read_bytes() == b"\xe2\x8a\x82"


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_while_writing_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file_and_one_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from bitladder.storage import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode != 0
    assert path.read_text() == "old"
    leftover = next(name for name in names(tmp_path) if name != "file")
    assert leftover.startswith(TEMPORARY_PREFIX)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(os, step, failing(number))
    with pytest.raises(OutputError, match="no space left") as caught:
        atomic_write(path, "new")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("step", ["mkdir", "replace"])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    path = tmp_path / "new" / "file"
    monkeypatch.setattr(os, step, failing(number))
    with pytest.raises(OutputError, match=r"no permission to write .*; choose another output directory"):
        atomic_write(path, "new")
    assert not path.exists()


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        atomic_write(tmp_path / "out" / "record.json", "new")
    with pytest.raises(OutputError, match="in the way"):
        atomic_write(tmp_path / "out" / "deeper" / "record.json", "new")
    with pytest.raises(OutputError, match="in the way"), atomic_directory(tmp_path / "out" / "checkpoint"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert [is_vacant(tmp_path / name) for name in ("gone", "empty", "link", "nowhere")] == [True, True, True, False]
    with pytest.raises(OutputError, match="nowhere is there already, and nothing is written over"):
        check_vacant(tmp_path / "nowhere")


def test_a_directory_where_a_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(OutputError, match="in the way"):
        atomic_write(tmp_path / "record.json", "new")
    assert names(tmp_path) == ["record.json"]


def test_a_place_is_asked_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    check_writable(tmp_path / "new" / "in_it" / "file.json")
    check_writable(tmp_path / "file")  # which would be replaced
    for place in ("file/new", "file/new/in_it", "nowhere/new"):
        with pytest.raises(OutputError, match=f"something is in the way of {tmp_path}/{place} .* choose another"):
            check_writable(tmp_path / place)
    asked = []
    monkeypatch.setattr(os, "access", lambda *arguments: asked.append(arguments))  # root may write to all
    with pytest.raises(OutputError, match="no permission to write .*/in_it; choose another output directory"):
        check_writable(tmp_path / "new" / "in_it")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_other_errors_of_the_system_are_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.EIO))
    with pytest.raises(OutputError, match="Input/output"):
        atomic_write(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for content in ("old", "new"):
        with atomic_directory(path) as temporary:
            (temporary / content).write_text(content)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["checkpoint"]


def test_an_exception_while_filling_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:  # noqa: PT012
        (temporary / "new").write_text("ne")
        raise RuntimeError("stop")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_directory_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path):
        pass
    path.chmod(0o711)
    with atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
    assert names(path) == ["new"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o711


def test_no_space_while_filling_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(OutputError, match="no space left"), atomic_directory(path):
        failing(errno.ENOSPC)()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_failed_second_rename_does_not_lose_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    real, calls = os.replace, []

    def replace(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            failing(errno.ENOSPC)()
        real(source, destination)

    monkeypatch.setattr(storage, "_exchange", lambda *_: False)  # as on a file system that can't
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError), atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_directory_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as temporary:
        (temporary / "old").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("two steps"))
    with atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["checkpoint"]


def test_temporaries_of_a_run_lie_in_one_place_that_is_swept(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    mine, others = (tmp_path / "run" / f"{TEMPORARY_PREFIX}{key}" for key in ("mine", "others"))
    for place in (mine, others):
        place.mkdir()
        (place / "left").write_text("x")
    with temporaries_in([tmp_path / "run"], "mine"):
        assert not mine.exists()
        with atomic_path(tmp_path / "run" / "deep" / "file") as temporary:
            assert temporary.parent == mine
            temporary.write_text("x")
        with scratch_directory() as scratch:
            assert scratch.parent == mine
        atomic_write(tmp_path / "run" / "deep" / ("n" * 250), "a long name")
        (mine / "forgotten").write_text("x")
    assert names(tmp_path / "run") == [others.name, "deep"]
    assert names(tmp_path / "run" / "deep") == ["file", "n" * 250]
    assert names(others) == ["left"]


def test_what_is_written_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_discarded_directory_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    seen = []
    real = storage._remove
    monkeypatch.setattr(storage, "_remove", lambda path: seen.append((tmp_path / "old").exists()) or real(path))
    storage.discard(tmp_path / "old")
    storage.discard(tmp_path / "absent")
    assert seen == [False]
    assert names(tmp_path) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}1-a").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}1-a" / "file").write_text("x")
    (tmp_path / f"{TEMPORARY_PREFIX}2-b").write_text("x")
    (tmp_path / "mine").write_text("x")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert names(tmp_path) == ["mine"]


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 2_000_000)
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"abc" * 2_000_000)
    assert sha256_of_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("left", "kept"), [(16, False), (256, True)])
def test_a_process_that_came_close_to_its_limit_of_addresses_keeps_nothing(left, kept, tmp_path):
    """MKL without memory for its buffers multiplies in another way: a run would end with other scores."""
    code = (
        "import mmap, pathlib, re, resource, sys\n"
        "from bitladder.storage import atomic_write\n"
        "peak = re.search(r'VmPeak:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())\n"
        "limit = (int(peak[1]) << 10) + (512 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "mmap.mmap(-1, (512 - int(sys.argv[1])) << 20).close()\n"  # it is free again: what counts is that it was taken
        "try:\n    atomic_write(pathlib.Path(sys.argv[2]), 'x')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", code, str(left), str(path)], capture_output=True, text=True, check=True
    )
    assert path.exists() == kept
    if not kept:
        assert done.stdout.startswith(f"{LowMemory.__name__} the limit of ")
        assert "(ulimit -v)" in done.stdout
        assert list(tmp_path.iterdir()) == []
