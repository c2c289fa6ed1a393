"""A second reader of safetensors and of E4M3, sharing nothing with the project's: what is right is decided here."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1, "I64": 8}


@dataclass(frozen=True)
class Tensor:
    """One tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> np.ndarray:
        """Return its values as float64, of its shape."""
        if self.dtype == "BF16":
            flat = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F8_E4M3":
            flat = _E4M3[np.frombuffer(self.data, np.uint8)]
        else:
            flat = np.frombuffer(self.data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[self.dtype])
        return flat.astype(np.float64).reshape(self.shape)


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


_E4M3 = np.array([_e4m3(code) for code in range(256)])


def split(path: Path) -> tuple[dict[str, Any], bytearray]:
    """Return a file's header and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def join(path: Path, header: Any, data: bytes | bytearray) -> None:
    """Write a file of a header and data, which need not fit."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of one file."""
    header, data = split(path)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), bytes(data[begin:end]))
    return found


def write(path: Path, content: dict[str, Tensor]) -> None:
    """Write tensors to one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, tensor in content.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    join(path, header, data)


def model_tensors(directory: Path, *, strict: bool) -> dict[str, Tensor]:
    """Return a model's tensors: all of the files that its index names, or of its one file.

    `strict`: each is in the file that the index says, and nowhere else; else only in one file, as all readers need it.

    Raises:
        ValueError: it isn't so.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return tensors(directory / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(set(places.values())):
        for name, tensor in tensors(directory / file).items():
            if name in found:
                raise ValueError(f"{name} is in {where[name]} and in {file}")
            found[name], where[name] = tensor, file
    if strict and where != places:
        raise ValueError("the index doesn't say where the tensors are")
    return found


def wrong_in_checkpoint(source: Path, checkpoint: Path) -> str | None:
    """Return what a checkpoint has otherwise than its source and FP8 imply; None: nothing.

    Every tensor is there; a quantised one within half a step of E4M3, all others to the bit; the configuration is the
    source's but for what tells of the quantisation; the tokenizer's and the generation's files are the source's.
    """
    original, stored = model_tensors(source, strict=False), model_tensors(checkpoint, strict=True)
    for name, tensor in original.items():
        copy = stored.get(name)
        if copy is None:
            return f"{name} is missing"
        if copy.dtype == "F8_E4M3" != tensor.dtype:
            scale = stored[name.removesuffix("weight") + "weight_scale"].values()
            wanted = tensor.values()
            if copy.shape != tensor.shape or not np.isfinite(wanted).all():
                return f"{name} was quantised though it can't be"
            error = np.abs(copy.values() * scale - wanted)
            if (error > np.abs(wanted) * 2**-3 + scale * 2**-9).any():  # compensated rounding may go a step away
                return f"{name} is a step or more from the source"
        elif (copy.dtype, copy.shape, copy.data) != (tensor.dtype, tensor.shape, tensor.data):
            return f"{name} isn't the source's"
    added = [n for n in stored if n not in original and not n.endswith(("weight_scale", "input_scale"))]
    if added:
        return f"{added[0]} isn't in the source"
    configs = [json.loads((d / "config.json").read_text(encoding="utf-8-sig")) for d in (source, checkpoint)]
    for config in configs:
        config.pop("quantization_config", None)
    if json.dumps(configs[0], sort_keys=True) != json.dumps(configs[1], sort_keys=True):
        return "config.json isn't the source's"
    for side in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        pair = [(d / side).read_bytes() if (d / side).is_file() else None for d in (source, checkpoint)]
        if pair[0] != pair[1]:
            return f"{side} isn't the source's"
    return None
