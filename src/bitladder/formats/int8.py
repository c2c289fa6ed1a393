"""Eight-bit integers on both sides, a scale for every row of a weight and every token of its input: `int8`.

    weight        I8 [out_features, in_features]
    weight_scale  F32 [out_features]    amax of the row / 127.5

An input's scale is made when it is served, amax of the token / 127 as vLLM makes it. No ModelOpt file holds it; its
quantisers compute with it once they are told the rows' scales, which they would make amax / 127.

Source: compressed_tensors 0.20.0, quantization/quant_scheme.py (INT8_W8A8); vLLM's CompressedTensorsW8A8Int8.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.formats.base import SCALE_DTYPE, WEIGHT, WEIGHT_SCALE, Format, Part
from bitladder.formats.carriers import COMPRESSED_TENSORS, Layout
from bitladder.formats.e4m3 import ALIGNMENT
from bitladder.formats.int_groups import integers

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns


class Int8(Format):
    """See the module."""

    name = "int8"
    title = "INT8, a scale a row and a token"
    modelopt_config = "INT8_WEIGHT_ONLY_CFG"
    modelopt_algorithm = ""
    modelopt_calibrates = False
    code_dtype = "I8"
    channels = True
    amax_name = "row_amax"
    input = "token"
    layouts: ClassVar = {
        COMPRESSED_TENSORS: Layout(
            with_axis=True,
            compression="int-quantized",
            weights=integers(8, "channel"),
            inputs=integers(8, "token", dynamic=True),
        )
    }

    def modelopt_changes(self) -> dict[str, dict[str, Any]]:
        """Return that inputs are rounded as well, every token by an amax of its own."""
        return {"*input_quantizer": {"num_bits": self.code_bits, "type": "dynamic", "block_sizes": {-1: None}}}

    def modelopt_grid(self, weight: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Return the greatest code · scale of every row, [out_features, 1]."""
        from bitladder.formats import integers as grid

        scales = grid.scale_of(self.amax_of(weight), self.code_bits)
        return scales[:, None] * grid.greatest(self.code_bits), None

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why integer matrix products don't take a weight of this shape, or None."""
        if any(size % ALIGNMENT for size in shape):
            return f"is not divisible by {ALIGNMENT}: no integer matrix product"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return codes and the rows' scales."""
        return Part(WEIGHT, self.code_dtype, tuple(shape)), Part(WEIGHT_SCALE, SCALE_DTYPE, (shape[0],))

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_AMAX

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return each row's largest magnitude, [out_features]; that of zeros as FP8 by rows has it."""
        from bitladder.formats import grids

        return weight.detach().abs().amax(-1).float().clamp_min(grids.LEAST_AMAX)

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return the rows' scales."""
        from bitladder.formats import integers as grid

        return {WEIGHT_SCALE: grid.scale_of(amax, self.code_bits)}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the codes of these rows."""
        from bitladder.formats import integers as grid

        assert part == WEIGHT
        return grid.codes(weight, grid.scale_of(amax, self.code_bits), self.code_bits)

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return codes with scales that are known before."""
        from bitladder.formats import integers as grid
        from bitladder.formats.columns import RowIntegerColumns

        return RowIntegerColumns(grid.scale_of(amax, self.code_bits), self.code_bits)

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · weight_scale."""
        from bitladder.formats import integers as grid

        values = grid.restored(parts[WEIGHT], parts[WEIGHT_SCALE])
        return values if dtype is None else values.to(dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input, every token rounded with a scale of its own."""
        from bitladder.formats import integers as grid

        assert scale is None
        return grid.round_tokens(x)
