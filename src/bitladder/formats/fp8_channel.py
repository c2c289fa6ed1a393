"""FP8 E4M3, a scale for every row of a weight and for every token of its input: `fp8_pc_pt`.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  F32 [out_features]    amax of the row / 448

An input's scale is made when it is served, so calibration settles nothing of it, and no file has it.

Source: ModelOpt's FP8_PER_CHANNEL_PER_TOKEN_CFG; vLLM's ModelOptFp8PcPtLinearMethod.
"""

from typing import TYPE_CHECKING, ClassVar

from bitladder.formats.carriers import COMPRESSED_TENSORS, MODELOPT, Layout, floats
from bitladder.formats.e4m3 import E4m3

if TYPE_CHECKING:
    import torch


class Fp8Channel(E4m3):
    """See the module."""

    name = "fp8_pc_pt"
    title = "E4M3, a scale a row for weights and one a token for inputs"
    modelopt_config = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
    modelopt_algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
    channels = True
    amax_name = "row_amax"
    input = "token"
    layouts: ClassVar = {
        MODELOPT: Layout(),
        COMPRESSED_TENSORS: Layout(
            with_axis=True,
            compression="float-quantized",
            weights=floats(8, "channel"),
            inputs=floats(8, "token", dynamic=True),
        ),
    }
    grouped_alone = False

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return each row's largest magnitude, [out_features]; a row of zeros has the least that a scale can be."""
        from bitladder.formats import grids

        return weight.detach().abs().amax(-1).float().clamp_min(grids.LEAST_AMAX)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input, every token rounded with a scale of its own."""
        from bitladder.formats import grids

        assert scale is None
        amax = grids.largest(x, keepdim=True).clamp_min(grids.LEAST_AMAX)
        return grids.fake_quantise(x, grids.scale_of(amax))
