"""FP8 E4M3, one scale for a weight and one for its input: `fp8`.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  F32 []    amax of the weight / 448
    input_scale   F32 []    amax of what calibration saw / 448

Source: ModelOpt's FP8_DEFAULT_CFG.
"""

from typing import TYPE_CHECKING

from bitladder.formats.base import Format

if TYPE_CHECKING:
    import torch


class Fp8Tensor(Format):
    """See the module."""

    name = "fp8"
    title = "FP8 per tensor"
    modelopt_config = "FP8_DEFAULT_CFG"
    modelopt_algorithm = "FP8"
    channels = False
    dynamic_input = False

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return the weight's largest magnitude, a scalar."""
        return weight.detach().abs().amax()

    def scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / 448."""
        from bitladder.formats import grids

        return grids.scale_of(amax)

    def codes(self, values: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the nearest E4M3 codes of values of any shape."""
        from bitladder.formats import grids

        return grids.quantise(values, amax)

    def restored(
        self, codes: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Return code · scale."""
        from bitladder.formats import grids

        return grids.dequantise(codes, scale, dtype or scale.dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input rounded with its stored scale."""
        from bitladder.formats import grids

        assert scale is not None
        return grids.fake_quantise(x, scale)
