"""The number formats that a quant group can have: what a runtime reads, and what a search needs to know.

One entry a format: a per-tensor scale for weight and input, and codes of whole bytes. To add one, describe it here;
planning, search, export and verification read this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitladder.errors import RecipeError
from bitladder.records import BF16, BF16_BITS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One format of a linear module's weight and input."""

    name: str
    bits: int  # per weight element, without scales
    scale_bytes: int  # per module, on disk
    modelopt_config: str  # the name of ModelOpt's configuration, an attribute of modelopt.torch.quantization
    modelopt_algorithm: str  # `quant_algo` in hf_quant_config.json
    code_dtype: str  # of a stored weight, as safetensors spells it; one code an element
    codes: "Callable[[Tensor, Tensor], Tensor]"  # (rows of a weight [rows, in_features], weight amax) -> codes
    scale: "Callable[[Tensor], Tensor]"  # amax -> what is stored as weight_scale or input_scale: a float32 scalar


def _e4m3_codes(weight: "Tensor", amax: "Tensor") -> "Tensor":
    from bitladder.formats import grids

    return grids.quantise(weight, amax)


def _e4m3_scale(amax: "Tensor") -> "Tensor":
    from bitladder.formats import grids

    return grids.scale_of(amax)


FP8 = Format(
    name="fp8",
    bits=8,
    scale_bytes=8,
    modelopt_config="FP8_DEFAULT_CFG",
    modelopt_algorithm="FP8",
    code_dtype="F8_E4M3",
    codes=_e4m3_codes,
    scale=_e4m3_scale,
)
FORMATS: dict[str, Format] = {FP8.name: FP8}


def get_format(name: str) -> Format:
    """Return the format called `name`.

    Raises:
        RecipeError: no such format.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; known: {', '.join(FORMATS)} (and {BF16}, which is always there)")
    return FORMATS[name]


def bits_of(name: str) -> int:
    """Return the bits per weight element of a format, `bf16` included."""
    return BF16_BITS if name == BF16 else get_format(name).bits
