"""A model's directory with some tensors scaled by powers of two, all else as it is."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from bitladder.checkpoints.config import CONFIG_FILE
from bitladder.checkpoints.writer import DTYPE_BYTES, Entry, write_file, write_weights
from bitladder.errors import ModelError
from bitladder.models.scaling import Scaling
from bitladder.models.sources import side_files
from bitladder.models.weights import INDEX_FILE, PROVENANCE_FILE, WeightFiles, read_provenance
from bitladder.reading import read_bytes
from bitladder.runinfo import Progress, no_progress
from bitladder.storage import atomic_directory, check_vacant


def write_folded(
    source: Path,
    destination: Path,
    scalings: Mapping[str, Scaling],
    remark: str,
    progress: Progress = no_progress,
) -> None:
    """Write a model with some tensors scaled along their last dimension.

    Args:
        source: the model's directory.
        destination: a directory that doesn't exist, or is empty.
        scalings: of each tensor that changes, by its name in the files.
        remark: added to what PROVENANCE says of the weights.
        progress: told of every file.

    Raises:
        OutputError: no space, or something is there. ModelError: damaged source, or a product that its dtype rounds.
    """
    check_vacant(destination)
    weights = WeightFiles.open(source)
    with atomic_directory(destination) as temporary:
        for index, file in enumerate(weights.files):
            progress("write folded model", index, len(weights.files))
            entries = [
                Entry(
                    info.name,
                    info.dtype,
                    info.shape,
                    info.end - info.begin,
                    partial(_scaled, weights, info.name, scalings[info.name]) if info.name in scalings else info,
                )
                for info in weights.tensors.values()
                if info.file == file
            ]
            entries.sort(key=lambda entry: (-DTYPE_BYTES.get(entry.dtype, 1), entry.name))
            write_weights(weights, file, entries, temporary)
        progress("write folded model", len(weights.files), len(weights.files))
        copied = [CONFIG_FILE, *side_files(source), *([INDEX_FILE] if (source / INDEX_FILE).exists() else [])]
        for name in copied:
            if name != PROVENANCE_FILE:
                write_file(temporary / name, read_bytes(source / name))
        said = [line for line in (read_provenance(source), remark) if line is not None]
        write_file(temporary / PROVENANCE_FILE, "; ".join(said).encode() + b"\n")


def _scaled(weights: WeightFiles, name: str, scaling: Scaling) -> torch.Tensor:
    """Return a scaled tensor, in its own dtype."""
    tensor = weights.load(name)
    if not bool(scaling.kept(tensor).all()):
        raise ModelError(
            f"{weights.directory / weights.tensors[name].file}: {name} times powers of two doesn't fit "
            f"{weights.tensors[name].dtype}; convert the model to BF16 first"
        )
    return scaling.applied(tensor)
