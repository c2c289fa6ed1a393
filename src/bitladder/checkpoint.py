"""Writes one Hugging Face checkpoint per scheme, as ModelOpt's FP8 export would: `export(...) -> CheckpointManifest`.

The source is read and written in blocks of rows, so that host memory stays the same whatever the model's size. What a
scheme leaves alone is copied byte for byte under the source's names; a quantised weight becomes E4M3 codes with two
float32 scalars. A directory appears under its name only when it is complete.

Layout of a file: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, data ordered by
dtype size (largest first) and name, which keeps every tensor aligned; so does safetensors' own writer.
"""

import hashlib
import io
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from bitladder import numerics
from bitladder.errors import MeasurementError, ModelError, OutputError, StaleRecord
from bitladder.formats import Format, get_format
from bitladder.headers import TensorInfo
from bitladder.models.sources import side_files
from bitladder.reading import open_file, read_bytes
from bitladder.records import (
    BF16,
    CheckpointManifest,
    FileDigest,
    KvScale,
    Measurement,
    ModuleRecord,
    QuantModule,
    Scheme,
)
from bitladder.runinfo import Progress, no_progress, one_core_each
from bitladder.sensitivity import Amax, Codes, check_codes, kv_amax
from bitladder.storage import atomic_directory, sha256_of_file, temporary_of
from bitladder.weights import INDEX_FILE, WeightFiles, read_config

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
_BLOCK_BYTES = 1 << 22
_CORES_PER_EXPORT = 4
_QUEUED_BLOCKS = 4  # so many blocks may wait to be hashed and written: 16 MiB
_CODED_ELEMENTS = 1 << 18  # of a weight are made into codes at a time: 1 MiB in float32, which a cache holds
# The ModelOpt release whose file layout is written; runtimes look at the producer's name and version.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_KV_ALGORITHM = "FP8"  # the one format of a KV cache, as `kv_cache_quant_algo` names it
_TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}

Quantised = Mapping[str, tuple[QuantModule, str]]  # tensor name of a quantised weight -> (module, format)


@dataclass(frozen=True)
class _Entry:
    """One tensor of an output file: a source tensor's bytes, what is made of a source weight, or what is given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    content: TensorInfo | torch.Tensor | Callable[[], torch.Tensor]  # the last: read when it is written
    make: Callable[[torch.Tensor], torch.Tensor] | None = None  # from the source weight; None: its bytes as they are


def quant_config(scheme: Scheme) -> dict[str, Any]:
    """Return `hf_quant_config.json` for a scheme, in ModelOpt's form: `exclude_modules` are exact names."""
    return {
        "producer": dict(_PRODUCER),
        "quantization": {
            "quant_algo": _algorithm(scheme),
            "kv_cache_quant_algo": None if scheme.kv_cache_format is None else _KV_ALGORITHM,
            "exclude_modules": list(scheme.exclude_modules),
        },
    }


def _algorithm(scheme: Scheme) -> str:
    """Return ModelOpt's name for a scheme's one format beside bf16."""
    names = sorted({name for name in scheme.formats.values() if name != BF16})
    if len(names) != 1:
        raise MeasurementError(
            f"scheme {scheme.name} has {len(names)} formats beside {BF16} ({', '.join(names) or 'none'}); "
            "a checkpoint of one such format can be written"
        )
    return get_format(names[0]).modelopt_algorithm


def config_with_quantisation(config: dict[str, Any], scheme: Scheme) -> dict[str, Any]:
    """Return the source's config.json with the `quantization_config` that vLLM and transformers read."""
    eight_bit = {"dynamic": False, "num_bits": 8, "type": "float"}
    quantisation: dict[str, Any] = {
        "config_groups": {
            "group_0": {
                "input_activations": dict(eight_bit),
                "weights": dict(eight_bit),
                "targets": ["Linear"],
            }
        },
        "ignore": list(scheme.exclude_modules),
        "quant_algo": _algorithm(scheme),
        "producer": dict(_PRODUCER),
        "quant_method": "modelopt",
    }
    if scheme.kv_cache_format is not None:
        quantisation["kv_cache_scheme"] = dict(eight_bit)
    return {**config, "quantization_config": quantisation}


def _quantised_modules(scheme: Scheme, measurement: Measurement) -> Quantised:
    """Return `{tensor name of a quantised weight: (module, format)}`."""
    table = {}
    for group in measurement.groups:
        name = scheme.formats.get(group.name)
        if name is None:
            raise StaleRecord(f"scheme {scheme.name} doesn't know the group {group.name}; plan again")
        if name == BF16:
            continue
        for module in group.modules:
            if module.tensor is None:
                raise MeasurementError(
                    f"the measurement doesn't say where {module.name} lies in the model's files: it was imported from "
                    "a manifest, which is good for planning, not for export; run `bitladder measure` on the model"
                )
            table[module.tensor] = (module, name)
    return table


