"""What formats of E4M3 codes have in common, whatever a scale is for: a whole weight, or each of its rows."""

from typing import TYPE_CHECKING

from bitladder.formats.base import Format

if TYPE_CHECKING:
    import torch


class E4m3(Format):
    """A format whose weights are E4M3 codes times float32 scales: a scalar, or [out_features]."""

    def scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / 448, in its shape."""
        from bitladder.formats import grids

        return grids.scale_of(amax)

    def codes(self, values: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the nearest codes of a weight [out_features, in_features], or of a column of it."""
        from bitladder.formats import grids

        return grids.quantise(values, _over(amax, values))

    def restored(
        self, codes: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Return code · scale."""
        from bitladder.formats import grids

        return grids.dequantise(codes, _over(scale, codes), dtype or scale.dtype)


def _over(numbers: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Return the numbers, a scalar or one a row, in the shape in which they broadcast over a weight or a column."""
    return numbers[:, None] if numbers.dim() and values.dim() == 2 else numbers
