"""What formats of E4M3 codes have in common, whatever a scale is for: a whole weight, or each of its rows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitladder.formats.base import INPUT_SCALE, SCALE_DTYPE, WEIGHT, WEIGHT_SCALE, Format, Part

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns

ALIGNMENT = 16  # FP8 matrix products need both dimensions divisible by 16 (torch._scaled_mm, CUTLASS)


class E4m3(Format):
    """A format whose weights are E4M3 codes times float32 scales: a scalar, or [out_features].

    A code depends on its element and the scale alone, so that codes can be chosen column by column.
    """

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why FP8 matrix products don't take a weight of this shape, or None."""
        if any(size % ALIGNMENT for size in shape):
            return f"is not divisible by {ALIGNMENT}: no FP8 matrix product"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return codes, scale and, where it is stored, the input's scale."""
        weight = Part(WEIGHT, self.code_dtype, tuple(shape))
        scale = Part(WEIGHT_SCALE, SCALE_DTYPE, (shape[0],) if self.channels else ())
        return (weight, scale, Part(INPUT_SCALE, SCALE_DTYPE, ())) if self.has_input_scale else (weight, scale)

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_AMAX

    def scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / 448, the multiplier that restores a value from its code: float32, of the shape of `amax`."""
        from bitladder.formats import grids

        return grids.scale_of(amax)

    def input_scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / 448."""
        return self.scale(amax)

    def codes(self, values: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the nearest codes of a weight [out_features, in_features], or of a column of it, [out_features]."""
        from bitladder.formats import grids

        return grids.quantise(values, _over(amax, values))

    def restored(
        self, codes: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Return code · scale, multiplied in float32 and cast to `dtype` (None: float32)."""
        from bitladder.formats import grids

        return grids.dequantise(codes, _over(scale, codes), dtype or scale.dtype)

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return the weight's scale."""
        return {WEIGHT_SCALE: self.scale(amax)}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the codes of these rows."""
        assert part == WEIGHT
        return self.codes(weight, amax)

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return codes with scales that are known before."""
        from bitladder.formats.columns import E4m3Columns

        return E4m3Columns(amax.float().expand(rows))

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · scale."""
        return self.restored(parts[WEIGHT], parts[WEIGHT_SCALE], dtype)


def _over(numbers: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Return the numbers, a scalar or one a row, in the shape in which they broadcast over a weight or a column."""
    return numbers[:, None] if numbers.dim() and values.dim() == 2 else numbers
