"""What formats of E2M1 codes in blocks of 16 have in common, whatever is done to an input.

    weight          U8 [out_features, in_features / 2]        two codes a byte, the even column in the low nibble
    weight_scale    F8_E4M3 [out_features, in_features / 16]  amax of the block / (6 · weight_scale_2), in E4M3
    weight_scale_2  F32 []                                    amax of the weight / (448 · 6)

A value is restored as code · (weight_scale · weight_scale_2). What a fused group shares is the weight's amax.

Source: ModelOpt 0.47.0, modelopt.torch.quantization.qtensor.nvfp4_tensor.NVFP4QTensor.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitladder.formats.base import (
    INPUT_SCALE,
    SCALE_DTYPE,
    WEIGHT,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    Format,
    Part,
)
from bitladder.formats.carriers import GLOBAL_SCALES, WEIGHT_PACKED, Layout, floats

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns

# In compressed-tensors' files, of inputs in 16 bits.
PACKED = Layout(
    names={WEIGHT: WEIGHT_PACKED, **GLOBAL_SCALES},
    inverted=frozenset(GLOBAL_SCALES),
    with_axis=True,
    compression="nvfp4-pack-quantized",
    weights=floats(4, "tensor_group", group_size=16),
)


class E2m1Blocks(Format):
    """A format whose weights are E2M1 codes times an E4M3 scale a block of a row, times a float32 scale of all."""

    modelopt_on_cpu = False
    code_dtype = "U8"
    code_bits = 4
    codes_a_number = 2
    group_size = 16

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape has no whole blocks, or None.

        vLLM 0.32.0 asks for no more: its kernels pad both dimensions (quantization/utils/nvfp4_utils.py,
        pad_nvfp4_weight_for_cutlass; marlin_utils.py, marlin_padded_nk).
        """
        if shape[1] % self.group_size:
            return f"has rows that are not divisible by {self.group_size}: no whole blocks of FP4 numbers"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return packed codes, the blocks' scales, the weight's and, where it is stored, the input's."""
        rows, columns = shape
        parts = (
            Part(WEIGHT, self.code_dtype, (rows, columns // self.codes_a_number)),
            Part(WEIGHT_SCALE, "F8_E4M3", (rows, columns // self.group_size)),
            Part(WEIGHT_SCALE_2, SCALE_DTYPE, ()),
        )
        return (*parts, Part(INPUT_SCALE, SCALE_DTYPE, ())) if self.has_input_scale else parts

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_BLOCKS_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_BLOCKS_AMAX

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return the scale above the blocks' scales."""
        from bitladder.formats import grids

        return {WEIGHT_SCALE_2: grids.scale_of_blocks(amax)}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the packed codes of these rows, or their blocks' scales."""
        from bitladder.formats import grids

        above = grids.scale_of_blocks(amax)
        scales = grids.block_scales(weight, above)
        return scales if part == WEIGHT_SCALE else grids.pack(grids.block_codes(weight, scales, above))

    def encode(self, weight: "torch.Tensor", amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return packed codes and scales, the blocks' scales being made once."""
        from bitladder.formats import grids

        above = grids.scale_of_blocks(amax)
        scales = grids.block_scales(weight, above)
        codes = grids.pack(grids.block_codes(weight, scales, above))
        return {WEIGHT: codes, WEIGHT_SCALE: scales, WEIGHT_SCALE_2: above}

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return blocks of columns, whose scales are chosen."""
        from bitladder.formats import grids
        from bitladder.formats.columns import E2m1Columns

        return E2m1Columns(grids.scale_of_blocks(amax))

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · (weight_scale · weight_scale_2)."""
        from bitladder.formats import grids

        values = grids.restored_blocks(parts[WEIGHT], parts[WEIGHT_SCALE], parts[WEIGHT_SCALE_2])
        return values if dtype is None else values.to(dtype)
