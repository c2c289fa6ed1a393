"""FP8 E4M3, a scale for every row of a weight and for every token of its input: `fp8_pc_pt`.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  F32 [out_features]    amax of the row / 448

An input's scale is made when it is served, so calibration settles nothing of it, and no file has it.

Source: ModelOpt's FP8_PER_CHANNEL_PER_TOKEN_CFG; vLLM's ModelOptFp8PcPtLinearMethod.
"""

from typing import TYPE_CHECKING, Any

from bitladder.formats.base import Format

if TYPE_CHECKING:
    import torch


class Fp8Channel(Format):
    """See the module."""

    name = "fp8_pc_pt"
    title = "FP8 per channel and token"
    modelopt_config = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
    modelopt_algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
    channels = True
    dynamic_input = True

    def uniform_config_group(self) -> dict[str, Any] | None:
        """Return None: ModelOpt 0.47 writes no `config_groups` for this format alone, and runtimes read none."""
        return None

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return each row's largest magnitude, [out_features]; a row of zeros has the least that a scale can be."""
        from bitladder.formats import grids

        return weight.detach().abs().amax(-1).float().clamp_min(grids.LEAST_AMAX)

    def scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return amax / 448, [out_features]."""
        from bitladder.formats import grids

        return grids.scale_of(amax)

    def codes(self, values: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the nearest E4M3 codes of a weight [out_features, in_features], or of a column of it."""
        from bitladder.formats import grids

        return grids.quantise(values, amax[:, None] if values.dim() == 2 else amax)

    def restored(
        self, codes: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Return code · scale of its row."""
        from bitladder.formats import grids

        return grids.dequantise(codes, scale[:, None] if codes.dim() == 2 else scale, dtype or scale.dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input, every token rounded with a scale of its own."""
        from bitladder.formats import grids

        assert scale is None
        amax = x.detach().abs().amax(-1, keepdim=True).float().clamp_min(grids.LEAST_AMAX)
        return grids.fake_quantise(x, grids.scale_of(amax))
