"""Four-bit integers in groups of 128 or 64, inputs in 16 bits: `int4_w4a16` and `int4_w4a16_g64`. See `int_groups`.

Source: compressed_tensors 0.20.0, quantization/quant_scheme.py (W4A16); vLLM's CompressedTensorsWNA16.
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
