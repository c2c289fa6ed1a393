"""What the header of a safetensors file says: which tensors lie where, without reading them.

Source of the layout: the safetensors format (8 bytes little-endian header length, JSON header, data), as documented
by huggingface/safetensors.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


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

    Raises:
        ModelError: not a safetensors file, or truncated; the message says what is wrong, and names no file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = [
            TensorInfo(
                name, path.name, entry["dtype"], tuple(entry["shape"]), *(start + o for o in entry["data_offsets"])
            )
            for name, entry in header.items()
        ]
        for tensor in tensors:
            if tensor.dtype in _BYTES and tensor.end - tensor.begin != math.prod(tensor.shape) * _BYTES[tensor.dtype]:
                raise ValueError(f"{tensor.name} has another size than its shape")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"is not a readable safetensors file ({error})") from error
    tensors.sort(key=lambda tensor: tensor.begin)
    end = max((tensor.end for tensor in tensors), default=start)
    if end != size:
        raise ModelError(f"has {size:,} bytes, its header describes {end:,}")
    return {tensor.name: tensor for tensor in tensors}
