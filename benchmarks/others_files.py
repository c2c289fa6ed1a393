"""Reads checkpoints that other tools wrote in compressed-tensors' layout: `load(directory) -> the model that they are`.

Our own reader takes what we write, and refuses the rest: names every module of a config group, BF16 scales of integers,
all of them positive. Other tools say that a group is of all linear modules, keep scales in the dtype of the model, hold
zero points of symmetric codes, which are zeros, and negative scales, by which the larger half of the codes is the
negative one. Here scales of integers are rounded to BF16, as a runtime loads them; everything else is as it is stored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitladder.evaluation.reading import FakeQuantLinear
from bitladder.formats import (
    COMPRESSED_TENSORS,
    INPUT_SCALE,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_ZERO_POINT,
    Arithmetic,
    Format,
    format_of_group,
    get_format,
)
from bitladder.models.loading import checkpoint_tensor_names, load_model
from bitladder.models.weights import WeightFiles, read_config

EVERY = "Linear"  # a group's target that means every module left
BIAS = "bias"  # of a module, stored as it was
_CODES = ("F8_E4M3", "I8")  # dtypes of weights that are stored under their own name
_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16}


def formats_of(files: WeightFiles, section: Mapping[str, Any]) -> dict[str, Format]:
    """Return `{module: format}` of a checkpoint.

    Args:
        files: the checkpoint's.
        section: `quantization_config` of its config.json.

    Raises:
        ValueError: a module is in no group, or in one that none of our formats is.
    """
    found = {}
    groups = [(group["targets"], format_of_group(group)) for group in section["config_groups"].values()]
    for name, info in sorted(files.tensors.items()):
        module, _, leaf = name.rpartition(".")
        if leaf != WEIGHT_PACKED and not (leaf == WEIGHT and info.dtype in _CODES):
            continue
        own = [one for targets, one in groups if module in targets] or [one for names, one in groups if EVERY in names]
        if len(own) != 1 or own[0] is None:
            raise ValueError(f"{files.directory}: {module} is in no group that is a format of ours")
        found[module] = own[0]
    return found


def parts_of(files: WeightFiles, module: str, format_: Format) -> dict[str, torch.Tensor]:
    """Return what a module stores by the names of our parts, every scale as a multiplier.

    Raises:
        ValueError: it has something that the format hasn't.
    """
    layout = format_.layouts[COMPRESSED_TENSORS]
    shape = _shape(files, module, format_)
    names = {f"{module}.{layout.name(part.name)}": part for part in format_.stored(shape)}
    found = {}
    for name in (one for one in files.tensors if one.startswith(f"{module}.") and one != f"{module}.{BIAS}"):
        tensor, part = files.load(name), names.get(name)
        if part is None:
            if not name.endswith(WEIGHT_ZERO_POINT) or bool(tensor.any()):
                raise ValueError(f"{files.directory}: {format_.name} has no {name}")
        elif part.name == WEIGHT:
            found[WEIGHT] = tensor
        elif not part.counts:
            scale = tensor.to(_SCALES.get(part.dtype, tensor.dtype)).reshape(part.shape)
            found[part.name] = layout.restored(part.name, scale)
    return found


def load(directory: Path, arithmetic: Mapping[str, Arithmetic]) -> tuple[Any, dict[str, Format]]:
    """Return the model in float32 that computes what the files say, and `{module: format}` of what is quantised.

    Args:
        directory: the checkpoint.
        arithmetic: format -> how the device that will serve computes it, where that isn't as it is stored.

    Raises:
        ValueError: it holds what is none of our formats.
    """
    files = WeightFiles.open(directory)
    formats = formats_of(files, read_config(directory)["quantization_config"])
    plain = [name for name in files.tensors if name.rpartition(".")[0] not in formats or name.endswith(f".{BIAS}")]
    state = {name: files.load(name) for name in plain}
    scales = {}
    for module, format_ in formats.items():
        parts = parts_of(files, module, format_)
        state[f"{module}.{WEIGHT}"], scales[module] = format_.decode(parts), parts.get(INPUT_SCALE)
    model = load_model(directory, torch.float32, state_dict=state)
    paths = checkpoint_tensor_names(model, sorted(state))
    for module, format_ in formats.items():
        path = paths[f"{module}.{WEIGHT}"].removesuffix(f".{WEIGHT}")
        linear, (parent, _, leaf) = model.get_submodule(path), path.rpartition(".")
        assert isinstance(linear, nn.Linear)
        served = FakeQuantLinear(linear, get_format(format_.name, arithmetic), scales[module])
        setattr(model.get_submodule(parent), leaf, served)
    return model.eval(), formats


def stored_bits(files: WeightFiles, formats: Mapping[str, Format]) -> float:
    """Return the bits that a weight of the quantised modules takes on disk, counted as ours are: scales with them."""
    shapes = {module: _shape(files, module, format_) for module, format_ in formats.items()}
    bits = sum(format_.bits(shapes[module]) for module, format_ in formats.items())
    return bits / sum(rows * columns for rows, columns in shapes.values())


def _shape(files: WeightFiles, module: str, format_: Format) -> tuple[int, int]:
    """Return the shape of a module's weight."""
    name = f"{module}.{format_.layouts[COMPRESSED_TENSORS].name(WEIGHT)}"
    rows, columns = format_.weight_shape(files.tensors[name].shape)
    return rows, columns
