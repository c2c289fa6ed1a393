"""Safetensors files written block by block, with their digests."""

import hashlib
import io
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from bitladder.errors import ModelError
from bitladder.models.headers import TensorInfo
from bitladder.models.weights import WeightFiles
from bitladder.reading import open_file
from bitladder.records import FileDigest
from bitladder.storage import sha256_of_file

_BLOCK_BYTES = 1 << 22
_QUEUED_BLOCKS = 4  # so many blocks may wait to be hashed and written: 16 MiB
_CODED_ELEMENTS = 1 << 18  # of a weight are made into codes at a time: 1 MiB in float32, which a cache holds
_TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file: a source tensor's bytes, what is made of a source weight, or what is given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    content: TensorInfo | torch.Tensor | Callable[[], torch.Tensor]  # the last: read when it is written
    make: Callable[[torch.Tensor, int], torch.Tensor] | None = None  # from rows of the source weight, and the first
    # one's number; None: its bytes as they are
    digest: Any = None  # of hashlib, to be fed with the bytes that are made or read; None: nobody asks
    rows: int = 1  # `make` takes a multiple of them


def _header(entries: Sequence[Entry]) -> bytes:
    """Return the file's first bytes: length and JSON header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _HashedFile:
    """A file that is written and hashed in two threads of its own, while the caller makes what comes next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)  # nothing that exists is ever opened
        self._digest = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        # Buffers that are used in turn: freeing blocks in another thread than made them fragments the heap.
        self._buffers = deque(np.empty(_BLOCK_BYTES, np.uint8) for _ in range(_QUEUED_BLOCKS))
        self._filled = 0  # bytes in the first of them, which is being filled
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        self._file.close()

    def write(self, data: np.ndarray) -> None:
        """Queue bytes, which may change afterwards; raises what an earlier write raised."""
        while len(data):
            if not self._filled and len(self._pending) == len(self._buffers):
                self._wait()
            part = data[: _BLOCK_BYTES - self._filled]
            self._buffers[0][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == _BLOCK_BYTES:
                self._submit()

    def _submit(self) -> None:
        """Hand the buffer being filled to both threads, and go on with the next one."""
        block = self._buffers[0][: self._filled].data
        self._buffers.rotate(-1)
        self._filled = 0
        self._pending.append((self._hasher.submit(self._digest.update, block), self._writer.submit(self._write, block)))

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def _write(self, block: memoryview) -> None:
        while len(block):
            block = block[self._file.write(block) :]

    def finish(self) -> FileDigest:
        """Wait for everything, flush to the disk, and return the file's digest."""
        self._submit()
        while self._pending:
            self._wait()
        os.fsync(self._file.fileno())
        return FileDigest(name=self.path.name, bytes=self.path.stat().st_size, sha256=self._digest.hexdigest())


def write_weights(weights: WeightFiles, file: str, entries: Sequence[Entry], destination: Path) -> FileDigest:
    """Write one weight file and return its digest."""
    with open_file(weights.directory / file) as source, _HashedFile(destination / file) as output:
        output.write(np.frombuffer(_header(entries), np.uint8))
        for entry in entries:
            if isinstance(entry.content, torch.Tensor):
                output.write(_bytes(entry.content))
            elif not isinstance(entry.content, TensorInfo):
                given = _bytes(entry.content())
                if entry.digest is not None:
                    entry.digest.update(given)
                output.write(given)
            elif entry.make is None:
                for block in _read(source, entry.content, _BLOCK_BYTES):
                    output.write(block)
            else:
                info = entry.content
                columns = info.shape[1]
                rows, first = max(1, _CODED_ELEMENTS // columns // entry.rows) * entry.rows, 0
                for block in _read(source, info, rows * columns * DTYPE_BYTES[info.dtype]):
                    weight = torch.from_numpy(block).view(_TORCH_DTYPE[info.dtype]).view(-1, columns)
                    made = _bytes(entry.make(weight, first))
                    if entry.digest is not None:
                        entry.digest.update(made)
                    output.write(made)
                    first += len(weight)
        return output.finish()


def _read(source: io.BufferedReader, info: TensorInfo, block_bytes: int) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in blocks; each is good until the next one is asked for."""
    buffer = np.empty(min(block_bytes, info.end - info.begin), np.uint8)
    source.seek(info.begin)
    for start in range(info.begin, info.end, block_bytes):
        block = buffer[: info.end - start]
        filled = 0
        while filled < len(block):
            count = source.readinto(block[filled:].data)
            if not count:
                raise ModelError(f"{info.file} ended inside the tensor {info.name}; it changed while it was read")
            filled += count
        yield block


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    data: np.ndarray = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write a file that isn't there yet, and its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def digest_of_file(directory: Path, name: str) -> FileDigest:
    """Return name, size and SHA-256 of a file of `directory`."""
    path = directory / name
    return FileDigest(name=name, bytes=path.stat().st_size, sha256=sha256_of_file(path))
