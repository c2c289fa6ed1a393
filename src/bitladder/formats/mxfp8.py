"""MXFP8: E4M3 in blocks of 32 with powers of two as scales, weights and inputs: `mxfp8`.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  U8 [out_features, in_features / 32]    E8M0: the exponent of the block's scale, plus 127

A block's scale is the least power of two in which nothing of it saturates: 2^ceil(log2(amax / 448)). Nothing is stored
of an input: its blocks' scales are made so when it is served. All of a weight's scales come from its own blocks, so
modules that are fused share nothing.

Source: ModelOpt's MXFP8_DEFAULT_CFG and MXFP8QTensor; vllm 0.32.0, quantization/utils/mxfp8_utils.py. Of vLLM's
kernels only Blackwell's round inputs; elsewhere such a file runs with inputs in 16 bits.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from bitladder.formats.base import WEIGHT, WEIGHT_SCALE, Format, Part
from bitladder.formats.carriers import COMPRESSED_TENSORS, MODELOPT, Layout, exponents

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns


class Mxfp8(Format):
    """See the module."""

    name = "mxfp8"
    title = "E4M3, a power of two for 32 weights or inputs of a row"
    modelopt_config = "MXFP8_DEFAULT_CFG"
    modelopt_algorithm = "MXFP8"
    modelopt_on_cpu = False
    modelopt_searches = False
    group_size = 32
    input = "block"
    layouts: ClassVar = {
        MODELOPT: Layout(),
        COMPRESSED_TENSORS: Layout(
            with_axis=True, compression="mxfp8-quantized", weights=exponents(), inputs=exponents(dynamic=True)
        ),
    }
    grouped_alone = False

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape has no whole blocks, or None; vLLM 0.32.0 asks for no more."""
        if shape[1] % self.group_size:
            return f"has rows that are not divisible by {self.group_size}: no whole blocks of MXFP8 numbers"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return codes and the exponents of the blocks' scales."""
        rows, columns = shape
        return (
            Part(WEIGHT, self.code_dtype, (rows, columns)),
            Part(WEIGHT_SCALE, "U8", (rows, columns // self.group_size)),
        )

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_AMAX

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return nothing: the weight settles all."""
        return {}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the codes of these rows, or the exponents of their blocks."""
        from bitladder.formats import grids

        exponents = grids.exponents_of(weight, self.group_size)
        return exponents if part == WEIGHT_SCALE else grids.exponent_codes(weight, exponents)

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return blocks of columns."""
        from bitladder.formats.columns import ExponentColumns

        return ExponentColumns(amax, self.group_size)

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · 2^exponent."""
        from bitladder.formats import grids

        values = grids.restored_by_exponents(parts[WEIGHT], parts[WEIGHT_SCALE])
        return values if dtype is None else values.to(dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input with every block of 32 rounded with a power of two of its own."""
        from bitladder.formats import grids

        assert scale is None
        exponents = grids.exponents_of(x, self.group_size)
        return grids.restored_by_exponents(grids.exponent_codes(x, exponents), exponents).to(x.dtype)
