"""FP8 E4M3 with a scale for every 128 x 128 block of a weight, inputs in blocks of 128: `fp8_block`, DeepSeek's form.

    weight        F8_E4M3 [out_features, in_features]
    weight_scale  F32 [out_features / 128, 1, in_features / 128, 1]    amax of the block / 448

Compensated codes for a device with DeepGEMM have the powers of two above as scales.

An input's scales are made when it is served, one for every token and 128 columns, so no file has them. ModelOpt calls
the format `fp8_pb_wo`, weight only, and its own preset leaves inputs alone; runtimes round them.

Source: ModelOpt's FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG; vllm 0.32.0, quantization/modelopt.py, KFp8Block128 and `resolve`
(kFp8Dynamic128Sym); 0.25.1, ModelOptFp8PbWoLinearMethod.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from bitladder.formats.base import POWERS_OF_TWO, SCALE_DTYPE, WEIGHT, WEIGHT_SCALE, Format, Part
from bitladder.formats.carriers import COMPRESSED_TENSORS, MODELOPT, Layout, floats

if TYPE_CHECKING:
    import torch

    from bitladder.formats.columns import Columns

_SIDE = 128


class Fp8Block(Format):
    """See the module."""

    name = "fp8_block"
    title = "E4M3, a scale for 128 x 128 weights and for 128 inputs of a token"
    modelopt_config = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
    modelopt_algorithm = "fp8_pb_wo"
    square = _SIDE
    amax_name = "block_amax"
    input = "block"
    layouts: ClassVar = {
        MODELOPT: Layout(),
        COMPRESSED_TENSORS: Layout(
            with_axis=True,
            compression="float-quantized",
            weights={**floats(8, "block"), "block_structure": [_SIDE, _SIDE]},
            inputs={**floats(8, "group", dynamic=True), "group_size": _SIDE},
        ),
    }
    grouped_alone = False

    def modelopt_changes(self) -> dict[str, dict[str, Any]]:
        """Return how runtimes round inputs, of which the preset says nothing."""
        return {"*input_quantizer": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: _SIDE}}}

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape has no whole blocks, or None.

        vLLM 0.32.0 demands it of columns, 0.25.1 of rows too; what is fused with another has whole blocks of its own.
        """
        if any(size % _SIDE for size in shape):
            return f"is not divisible by {_SIDE}: no whole blocks of {_SIDE} x {_SIDE}"
        return None

    def stored(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return codes and the blocks' scales, in the shape in which ModelOpt writes them."""
        rows, columns = (size // _SIDE for size in shape)
        return (
            Part(WEIGHT, self.code_dtype, tuple(shape)),
            Part(WEIGHT_SCALE, SCALE_DTYPE, (rows, 1, columns, 1)),
        )

    def config_group(self) -> dict[str, Any]:
        """Return what ModelOpt writes of an algorithm that it has no words for.

        Source: modelopt.torch.export.convert_hf_config, _quant_algo_to_group_config, its last branch.
        """
        return {"quant_algo": self.modelopt_algorithm}

    @property
    def least_amax(self) -> float:
        """See `grids.LEAST_AMAX`."""
        from bitladder.formats import grids

        return grids.LEAST_AMAX

    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return each block's largest magnitude; a block of zeros has the least that a scale can be."""
        from bitladder.formats import grids

        return grids.squares(weight.detach(), _SIDE).abs().amax((1, 3)).float().clamp_min(grids.LEAST_AMAX)

    def tensor_scales(self, amax: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Return the blocks' scales."""
        from bitladder.formats import grids

        return {WEIGHT_SCALE: grids.scale_of(amax)[:, None, :, None]}

    def made(self, part: str, weight: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the codes of these rows, of which each has a line of `amax`."""
        from bitladder.formats import grids

        assert part == WEIGHT
        return grids.quantise(weight, amax.repeat_interleave(_SIDE, 1))

    def columns(self, amax: "torch.Tensor", rows: int) -> "Columns":
        """Return codes with scales of blocks that are known before: powers of two where a device makes them so."""
        from bitladder.formats.columns import E4m3Columns, PowerColumns

        of = PowerColumns if self.arithmetic == POWERS_OF_TWO else E4m3Columns
        return of(self.rows_of(amax, 0, rows), _SIDE)

    def decode(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return code · scale."""
        from bitladder.formats import grids

        codes, scales = parts[WEIGHT], parts[WEIGHT_SCALE].float()
        values = (grids.squares(codes.float(), _SIDE) * scales).reshape(codes.shape)
        return values if dtype is None else values.to(dtype)

    def served_weight(self, parts: "Mapping[str, torch.Tensor]", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return what `decode` does; where scales are powers of two, rounded a second time."""
        from bitladder.formats import grids

        if self.arithmetic != POWERS_OF_TWO:
            return self.decode(parts, dtype)
        values = grids.fake_quantise_squares(self.decode(parts), _SIDE)
        return values if dtype is None else values.to(dtype)

    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return the input with every 128 columns of every token rounded with a scale of their own."""
        from bitladder.formats import grids

        assert scale is None
        return grids.fake_quantise_groups(x, _SIDE, powers_of_two=self.arithmetic == POWERS_OF_TWO)
