"""Four-bit integers in groups of 128 or 64, inputs in 16 bits. See `int_groups`.

`int4_w4a16` and `int4_w4a16_g64` are symmetric, `int4_w4a16_asym` and `int4_w4a16_asym_g64` have a zero point a group.

Source: compressed_tensors 0.20.0, quantization/quant_scheme.py (W4A16, W4A16_ASYM); vLLM's CompressedTensorsWNA16.
"""

from typing import ClassVar

from bitladder.formats.carriers import COMPRESSED_TENSORS
from bitladder.formats.int_groups import IntGroups, packed_layout


class Int4W4a16(IntGroups):
    """See the module."""

    name = "int4_w4a16"
    title = "INT4 in groups of 128, inputs in 16 bits"
    code_bits = 4
    codes_a_number = 8
    group_size = 128
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(4, 128)}


class Int4W4a16Group64(Int4W4a16):
    """The same in groups of 64: of models whose widths 128 doesn't divide."""

    name = "int4_w4a16_g64"
    title = "INT4 in groups of 64, inputs in 16 bits"
    group_size = 64
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(4, 64)}


class Int4W4a16Asym(Int4W4a16):
    """With a zero point a group, so that all codes are of use where values lie more on one side of 0."""

    name = "int4_w4a16_asym"
    title = "INT4 with a zero point in groups of 128, inputs in 16 bits"
    zero_points = True
    rows = 8  # have their zero points in one number
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(4, 128, symmetric=False)}


class Int4W4a16AsymGroup64(Int4W4a16Asym):
    """The same in groups of 64."""

    name = "int4_w4a16_asym_g64"
    title = "INT4 with a zero point in groups of 64, inputs in 16 bits"
    group_size = 64
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(4, 64, symmetric=False)}
