"""What the header of a safetensors file says: which tensors lie where, without reading them.

Source of the layout: the safetensors format (8 bytes little-endian header length, JSON header, data), as documented
by huggingface/safetensors.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import ModelError
from bitladder.reading import open_file, parse_json

_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
# Bits of a value. Source: safetensors' Dtype; its readers refuse a file with any other.
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are byte offsets in the file."""

    name: str
    file: str
    dtype: str  # as safetensors spells it: BF16, F16, F32, F8_E4M3, ...
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, in the order of their data.

    What safetensors' own reader would refuse is refused here.

    Raises:
        ModelError: not a safetensors file, or truncated; the message says what is wrong, and names no file.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError("header longer than the file")
            header = parse_json(file.read(length), keys_once=True)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata isn't text")
        start = 8 + length
        tensors = [_tensor(name, path.name, entry, start) for name, entry in header.items()]
    except OSError as error:
        raise ModelError(f"can't be read ({error.strerror})") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"is not a readable safetensors file ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    end = max((tensor.end for tensor in tensors), default=start)
    if end != size:
        raise ModelError(f"has {size:,} bytes, its header describes {end:,}")
    for before, tensor in zip((None, *tensors), tensors, strict=False):
        if tensor.begin != (start if before is None else before.end):
            raise ModelError(f"is not a readable safetensors file ({tensor.name} doesn't begin where another ends)")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, file: str, entry: dict[str, Any], start: int) -> TensorInfo:
    """Return what a header says of a tensor; raises ValueError, KeyError or TypeError."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name} has a size or place that is no whole number")
    if dtype not in _BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name} has another size than its shape")
    return TensorInfo(name, file, dtype, shape, start + begin, start + end)
