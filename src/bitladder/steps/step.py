"""The one rule of what is done and still valid, and what doing a step leaves behind.

A record counts where it is whole and names what it would be made from now:

    known = valid(work, Evaluation, path, settings_sha256=key, manifest_sha256=manifest.fingerprint())

Whatever else has to be true of it (files beside it that are as they were) its step asks. A step that has something to
do notes what that took, once it is through:

    with doing(work, "evaluate") as meter, meter.phase("evaluate original"):
        ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bitladder.records import Record
from bitladder.runinfo import Meter
from bitladder.steps.workspace import Workspace

RecordT = TypeVar("RecordT", bound=Record)


def valid(work: Workspace, kind: type[RecordT], path: Path, **made_from: Any) -> RecordT | None:
    """Return the record at `path`, or None: there is none, it is damaged (which is told), or made from something else.

    Args:
        work: the recipe and its output directory.
        kind: of record.
        path: where it lies.
        made_from: fields and properties of it, each with the value that it would have now.
    """
    return _if_made_from(work.known(kind, path), made_from)


def read_valid(kind: type[RecordT], path: Path, **made_from: Any) -> RecordT | None:
    """Return the same where nothing would make it again: a damaged record is refused.

    Raises:
        RecordError: it is damaged.
    """
    return _if_made_from(kind.read(path) if path.exists() else None, made_from)


def _if_made_from(record: RecordT | None, made_from: dict[str, Any]) -> RecordT | None:
    if record is None or any(getattr(record, name) != value for name, value in made_from.items()):
        return None
    return record


@contextmanager
def doing(work: Workspace, step: str) -> Iterator[Meter]:
    """Give the meter of a step that has something to do, and note what it took where it comes through."""
    meter = Meter()
    yield meter
    work.finished(step, meter.phases)
