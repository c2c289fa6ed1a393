"""The number formats that a quant group can have: what a file holds of one, and what a search needs to know.

One file a format; planning, measuring, export, evaluation and verification read this table. To add one, describe it in
a file beside these and list it here, and say in each of `runtimes` what it makes of it.
"""

from bitladder.errors import RecipeError
from bitladder.formats.base import INPUT_SCALE, KV_SCALE_NAMES, SCALE_DTYPE, SCALE_NAMES, WEIGHT_SCALE, Format, Part
from bitladder.formats.fp8_channel import Fp8Channel
from bitladder.formats.fp8_tensor import Fp8Tensor
from bitladder.records import BF16, BF16_BITS, QuantGroup

__all__ = [
    "FORMATS",
    "INPUT_SCALE",
    "KV_SCALE_NAMES",
    "SCALE_DTYPE",
    "SCALE_NAMES",
    "WEIGHT_SCALE",
    "Format",
    "Part",
    "code_bits",
    "format_of_algorithm",
    "get_format",
    "group_bits",
]

FORMATS: dict[str, Format] = {one.name: one for one in (Fp8Tensor(), Fp8Channel())}


def get_format(name: str) -> Format:
    """Return the format called `name`.

    Raises:
        RecipeError: no such format.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; known: {', '.join(FORMATS)} (and {BF16}, which is always there)")
    return FORMATS[name]


def format_of_algorithm(algorithm: str) -> Format | None:
    """Return the format that ModelOpt's files call `algorithm`; None: none of ours."""
    return next((one for one in FORMATS.values() if one.modelopt_algorithm == algorithm), None)


def code_bits(name: str) -> int:
    """Return the bits of a weight's element without scales in a format, `bf16` included."""
    return BF16_BITS if name == BF16 else get_format(name).code_bits


def group_bits(group: QuantGroup, name: str) -> int:
    """Return the bits of a group's weights in a format, `bf16` included.

    Where only a published manifest is known, shapes are not: scales that grow with a weight can't be counted then.

    Raises:
        RecipeError: no such format.
    """
    if name == BF16:
        return group.weight_elements * BF16_BITS
    format_ = get_format(name)
    shapes = [module.shape for module in group.modules if module.shape is not None]
    if len(shapes) < len(group.modules):
        return group.weight_elements * format_.code_bits
    return sum(format_.bits(shape) for shape in shapes)
