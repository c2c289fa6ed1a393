"""What formats of integers in groups of a row have in common: packed weights, inputs in 16 bits.

    weight        I32 [out_features, in_features · bits / 32]  code + 2^(bits - 1), the first column in the lowest bits
    weight_scale  BF16 [out_features, in_features / group]     amax of the group / ((2^bits - 1) / 2), in BF16
    weight_shape  I64 [2]                                      out_features, in_features

A value is restored as code · weight_scale, code from -2^(bits - 1) to 2^(bits - 1) - 1. With zero points it is
(code - zero point) · weight_scale, the whole range of codes spans the group's least and greatest value, and 0:

    weight_scale       BF16                                              (greatest - least) / (2^bits - 1), in BF16
    weight_zero_point  I32 [out_features · bits / 32, in_features / group]  as codes, the first row in the lowest bits

No ModelOpt file holds them. Its quantisers of integers compute with them once they are told the scales: their own, amax
/ (2^(bits - 1) - 1), leave the lowest code without a use, and their zero points lie between codes.

Source: compressed_tensors 0.20.0, compressors/pack_quantized and quantization/utils/helpers.py (calculate_qparams);
BF16 because readers take scales in the model's dtype.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.formats.base import WEIGHT, WEIGHT_SCALE, WEIGHT_ZERO_POINT, Format, Part
from bitladder.formats.carriers import WEIGHT_PACKED, Layout

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns

WEIGHT_SHAPE = "weight_shape"
_WORD = 32  # bits of a number of packed codes


def packed_layout(bits: int, group_size: int, *, symmetric: bool = True) -> Layout:
    """Return how compressed-tensors stores such a weight."""
    return Layout(
        names={WEIGHT: WEIGHT_PACKED},
        with_axis=True,
        compression="pack-quantized",
        weights={**integers(bits, "group"), "symmetric": symmetric, "group_size": group_size},
    )


def integers(bits: int, strategy: str, *, dynamic: bool = False) -> dict[str, Any]:
    """Return compressed-tensors' words for symmetric integers."""
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


class IntGroups(Format):
    """A format whose weights are packed integers times a BF16 scale a group of a row."""

    modelopt_config = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"
    modelopt_algorithm = ""
    modelopt_calibrates = False
    code_dtype = "I32"
    group_size: ClassVar[int]
    input = "unrounded"

    def modelopt_changes(self) -> dict[str, dict[str, Any]]:
        """Return bits, groups and whether there are zero points, which ModelOpt calls a bias."""
        weights: dict[str, Any] = {
            "num_bits": self.code_bits,
            "block_sizes": {-1: self.group_size, "type": "static"},
        }
        bias = {"bias": {-1: None, "type": "static", "method": "max_min"}} if self.zero_points else {}
        return {"*weight_quantizer": weights | bias}

    def modelopt_grid(self, weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Return the greatest code · scale of every group, and its zero point as a value, [groups, 1]."""
        from bitladder.formats import integers as grid

        scales, zeros = self._of_groups(weight)
        column = scales.float().reshape(-1, 1)
        return column * grid.greatest(self.code_bits), None if zeros is None else -zeros.float().reshape(-1, 1) * column

    def _of_groups(self, weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Return the groups' scales, and their zero points where there are any."""
        from bitladder.formats import integers as grid

        of_groups = grid.group_ranges if self.zero_points else grid.group_scales
        return of_groups(weight, self.code_bits, self.group_size)

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape has no whole groups, or None."""
        if shape[1] % self.group_size:
            return f"has rows that are not divisible by {self.group_size}: no whole groups of integers"
        if shape[0] % self.rows:
            return f"has a number of rows that {self.rows} doesn't divide: no whole numbers of zero points"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return packed codes, the groups' scales and zero points, and the weight's shape."""
        rows, columns = shape
        groups = columns // self.group_size
        zeros = (rows * self.code_bits // _WORD, groups)
        return (
            Part(WEIGHT, self.code_dtype, (rows, columns // self.codes_a_number)),
            Part(WEIGHT_SCALE, "BF16", (rows, groups)),
            *([Part(WEIGHT_ZERO_POINT, self.code_dtype, zeros, packed=True)] if self.zero_points else []),
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
        """Return the packed codes of these rows, or their groups' scales or zero points, or the shape."""
        import torch

        from bitladder.formats import integers as grid

        if part == WEIGHT_SHAPE:
            return torch.tensor(weight.shape)
        scales, zeros = self._of_groups(weight)
        if part == WEIGHT_SCALE:
            return scales
        if part == WEIGHT_ZERO_POINT:
            assert zeros is not None
            return grid.packed_along_rows(zeros, self.code_bits)
        return grid.packed(grid.codes(weight, scales, self.code_bits, zeros), self.code_bits)

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return groups of columns, whose scales and zero points are chosen."""
        from bitladder.formats.columns import IntegerColumns, RangeColumns

        return (RangeColumns if self.zero_points else IntegerColumns)(amax, self.code_bits, self.group_size)

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · weight_scale, or (code - zero point) · weight_scale."""
        from bitladder.formats import integers as grid

        zeros = grid.unpacked_along_rows(parts[WEIGHT_ZERO_POINT], self.code_bits) if self.zero_points else None
        values = grid.restored(grid.unpacked(parts[WEIGHT], self.code_bits), parts[WEIGHT_SCALE], zeros)
        return values if dtype is None else values.to(dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input as it is."""
        assert scale is None
        return x
