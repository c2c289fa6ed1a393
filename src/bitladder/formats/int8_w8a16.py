"""Eight-bit integers in groups of 128 or 64, inputs in 16 bits: `int8_w8a16` and `int8_w8a16_g64`. See `int_groups`.

Source: compressed_tensors 0.20.0, quantization/quant_scheme.py (W8A16); vLLM's CompressedTensorsWNA16.
"""

from typing import ClassVar

from bitladder.formats.carriers import COMPRESSED_TENSORS
from bitladder.formats.int_groups import IntGroups, packed_layout


class Int8W8a16(IntGroups):
    """See the module."""

    name = "int8_w8a16"
    title = "INT8 in groups of 128, inputs in 16 bits"
    code_bits = 8
    codes_a_number = 4
    group_size = 128
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(8, 128)}


class Int8W8a16Group64(Int8W8a16):
    """The same in groups of 64: of models whose widths 128 doesn't divide."""

    name = "int8_w8a16_g64"
    title = "INT8 in groups of 64, inputs in 16 bits"
    group_size = 64
    layouts: ClassVar = {COMPRESSED_TENSORS: packed_layout(8, 64)}
