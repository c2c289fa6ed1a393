"""How a carrier, the kind of checkpoint that holds a format, stores its parts: names, shapes, the other way up.

A format's parts are those of ModelOpt's files. compressed-tensors keeps the same numbers, but

- of a tensor [1], of rows [out_features, 1], where ModelOpt has [] and [out_features];
- of square blocks a matrix, without ModelOpt's axes of 1;
- packed codes as `weight_packed`;
- a scale above blocks by the name of a global scale, and inverted: the file has what values are multiplied with.

Source: compressed_tensors 0.20.0, compressors/*/base.py and quantization/lifecycle/initialize.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitladder.formats.base import INPUT_SCALE, WEIGHT, WEIGHT_SCALE_2, Part

if TYPE_CHECKING:
    import torch

MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"
CARRIERS = (MODELOPT, COMPRESSED_TENSORS)
WEIGHT_PACKED = "weight_packed"
GLOBAL_SCALES = {WEIGHT_SCALE_2: "weight_global_scale", INPUT_SCALE: "input_global_scale"}
_SQUARE_AXES = 4  # of the scales of square blocks, every other one is 1
_EXPONENTS = "torch.uint8"  # dtype of scales that are exponents, without which codes like these are scaled otherwise
_STATED = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure")


@dataclass(frozen=True)
class Layout:
    """How a carrier stores a format's parts.

    Attributes:
        names: part -> its name in the carrier's files, where that is another one.
        inverted: the parts that are stored as 1 / scale.
        with_axis: whether one number is stored as [1], one a row as [rows, 1], one a square block as [rows, columns].
        compression: compressed-tensors' name of the way in which a weight is stored, its `format`.
        weights: what its configuration says of weights, as `QuantizationArgs`.
        inputs: and of inputs; None: they aren't rounded.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    inverted: frozenset[str] = frozenset()
    with_axis: bool = False
    compression: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None

    def name(self, part: str) -> str:
        """Return a part's name in the carrier's files."""
        return self.names.get(part, part)

    def shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape in which a part is stored."""
        if not self.with_axis or part.name == WEIGHT or part.counts:
            return part.shape
        if len(part.shape) > 1:
            return part.shape[::2] if len(part.shape) == _SQUARE_AXES else part.shape
        return (*part.shape, 1)

    def stored(self, part: str, scale: "torch.Tensor") -> "torch.Tensor":
        """Return a scale as it is stored, but for its shape."""
        return scale.reciprocal() if part in self.inverted else scale

    def restored(self, part: str, stored: "torch.Tensor") -> "torch.Tensor":
        """Return the multiplier that a stored scale stands for, float32 where it is inverted."""
        return stored.reciprocal() if part in self.inverted else stored

    def carried(self, parts: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Return parts as they are once they have been stored and read again."""
        return {name: self.restored(name, self.stored(name, value)) for name, value in parts.items()}

    def holds(self, group: Mapping[str, Any]) -> bool:
        """Return whether an entry of compressed-tensors' `config_groups` describes what is stored so."""
        weights, inputs = group.get("weights"), group.get("input_activations")
        return (
            isinstance(weights, Mapping)
            and _stated(weights) == _stated(self.weights)
            and (weights.get("scale_dtype") == _EXPONENTS) == (self.weights.get("scale_dtype") == _EXPONENTS)
            and (_stated(inputs) if isinstance(inputs, Mapping) else None)
            == (None if self.inputs is None else _stated(self.inputs))
        )


def _stated(numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides how numbers are stored, with compressed-tensors' defaults for what isn't said."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    stated = {**defaults, **{key: value for key, value in numbers.items() if value is not None}}
    return tuple(str(stated.get(key)).lower() for key in _STATED)


def exponents(*, dynamic: bool = False) -> dict[str, Any]:
    """Return compressed-tensors' words for MXFP8's numbers."""
    return {**floats(8, "group", dynamic), "group_size": 32, "scale_dtype": _EXPONENTS}


def floats(bits: int, strategy: str, dynamic: bool | str = False, group_size: int | None = None) -> dict[str, Any]:
    """Return compressed-tensors' words for symmetric floating-point numbers."""
    scales = {} if group_size is None else {"group_size": group_size, "scale_dtype": "torch.float8_e4m3fn"}
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic, **scales}
