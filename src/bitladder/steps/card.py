"""Write model cards again, and say what an upload to a hub needs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitladder.errors import RecordError
from bitladder.models.hub import lacking
from bitladder.records import CheckpointManifest
from bitladder.report import name_on_a_hub
from bitladder.steps.report import report_of, write_cards
from bitladder.steps.workspace import Workspace


@dataclass(frozen=True)
class Upload:
    """A checkpoint as a hub gets it.

    Attributes:
        card: its model card, as it was written.
        command: what uploads it.
        lacks: what a hub's users will miss, each with what comes of it; empty: nothing.
    """

    card: Path
    command: str
    lacks: tuple[str, ...]


def write_again(work: Workspace, names: Sequence[str]) -> dict[str, Upload]:
    """Write the model cards of these schemes' checkpoints from the records that are there; nothing else changes.

    Raises:
        RecordError: a scheme has no checkpoint yet, or a record is damaged.
    """
    result = report_of(work)
    exported = {scheme.name for scheme in result.schemes if scheme.checkpoint_bytes is not None}
    for name in names:
        if name not in exported:
            raise RecordError(f"scheme {name} has no checkpoint as it is planned now; `bitladder export` writes it")
    write_cards(work, result, names)
    said = result.settings["card"]
    unknown = [
        f"no {key} in the card: give --{key.replace('_', '-')}, or `card: {{{key}: ...}}` in the recipe"
        for key, value in said.items()
        if value is None
    ]
    uploads = {}
    for name in names:
        directory = work.checkpoint_directory(name)
        uploads[name] = Upload(
            card=directory / CheckpointManifest.CARD_NAME,
            command=shlex.join(["hf", "upload", name_on_a_hub(result, name), str(directory)]),
            lacks=(*lacking(directory), *unknown),
        )
    return uploads
