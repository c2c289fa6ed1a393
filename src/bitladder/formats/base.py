"""What a number format has to say: how a weight and an input of it are stored, scaled, restored and rounded."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"  # parts of a module, as ModelOpt's files name them
# What files of any format may have beside a weight's codes; ours know the first and the last.
SCALE_NAMES = (WEIGHT_SCALE, "weight_scale_2", "weight_scale_inv", INPUT_SCALE)
KV_SCALE_NAMES = ("k_scale", "v_scale")  # of an attention that caches keys and values
SCALE_DTYPE = "F32"  # as safetensors spells it


@dataclass(frozen=True)
class Part:
    """One tensor that a quantised module has beside its weight's codes; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """What it takes on disk."""
        return 32 * math.prod(self.shape)  # every part is F32


class Format(ABC):
    """One format of a linear module's weight [out_features, in_features] and of its input.

    A weight's amax is what its scale is made of, in the shape that the format scales by: a scalar, or [out_features].
    Codes of a weight are of its shape, one byte each. Pure at import; torch inside methods.
    """

    name: ClassVar[str]
    modelopt_config: ClassVar[str]  # ModelOpt's configuration, an attribute of modelopt.torch.quantization
    modelopt_algorithm: ClassVar[str]  # `quant_algo` in hf_quant_config.json
    code_dtype: ClassVar[str] = "F8_E4M3"  # of a stored weight, as safetensors spells it
    code_bits: ClassVar[int] = 8
    channels: ClassVar[bool]  # whether every row of a weight has a scale of its own
    dynamic_input: ClassVar[bool]  # whether an input's scale is made when it is seen, so that no file has it

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return what is stored beside the codes of a weight of this shape."""
        weight = Part(WEIGHT_SCALE, SCALE_DTYPE, (shape[0],) if self.channels else ())
        return (weight,) if self.dynamic_input else (weight, Part(INPUT_SCALE, SCALE_DTYPE, ()))

    def bits(self, shape: Sequence[int]) -> int:
        """Return the bits of a weight: its codes, and scales that grow with it (a tensor's two numbers don't)."""
        return self.code_bits * math.prod(shape) + sum(part.bits for part in self.parts(shape) if part.shape)

    @property
    def tensor_scale_bytes(self) -> int:
        """Bytes of a module's scales that don't grow with its weight, which `bits` leaves out."""
        return sum(part.bits for part in self.parts((1, 1)) if not part.shape) // 8

    def config_group(self) -> dict[str, Any]:
        """Return what `config_groups` say of weights and inputs, in ModelOpt's words.

        Source: modelopt.torch.export.convert_hf_config, _quant_algo_to_group_config.
        """
        inputs = {"dynamic": False, "num_bits": self.code_bits, "type": "float"}
        return {
            "input_activations": inputs,
            "weights": {**inputs, **({"strategy": "channel"} if self.channels else {})},
        }

    def uniform_config_group(self) -> dict[str, Any] | None:
        """Return the same for a checkpoint of this format alone; None: ModelOpt writes none."""
        return self.config_group()

    def weight_key(self, module: str) -> str:
        """Return the name of a module's weight amax in this format among a measurement's tensors."""
        return f"{module}.row_amax" if self.channels else f"{module}.weight_amax"

    @abstractmethod
    def amax_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Return the amax of a weight [out_features, in_features] that its scale is made of."""

    @abstractmethod
    def scale(self, amax: "torch.Tensor") -> "torch.Tensor":
        """Return a scale, the multiplier that restores a value from its code: float32, of the shape of `amax`."""

    @abstractmethod
    def codes(self, values: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        """Return the codes of a weight, or of some of its columns where `values` is [out_features]."""

    @abstractmethod
    def restored(
        self, codes: "torch.Tensor", scale: "torch.Tensor", dtype: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Return code · scale, multiplied in float32 and cast to `dtype` (None: float32)."""

    @abstractmethod
    def round_input(self, x: "torch.Tensor", scale: "torch.Tensor | None") -> "torch.Tensor":
        """Return an input [..., in_features] rounded through the format, in its own dtype.

        Args:
            x: the input.
            scale: the stored one; None where the format has none.
        """