def _entries(
    weights: WeightFiles,
    file: str,
    quantised: Quantised,
    amax: Amax,
    kv_scales: Mapping[str, torch.Tensor],
    codes: Codes | None,
) -> list[_Entry]:
    """Return the tensors of one output file, in the order of their data."""
    entries = []
    for info in weights.tensors.values():
        if info.file != file:
            continue
        prefix = info.name.removesuffix(".weight")
        for name in (f"{prefix}.k_scale", f"{prefix}.v_scale"):
            if name in kv_scales:
                entries.append(_Entry(name, "F32", (), 4, kv_scales[name]))
        if info.name not in quantised:
            entries.append(_Entry(info.name, info.dtype, info.shape, info.end - info.begin, info))
            continue
        module, name = quantised[info.name]
        format_ = get_format(name)
        weight_amax, input_amax = amax[f"{module.name}.weight_amax"], amax[f"{module.name}.input_amax"]
        entries += [
            _Entry(
                info.name,
                format_.code_dtype,
                info.shape,
                math.prod(info.shape),
                info if codes is None else partial(codes.read, module.name),
                partial(_codes, format_, weight_amax) if codes is None else None,
            ),
            _Entry(f"{prefix}.weight_scale", "F32", (), 4, format_.scale(weight_amax)),
            _Entry(f"{prefix}.input_scale", "F32", (), 4, format_.scale(input_amax)),
        ]
    entries.sort(key=lambda entry: (-_DTYPE_BYTES.get(entry.dtype, 1), entry.name))
    return entries


