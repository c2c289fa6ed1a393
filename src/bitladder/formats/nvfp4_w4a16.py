"""NVFP4 weights, inputs in 16 bits: `nvfp4_w4a16`. The weight is stored as `e2m1` says, and nothing of an input.

Source: ModelOpt's W4A16_NVFP4_CFG.
"""

from typing import TYPE_CHECKING, ClassVar

from bitladder.formats.carriers import COMPRESSED_TENSORS, MODELOPT, Layout
from bitladder.formats.e2m1 import PACKED, E2m1Blocks

if TYPE_CHECKING:
    import torch


class Nvfp4W4a16(E2m1Blocks):
    """See the module."""

    name = "nvfp4_w4a16"
    title = "E2M1, an E4M3 scale for 16 weights of a row; inputs in 16 bits"
    modelopt_config = "W4A16_NVFP4_CFG"
    modelopt_algorithm = "W4A16_NVFP4"
    input = "unrounded"
    layouts: ClassVar = {MODELOPT: Layout(), COMPRESSED_TENSORS: PACKED}
    weight_like = "nvfp4"

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input as it is."""
        assert scale is None
        return x
