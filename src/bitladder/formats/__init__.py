"""The number formats that a quant group can have: what a file holds of one, and what a search needs to know.

One file a format; planning, measuring, export, evaluation and verification read this table. To add one, describe it in
a file beside these and list it here, and say in each of `runtimes` what it makes of it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bitladder.errors import RecipeError
from bitladder.formats.base import (
    AS_STORED,
    INPUT_SCALE,
    KV_SCALE_NAMES,
    KV_SKIPS,
    POWERS_OF_TWO,
    SCALE_DTYPE,
    SCALE_NAMES,
    WEIGHT,
    WEIGHT_ONLY,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    WEIGHT_ZERO_POINT,
    Arithmetic,
    Format,
    Part,
    Spread,
)
from bitladder.formats.carriers import CARRIERS, COMPRESSED_TENSORS, GLOBAL_SCALES, MODELOPT, WEIGHT_PACKED, Layout
from bitladder.formats.fp8_block import Fp8Block
from bitladder.formats.fp8_channel import Fp8Channel
from bitladder.formats.fp8_tensor import Fp8Tensor
from bitladder.formats.int4_w4a16 import Int4W4a16, Int4W4a16Asym, Int4W4a16AsymGroup64, Int4W4a16Group64
from bitladder.formats.int8 import Int8
from bitladder.formats.int8_w8a16 import Int8W8a16, Int8W8a16Group64
from bitladder.formats.mxfp8 import Mxfp8
from bitladder.formats.nvfp4 import Nvfp4
from bitladder.formats.nvfp4_w4a16 import Nvfp4W4a16
from bitladder.records import BF16, BF16_BITS, QuantGroup

__all__ = [
    "AS_STORED",
    "CARRIED_SCALES",
    "CARRIERS",
    "CODE_NAMES",
    "COMPRESSED_TENSORS",
    "FORMATS",
    "GLOBAL_SCALES",
    "INPUT_SCALE",
    "KV_SCALE_NAMES",
    "KV_SKIPS",
    "MODELOPT",
    "POWERS_OF_TWO",
    "SCALE_DTYPE",
    "SCALE_NAMES",
    "WEIGHT",
    "WEIGHT_ONLY",
    "WEIGHT_PACKED",
    "WEIGHT_SCALE",
    "WEIGHT_SCALE_2",
    "WEIGHT_ZERO_POINT",
    "Arithmetic",
    "Format",
    "Layout",
    "Part",
    "Spread",
    "carriers_of",
    "format_of_algorithm",
    "format_of_group",
    "get_format",
    "group_bits",
    "in_order",
    "least_bits",
    "why_no_shapes",
    "why_not",
]

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Fp8Tensor(),
        Fp8Channel(),
        Fp8Block(),
        Mxfp8(),
        Nvfp4(),
        Nvfp4W4a16(),
        Int8(),
        Int8W8a16(),
        Int8W8a16Group64(),
        Int4W4a16(),
        Int4W4a16Group64(),
        Int4W4a16Asym(),
        Int4W4a16AsymGroup64(),
    )
}


# What files of any carrier may have beside a weight's codes.
CARRIED_SCALES = frozenset(SCALE_NAMES) | {
    layout.name(part) for one in FORMATS.values() for layout in one.layouts.values() for part in one.scale_names
}
# What files of any carrier may call a weight or its codes.
CODE_NAMES = frozenset(layout.name(WEIGHT) for one in FORMATS.values() for layout in one.layouts.values())


def get_format(name: str, arithmetic: Mapping[str, Arithmetic] = MappingProxyType({})) -> Format:
    """Return the format called `name`.

    Args:
        name: of one of `FORMATS`.
        arithmetic: format -> how the device that will serve computes it, where that isn't as it is stored.

    Raises:
        RecipeError: no such format.
    """
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; known: {', '.join(FORMATS)} (and {BF16}, which is always there)")
    return FORMATS[name].on(arithmetic.get(name, AS_STORED))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return formats in the order of `FORMATS`, whatever order they are listed in; unknown ones last."""
    places = {name: place for place, name in enumerate(FORMATS)}
    return tuple(sorted(names, key=lambda name: places.get(name, len(places))))


def format_of_algorithm(algorithm: str) -> Format | None:
    """Return the format that ModelOpt's files call `algorithm`, in whatever case; None: none of ours."""
    held = (one for one in FORMATS.values() if MODELOPT in one.layouts)
    return next((one for one in held if one.modelopt_algorithm.upper() == algorithm.upper()), None)


def format_of_group(group: Mapping[str, Any]) -> Format | None:
    """Return the format that an entry of compressed-tensors' `config_groups` describes; None: none of ours."""
    layouts = ((one, one.layouts.get(COMPRESSED_TENSORS)) for one in FORMATS.values())
    return next((one for one, layout in layouts if layout is not None and layout.holds(group)), None)


def carriers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the carriers whose checkpoints can hold all of these formats together (`bf16` is no matter)."""
    wanted = set(names) - {BF16}
    return tuple(carrier for carrier in CARRIERS if all(carrier in get_format(name).layouts for name in wanted))


def why_not(group: QuantGroup, name: str) -> str | None:
    """Return why a group can't have a format, `bf16` included; None: it can.

    Raises:
        RecipeError: no such format.
    """
    if name == BF16:
        return None
    return why_no_shapes({m.name: m.shape for m in group.modules if m.shape is not None}, name)


def why_no_shapes(shapes: Mapping[str, Sequence[int]], name: str) -> str | None:
    """Return why modules of these shapes can't have a format other than `bf16`; None: they can.

    The message names the format most like it that takes all of them, if there is one.
    """
    for module, shape in shapes.items():
        reason = get_format(name).why_not(shape)
        if reason is not None:
            other = most_like(shapes.values(), get_format(name))
            return f"shape {list(shape)} of {module} {reason}{'' if other is None else f' ({other.name} fits)'}"
    return None


def most_like(shapes: Collection[Sequence[int]], wanted: Format) -> Format | None:
    """Return the format most like one that takes all of these shapes, or None.

    It has as many bits a code, and rounds inputs or leaves them in 16 bits as that does.
    """

    def kind(one: Format) -> tuple[object, ...]:
        return one.code_bits, one.input == "unrounded"

    def unlike(one: Format) -> tuple[object, ...]:
        """Codes decide first, then inputs, then how many bits scales take."""
        return (
            one.code_dtype != wanted.code_dtype,
            one.zero_points != wanted.zero_points,
            one.has_input_scale != wanted.has_input_scale,
            abs(one.least_bits - wanted.least_bits),
        )

    alike = sorted((one for one in FORMATS.values() if kind(one) == kind(wanted)), key=unlike)
    return next((one for one in alike if all(one.why_not(shape) is None for shape in shapes)), None)


def least_bits(name: str) -> float:
    """Return the fewest bits that a weight's element takes in a format, `bf16` included; see `Format.least_bits`."""
    return BF16_BITS if name == BF16 else get_format(name).least_bits


def group_bits(group: QuantGroup, name: str) -> int:
    """Return the bits of a group's weights in a format, `bf16` included.

    Where only a published manifest is known, shapes are not: scales of rows can't be counted then.

    Raises:
        RecipeError: no such format.
    """
    if name == BF16:
        return group.weight_elements * BF16_BITS
    format_ = get_format(name)
    shapes = [module.shape for module in group.modules if module.shape is not None]
    if len(shapes) < len(group.modules):
        return int(group.weight_elements * format_.least_bits)
    return sum(format_.bits(shape) for shape in shapes)
