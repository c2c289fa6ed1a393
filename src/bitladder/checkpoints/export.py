"""Writes one Hugging Face checkpoint per scheme, as its carrier has it: `export(...) -> CheckpointManifest`.

The source is read and written in blocks of rows, so that host memory stays the same whatever the model's size. What a
scheme leaves alone is copied byte for byte under the source's names; a quantised weight becomes the codes of
its format, with its scales beside it. A directory appears under its name only when it is complete.

Layout of a file: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, data ordered by
dtype size (largest first) and name, which keeps every tensor aligned; so does safetensors' own writer.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitladder.checkpoints.config import CONFIG_FILE, QUANT_CONFIG_FILE, config_with_quantisation, quant_config
from bitladder.checkpoints.config_groups import quantisation_config
from bitladder.checkpoints.writer import DTYPE_BYTES, Entry, digest_of_file, write_file, write_weights
from bitladder.errors import MeasurementError, OutputError, StaleRecord
from bitladder.formats import (
    INPUT_SCALE,
    MODELOPT,
    WEIGHT,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    WEIGHT_ZERO_POINT,
    Format,
    get_format,
    grids,
)
from bitladder.measured import Amax, Codes, check_codes, kv_amax
from bitladder.models.headers import TensorInfo
from bitladder.models.sources import side_files
from bitladder.models.weights import INDEX_FILE, WeightFiles, read_config
from bitladder.planning.carrying import check_carrier
from bitladder.reading import read_bytes
from bitladder.records import BF16, CheckpointManifest, KvScale, Measurement, ModuleRecord, QuantModule, Scheme
from bitladder.runinfo import Progress, no_progress, one_core_each
from bitladder.storage import atomic_directory, temporary_of

_CORES_PER_EXPORT = 4
Quantised = Mapping[str, tuple[QuantModule, str]]  # tensor name of a quantised weight -> (module, format)


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
    carrier: str,
) -> list[Entry]:
    """Return the tensors of one output file, in the order of their data."""
    entries = []
    for info in weights.tensors.values():
        if info.file != file:
            continue
        prefix = info.name.removesuffix(".weight")
        for name in (f"{prefix}.k_scale", f"{prefix}.v_scale"):
            if name in kv_scales:
                entries.append(Entry(name, "F32", (), 4, kv_scales[name]))
        if info.name not in quantised:
            entries.append(Entry(info.name, info.dtype, info.shape, info.end - info.begin, info))
            continue
        module, name = quantised[info.name]
        entries += _parts(info, module, get_format(name), amax, codes, carrier)
    entries.sort(key=lambda entry: (-DTYPE_BYTES.get(entry.dtype, 1), entry.name))
    return entries


def _parts(
    info: TensorInfo, module: QuantModule, format_: Format, amax: Amax, codes: Codes | None, carrier: str
) -> Iterator[Entry]:
    """Yield all that is stored of a weight of the source."""
    scales, layout = _scales(format_, module.name, amax, codes), format_.layouts[carrier]
    weight_amax = amax[format_.weight_key(module.name)]
    for part in format_.stored(info.shape):
        name, size = f"{info.name.removesuffix('.weight')}.{layout.name(part.name)}", part.bits // 8
        shape, digest = layout.shape(part), None if part.name == WEIGHT else hashlib.sha256()
        if part.counts:
            yield Entry(name, part.dtype, shape, size, torch.tensor(info.shape))
        elif part.name in scales:
            yield Entry(name, part.dtype, shape, size, layout.stored(part.name, scales[part.name]))
        elif codes is not None:
            chosen = partial(codes.read, module.name, format_, part.name)
            yield Entry(name, part.dtype, shape, size, chosen, digest=digest)
        else:
            make = partial(_made, format_, part.name, weight_amax)
            yield Entry(name, part.dtype, shape, size, info, make, digest, format_.rows)


def _scales(format_: Format, module: str, amax: Amax, codes: Codes | None) -> dict[str, torch.Tensor]:
    """Return what is stored of a module that its amax values settle, `{part: scale}`; not what codes have chosen."""
    settled = format_.tensor_scales(amax[format_.weight_key(module)])
    scales = {part: scale for part, scale in settled.items() if codes is None or not codes.have(module, format_, part)}
    if format_.has_input_scale:
        scales[INPUT_SCALE] = format_.input_scale(amax[f"{module}.input_amax"])
    return scales


def _made(format_: Format, part: str, amax: torch.Tensor, weight: torch.Tensor, row: int) -> torch.Tensor:
    """Return a part of some rows of a weight, the first of which is `row`."""
    return format_.made(part, weight, format_.rows_of(amax, row, len(weight)))


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
    carrier: str = MODELOPT,
) -> CheckpointManifest:
    """Write the checkpoint of one scheme to `destination`.

    Args:
        scheme: what is quantised.
        measurement: the one that the scheme was planned from.
        amax: its amax values (`measured.read_amax`), shared within fused groups.
        source: the original model's directory.
        destination: a directory that doesn't exist, is empty, or holds an earlier checkpoint of ours.
        progress: told of every file.
        codes: the measurement's, where they are not the nearest ones (`measured.read_codes`).
        carrier: `modelopt` or `compressed-tensors`, whose layout is written.

    Raises:
        StaleRecord: the scheme belongs to another measurement. MeasurementError: not exportable.
        PlanError: the carrier can't hold it.
        ModelError: damaged source. OutputError: no space, or something else is there.
    """
    if scheme.measurement_sha256 != measurement.fingerprint():
        raise StaleRecord(f"scheme {scheme.name} was planned from another measurement; plan again")
    check_codes(measurement, codes)
    check_carrier(scheme, carrier)
    _check_destination(destination)
    quantised = _quantised_modules(scheme, measurement)
    kv_scales: dict[str, torch.Tensor] = {}
    if scheme.kv_cache_format is not None:
        kv_scales = {name: grids.scale_of(value) for name, value in kv_amax(measurement, amax).items()}
    weights = WeightFiles.open(source)
    lost = sorted(set(quantised) - set(weights.tensors))
    if lost:
        raise StaleRecord(f"{source} has no tensor {lost[0]}, which was measured; it is another model: measure again")
    with atomic_directory(destination) as temporary:
        files = []
        table: dict[str, Entry] = {}
        placed: dict[str, str] = {}
        for index, file in enumerate(weights.files):
            progress(f"export {scheme.name}", index, len(weights.files))
            entries = _entries(weights, file, quantised, amax, kv_scales, codes, carrier)
            files.append(write_weights(weights, file, entries, temporary))
            placed.update(dict.fromkeys((entry.name for entry in entries), file))
            table.update((entry.name, entry) for entry in entries)
        progress(f"export {scheme.name}", len(weights.files), len(weights.files))
        if (source / INDEX_FILE).exists():
            total = sum(entry.bytes for entry in table.values())
            index_content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            write_file(temporary / INDEX_FILE, json.dumps(index_content, indent=2).encode() + b"\n")
            files.append(digest_of_file(temporary, INDEX_FILE))
        written = _configurations(read_config(source), scheme, quantised, carrier)
        written |= {name: read_bytes(source / name) for name in side_files(source)}
        for name, content in written.items():
            write_file(temporary / name, content)
        files += [digest_of_file(temporary, name) for name in written]
        manifest = CheckpointManifest(
            scheme=scheme.name,
            scheme_sha256=scheme.fingerprint(),
            measurement_sha256=scheme.measurement_sha256,
            source_sha256=measurement.model.sha256,
            files=tuple(sorted(files, key=lambda entry: entry.name)),
            carrier=carrier,
            modules=tuple(_module_records(quantised, amax, table, codes, carrier)),
            kv_cache_format=scheme.kv_cache_format,
            kv_cache_skips=scheme.kv_cache_skips,
            kv_scales=tuple(KvScale(tensor=name, scale=float(value)) for name, value in kv_scales.items()),
        )
        manifest.write(temporary / CheckpointManifest.FILE_NAME)
    return manifest


def _configurations(config: dict[str, Any], scheme: Scheme, quantised: Quantised, carrier: str) -> dict[str, bytes]:
    """Return the files that say how the checkpoint is quantised, `{name: content}`.

    Args:
        config: the source's.
        scheme: what is quantised.
        quantised: its modules.
        carrier: whose files they are.
    """
    layers = {tensor.removesuffix(".weight"): name for tensor, (_, name) in quantised.items()}
    if carrier == MODELOPT:
        whole = config_with_quantisation(config, scheme, layers)
        legacy = json.dumps(quant_config(scheme, layers), indent=4).encode() + b"\n"
    else:
        # transformers looks modules up by its own names, which aren't always the checkpoint's
        aliases = {module.name: name for module, name in quantised.values()}
        section = quantisation_config(layers | aliases, scheme.exclude_modules)
        whole, legacy = {**config, "quantization_config": section}, None
    written = {CONFIG_FILE: json.dumps(whole, indent=2, ensure_ascii=False).encode() + b"\n"}
    return written if legacy is None else {**written, QUANT_CONFIG_FILE: legacy}


def export_all(
    schemes: Sequence[Scheme],
    measurement: Measurement,
    amax: Amax,
    source: Path,
    directories: Mapping[str, Path],
    progress: Progress = no_progress,
    codes: Codes | None = None,
    carrier: str = MODELOPT,
) -> dict[str, CheckpointManifest]:
    """Write the checkpoints of several schemes, `{scheme name: directory}`; at once where there are cores for it.

    Hashing and writing one checkpoint keeps two to three threads busy.

    Raises:
        BitladderError: see `export`; what other schemes have finished stays.
    """

    def write(scheme: Scheme) -> CheckpointManifest:
        return export(scheme, measurement, amax, source, directories[scheme.name], progress, codes, carrier)

    at_once = max(1, min(len(schemes), len(os.sched_getaffinity(0)) // _CORES_PER_EXPORT))
    with one_core_each(at_once) as pool:
        return {scheme.name: manifest for scheme, manifest in zip(schemes, pool.map(write, schemes), strict=True)}


def _module_records(
    quantised: Quantised,
    amax: Amax,
    table: Mapping[str, Entry],
    codes: Codes | None,
    carrier: str,
) -> Iterator[ModuleRecord]:
    for tensor, (module, name) in quantised.items():
        format_ = get_format(name)
        scales = _scales(format_, module.name, amax, codes)
        numbers = {part: float(scale) for part, scale in scales.items() if not scale.dim()}
        stored, beside = format_.layouts[carrier].name(WEIGHT_SCALE), tensor.removesuffix(".weight")
        digest, zeros = table[f"{beside}.{stored}"].digest, table.get(f"{beside}.{WEIGHT_ZERO_POINT}")
        if WEIGHT_SCALE in scales and WEIGHT_SCALE not in numbers:
            digest = hashlib.sha256(scales[WEIGHT_SCALE].numpy().tobytes())
        yield ModuleRecord(
            name=module.name,
            tensor=tensor,
            format=name,
            dtype=format_.code_dtype,
            weight_scale=numbers.get(WEIGHT_SCALE),
            weight_scale_sha256=None if digest is None else digest.hexdigest(),
            weight_scale_2=numbers.get(WEIGHT_SCALE_2),
            weight_zero_point_sha256=None if zeros is None else zeros.digest.hexdigest(),
            input_scale=numbers.get(INPUT_SCALE),
            rounding="nearest" if codes is None else "compensated",
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
