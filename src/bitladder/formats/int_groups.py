"""What formats of integers in groups of a row have in common: packed weights, inputs in 16 bits.

    weight        I32 [out_features, in_features · bits / 32]  code + 2^(bits - 1), the first column in the lowest bits
    weight_scale  BF16 [out_features, in_features / group]     amax of the group / ((2^bits - 1) / 2), in BF16
    weight_shape  I64 [2]                                      out_features, in_features

A value is restored as code · weight_scale, code from -2^(bits - 1) to 2^(bits - 1) - 1. No ModelOpt file holds them.

Source: compressed_tensors 0.20.0, compressors/pack_quantized and quantization/utils/helpers.py (calculate_qparams);
BF16 because readers take scales in the model's dtype.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.formats.base import WEIGHT, WEIGHT_SCALE, Format, Part
from bitladder.formats.carriers import WEIGHT_PACKED, Layout

if TYPE_CHECKING:
    import torch

WEIGHT_SHAPE = "weight_shape"


def packed_layout(bits: int, group_size: int) -> Layout:
    """Return how compressed-tensors stores such a weight."""
    return Layout(
        names={WEIGHT: WEIGHT_PACKED},
        with_axis=True,
        compression="pack-quantized",
        weights={**integers(bits, "group"), "group_size": group_size},
    )


def integers(bits: int, strategy: str, *, dynamic: bool = False) -> dict[str, Any]:
    """Return compressed-tensors' words for symmetric integers."""
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


class IntGroups(Format):
    """A format whose weights are packed integers times a BF16 scale a group of a row."""

    modelopt_config = ""
    modelopt_algorithm = ""
    code_dtype = "I32"
    group_size: ClassVar[int]
    input = "unrounded"

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape has no whole groups, or None."""
        if shape[1] % self.group_size:
            return f"has rows that are not divisible by {self.group_size}: no whole groups of integers"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return packed codes, the groups' scales, and the weight's shape."""
        rows, columns = shape
        return (
            Part(WEIGHT, self.code_dtype, (rows, columns // self.codes_a_number)),
            Part(WEIGHT_SCALE, "BF16", (rows, columns // self.group_size)),
            Part(WEIGHT_SHAPE, "I64", (2,), counts=True),
        )

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_AMAX

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return none: every scale is made of its group."""
        return {}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the packed codes of these rows, or their groups' scales, or the shape."""
        import torch

        from bitladder.formats import integers as grid

        if part == WEIGHT_SHAPE:
            return torch.tensor(weight.shape)
        scales = grid.group_scales(weight, self.code_bits, self.group_size)
        return (
            scales if part == WEIGHT_SCALE else grid.packed(grid.codes(weight, scales, self.code_bits), self.code_bits)
        )

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · weight_scale."""
        from bitladder.formats import integers as grid

        values = grid.restored(grid.unpacked(parts[WEIGHT], self.code_bits), parts[WEIGHT_SCALE])
        return values if dtype is None else values.to(dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input as it is."""
        assert scale is None
        return x
