"""FP8 E4M3, one scale for a weight and one for its input: `fp8`.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  F32 []    amax of the weight / 448
    input_scale   F32 []    amax of what calibration saw / 448

Source: ModelOpt's FP8_DEFAULT_CFG.
"""

from typing import TYPE_CHECKING, ClassVar

from bitladder.formats.carriers import COMPRESSED_TENSORS, MODELOPT, Layout, floats
from bitladder.formats.e4m3 import E4m3

if TYPE_CHECKING:
    import torch


class Fp8Tensor(E4m3):
    """See the module."""

    name = "fp8"
    title = "E4M3, one scale a tensor for weights and one for inputs"
    modelopt_config = "FP8_DEFAULT_CFG"
    modelopt_algorithm = "FP8"
    input = "static"
    scalar_scales = True
    layouts: ClassVar = {
        MODELOPT: Layout(),
        COMPRESSED_TENSORS: Layout(
            with_axis=True, compression="float-quantized", weights=floats(8, "tensor"), inputs=floats(8, "tensor")
        ),
    }

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input rounded with its stored scale."""
        from bitladder.formats import grids

        assert scale is not None
        return grids.fake_quantise(x, scale)