def _codes(format_: Format, amax: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return format_.codes(weight, amax)


def _header(entries: Sequence[_Entry]) -> bytes:
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


def _write_weights(weights: WeightFiles, file: str, entries: Sequence[_Entry], destination: Path) -> FileDigest:
    """Write one weight file and return its digest."""
    with open_file(weights.directory / file) as source, _HashedFile(destination / file) as output:
        output.write(np.frombuffer(_header(entries), np.uint8))
        for entry in entries:
            if isinstance(entry.content, torch.Tensor):
                output.write(_bytes(entry.content))
            elif not isinstance(entry.content, TensorInfo):
                output.write(_bytes(entry.content()))
            elif entry.make is None:
                for block in _read(source, entry.content, _BLOCK_BYTES):
                    output.write(block)
            else:
                info = entry.content
                columns = info.shape[1]
                rows = max(1, _CODED_ELEMENTS // columns)
                for block in _read(source, info, rows * columns * _DTYPE_BYTES[info.dtype]):
                    weight = torch.from_numpy(block).view(_TORCH_DTYPE[info.dtype]).view(-1, columns)
                    output.write(_bytes(entry.make(weight)))
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


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(directory: Path, name: str) -> FileDigest:
    path = directory / name
    return FileDigest(name=name, bytes=path.stat().st_size, sha256=sha256_of_file(path))


def _check_destination(destination: Path) -> None:
    """Refuse to replace something that isn't a checkpoint of ours."""
    if destination.exists() and not destination.is_dir():
        raise OutputError(f"{destination} is a file; choose another output directory")
    ours = (destination / CheckpointManifest.FILE_NAME).exists()
    if destination.is_dir() and any(destination.iterdir()) and not ours:
        raise OutputError(
            f"{destination} holds something that Bitladder didn't write; move it away or choose another output"
        )


def export(
    scheme: Scheme,
    measurement: Measurement,
    amax: Amax,
    source: Path,
    destination: Path,
    progress: Progress = no_progress,
    codes: Codes | None = None,
) -> CheckpointManifest:
    """Write the checkpoint of one scheme to `destination`.

    Args:
        scheme: what is quantised.
        measurement: the one that the scheme was planned from.
        amax: its amax values (`sensitivity.read_amax`), shared within fused groups.
        source: the original model's directory.
        destination: a directory that doesn't exist, is empty, or holds an earlier checkpoint of ours.
        progress: told of every file.
        codes: the measurement's, where they are not the nearest ones (`sensitivity.read_codes`).

    Raises:
        StaleRecord: the scheme belongs to another measurement. MeasurementError: not exportable.
        ModelError: damaged source. OutputError: no space, or something else is there.
    """
    if scheme.measurement_sha256 != measurement.fingerprint():
        raise StaleRecord(f"scheme {scheme.name} was planned from another measurement; plan again")
    check_codes(measurement, codes)
    _check_destination(destination)
    quantised = _quantised_modules(scheme, measurement)
    kv_scales: dict[str, torch.Tensor] = {}
    if scheme.kv_cache_format is not None:
        kv_scales = {name: numerics.scale_of(value) for name, value in kv_amax(measurement, amax).items()}
    weights = WeightFiles.open(source)
    lost = sorted(set(quantised) - set(weights.tensors))
    if lost:
        raise StaleRecord(f"{source} has no tensor {lost[0]}, which was measured; it is another model: measure again")
    with atomic_directory(destination) as temporary:
        files = []
        table: dict[str, _Entry] = {}
        placed: dict[str, str] = {}
        for index, file in enumerate(weights.files):
            progress(f"export {scheme.name}", index, len(weights.files))
            entries = _entries(weights, file, quantised, amax, kv_scales, codes)
            files.append(_write_weights(weights, file, entries, temporary))
            placed.update(dict.fromkeys((entry.name for entry in entries), file))
            table.update((entry.name, entry) for entry in entries)
        progress(f"export {scheme.name}", len(weights.files), len(weights.files))
        if (source / INDEX_FILE).exists():
            total = sum(entry.bytes for entry in table.values())
            index_content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            _write_file(temporary / INDEX_FILE, json.dumps(index_content, indent=2).encode() + b"\n")
            files.append(_digest(temporary, INDEX_FILE))
        config = config_with_quantisation(read_config(source), scheme)
        _write_file(temporary / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
        _write_file(temporary / QUANT_CONFIG_FILE, json.dumps(quant_config(scheme), indent=4).encode() + b"\n")
        for name in side_files(source):
            _write_file(temporary / name, read_bytes(source / name))
        files += [_digest(temporary, name) for name in (CONFIG_FILE, QUANT_CONFIG_FILE, *side_files(source))]
        manifest = CheckpointManifest(
            scheme=scheme.name,
            scheme_sha256=scheme.fingerprint(),
            measurement_sha256=scheme.measurement_sha256,
            source_sha256=measurement.model.sha256,
            files=tuple(sorted(files, key=lambda entry: entry.name)),
            modules=tuple(_module_records(quantised, amax, "nearest" if codes is None else "compensated")),
            kv_cache_format=scheme.kv_cache_format,
            kv_scales=tuple(KvScale(tensor=name, scale=float(value)) for name, value in kv_scales.items()),
        )
        manifest.write(temporary / CheckpointManifest.FILE_NAME)
    return manifest


def export_all(
    schemes: Sequence[Scheme],
    measurement: Measurement,
    amax: Amax,
    source: Path,
    directories: Mapping[str, Path],
    progress: Progress = no_progress,
    codes: Codes | None = None,
) -> dict[str, CheckpointManifest]:
    """Write the checkpoints of several schemes, `{scheme name: directory}`; at once where there are cores for it.

    Hashing and writing one checkpoint keeps two to three threads busy.

    Raises:
        BitladderError: see `export`; what other schemes have finished stays.
    """

    def write(scheme: Scheme) -> CheckpointManifest:
        return export(scheme, measurement, amax, source, directories[scheme.name], progress, codes)

    at_once = max(1, min(len(schemes), len(os.sched_getaffinity(0)) // _CORES_PER_EXPORT))
    with one_core_each(at_once) as pool:
        return {scheme.name: manifest for scheme, manifest in zip(schemes, pool.map(write, schemes), strict=True)}


def _module_records(
    quantised: Quantised, amax: Amax, rounding: Literal["nearest", "compensated"]
) -> Iterator[ModuleRecord]:
    for tensor, (module, name) in quantised.items():
        format_ = get_format(name)
        yield ModuleRecord(
            name=module.name,
            tensor=tensor,
            format=name,
            dtype=format_.code_dtype,
            weight_scale=float(format_.scale(amax[f"{module.name}.weight_amax"])),
            input_scale=float(format_.scale(amax[f"{module.name}.input_amax"])),
            rounding=rounding,
        )


def share_equal_files(directories: Sequence[Path]) -> int:
    """Make files that are equal between the checkpoints in `directories` hard links; return the bytes saved.

    Only files that the manifests list with the same size and SHA-256 are linked.

    Raises:
        OutputError: the file system has no hard links.
    """
    first: dict[tuple[int, str], Path] = {}
    saved = 0
    for directory in directories:
        for entry in CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME).files:
            path = directory / entry.name
            twin = first.setdefault((entry.bytes, entry.sha256), path)
            if twin == path or os.path.samefile(twin, path):
                continue
            temporary = temporary_of(directory)
            try:
                os.link(twin, temporary)
            except OSError as error:
                raise OutputError(
                    f"{path.parent} can't hold hard links ({error.strerror}); set export.share_files: false"
                ) from error
            os.replace(temporary, path)
            saved += entry.bytes
    return saved
