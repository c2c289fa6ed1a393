"""NVFP4, weights and inputs: `nvfp4`, four bits on both sides (W4A4).

The weight is stored as `e2m1` says, and beside it

    input_scale  F32 []    amax of what calibration saw / (448 · 6)

An input is rounded in blocks of 16, each with a scale that is made when it is seen, in E4M3 above `input_scale`.

Source: ModelOpt's NVFP4_DEFAULT_CFG; vLLM's ref_nvfp4_quant_dequant. GPUs without FP4 units run such a file with inputs
in 16 bits.
"""

from typing import TYPE_CHECKING

from bitladder.formats.e2m1 import E2m1Blocks

if TYPE_CHECKING:
    import torch


class Nvfp4(E2m1Blocks):
    """See the module."""

    name = "nvfp4"
    title = "E2M1, an E4M3 scale for 16 weights or inputs of a row"
    modelopt_config = "NVFP4_DEFAULT_CFG"
    modelopt_algorithm = "NVFP4"
    input = "static"

    def input_scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / (448 · 6)."""
        from bitladder.formats import grids

        return grids.scale_of_blocks(amax)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input with every block of 16 rounded with a scale of its own."""
        from bitladder.formats import grids

        assert scale is not None
        return grids.fake_quantise_blocks(x, scale)
