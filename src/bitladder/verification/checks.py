"""Compares one checkpoint with what it must hold, `Expected`: every file, every key, every tensor, every scale."""

import filecmp
import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitladder.errors import RecordError
from bitladder.records import CheckpointManifest, Finding, Measurement, Scheme
from bitladder.runinfo import one_core_each
from bitladder.storage import sha256_of_file
from bitladder.verification import blocks, ints
from bitladder.verification.expected import CONFIG, LEGACY, Expected, Scale, Weight, scale_of
from bitladder.verification.layouts import E2M1_MAX, E4M3_MAX, WRITTEN
from bitladder.verification.reading import INDEX, Tensors, bytes_of, differences, read_json

EXPORT_AGAIN = "remove its directory and export this scheme again"
MANIFEST = CheckpointManifest.FILE_NAME
# float32 rounding of code · scale and of the division that made the code, relative to the half step
_STEP_TOLERANCE = 1 + 1e-5
_BLOCK = 1 << 18  # codes compared at a time: what a cache holds
_THREADS = min(8, os.cpu_count() or 1)
_NOT_NEAREST = "not the ones nearest to the source"
_SHOWN = 3  # differences of one JSON file


@dataclass
class Examination:
    """What is known of one checkpoint while it is read."""

    directory: Path
    scheme: Scheme
    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # module -> SHA-256 of its weight's bytes and dtype
    tensors: int = 0
    codes: int = 0
    bytes_identical: int = 0
    stored_bytes: int = 0  # of all tensors, as they must be stored
    weight_amax: dict[str, float] = field(default_factory=dict)  # group -> of the source's weights
    # Weight -> what the scales of its rows or blocks must be; those of blocks by the weight's own scale in the files.
    many_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    zero_points: dict[str, torch.Tensor] = field(default_factory=dict)  # weight -> what they must be, as stored

    def part(self) -> "Examination":
        """Return an empty examination of the same checkpoint, to be merged."""
        return Examination(self.directory, self.scheme)

    def merge(self, part: "Examination") -> None:
        """Add what a part has found."""
        self.findings += part.findings
        self.digests |= part.digests
        self.tensors += part.tensors
        self.codes += part.codes
        self.bytes_identical += part.bytes_identical
        self.stored_bytes += part.stored_bytes
        self.many_scales |= part.many_scales
        self.zero_points |= part.zero_points
        for group, amax in part.weight_amax.items():
            self.weight_amax[group] = max(amax, self.weight_amax.get(group, 0.0))

    def find(self, file: str, tensor: str | None, problem: str, remedy: str = EXPORT_AGAIN) -> None:
        """Note that something is wrong."""
        self.findings.append(Finding(file=file, tensor=tensor, problem=problem, remedy=remedy))


def check(
    exam: Examination,
    expected: Expected,
    manifest: CheckpointManifest | None,
    measurement: Measurement,
    source: Path,
    originals: Tensors,
) -> None:
    """Compare everything in a checkpoint's directory with what is expected there."""
    _files(exam, expected, manifest)
    for name in expected.side_files:
        path = exam.directory / name
        if path.is_file() and not filecmp.cmp(source / name, path, shallow=False):
            exam.find(name, None, "differs from the source's, byte for byte")
    _json(exam, CONFIG, expected.config)
    if expected.legacy is not None:
        _json(exam, LEGACY, expected.legacy)
    with ExitStack() as stack:
        names = sorted({file for file in expected.placed.values() if (exam.directory / file).is_file()})
        tensors = Tensors([exam.directory / name for name in names], stack)
        _placement(exam, expected, tensors)
        weights = _weights(exam, expected, measurement, tensors, originals)
        scales = _scales(exam, expected, tensors, weights)
    if expected.has_index:
        total = exam.stored_bytes + sum(
            scale.dtype.itemsize * math.prod(scale.shape) for scale in expected.all_scales.values()
        )
        _json(exam, INDEX, {"metadata": {"total_size": total}, "weight_map": expected.placed})
    if manifest is not None:
        _manifest(exam, expected, manifest, measurement, scales)


def _files(exam: Examination, expected: Expected, manifest: CheckpointManifest | None) -> None:
    """Check that exactly the expected files are there, and that the manifest lists them with size and digest."""
    own = {MANIFEST, CheckpointManifest.CARD_NAME}
    everything = {path.relative_to(exam.directory).as_posix() for path in exam.directory.rglob("*")}
    parents = {parent.as_posix() for name in expected.files for parent in Path(name).parents}
    listed = {} if manifest is None else {entry.name: entry for entry in manifest.files}
    for name in sorted(everything - expected.files - parents - own):
        says = "listed in the manifest, but" if name in listed else "not listed in the manifest, and"
        exam.find(name, None, f"{says} the scheme asks for no such file", f"remove it, or {EXPORT_AGAIN}")
    for name in sorted(name for name in expected.files if not (exam.directory / name).is_file()):
        exam.find(name, None, "missing")
    if manifest is None:
        return
    for name in sorted(set(listed) ^ expected.files):
        says = "lists a file that the checkpoint must not have" if name in listed else "doesn't list this file"
        exam.find(MANIFEST, name, says)
    both = sorted(name for name in expected.files & set(listed) if (exam.directory / name).is_file())
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        digests = dict(zip(both, pool.map(lambda name: sha256_of_file(exam.directory / name), both), strict=True))
    for name, digest in digests.items():
        size, entry = (exam.directory / name).stat().st_size, listed[name]
        if size != entry.bytes:
            exam.find(name, None, f"has {size:,} bytes, the manifest says {entry.bytes:,}")
        elif digest != entry.sha256:
            exam.find(name, None, "its SHA-256 is not the manifest's: the content changed after the export")


def _json(exam: Examination, name: str, wanted: Any) -> None:
    if not (exam.directory / name).is_file():
        return  # a finding already
    try:
        found = read_json(exam.directory / name)
    except RecordError as error:
        exam.find(name, None, str(error))
        return
    for index, (path, how) in enumerate(differences(found, wanted)):
        if index < _SHOWN:
            exam.find(name, None, f"{path} {how}" if path else how)


def _placement(exam: Examination, expected: Expected, tensors: Tensors) -> None:
    """Check that the files can be read, and that each tensor lies where it must, once."""
    for file, problem in tensors.broken.items():
        exam.find(file, None, f"not a readable safetensors file ({problem})")
    for file, metadata in tensors.metadata.items():
        if metadata != {"format": "pt"}:
            exam.find(file, None, f"its metadata are {metadata}, not the format pt")
    for name, file, before in tensors.twice:
        exam.find(file, name, f"lies in {before} too")
    placed = expected.placed
    for name, (file, _) in sorted(tensors.files.items()):
        if name not in placed:
            exam.find(file, name, "neither in the source nor asked for by the scheme")
        elif placed[name] != file:
            exam.find(file, name, f"lies here, in the source it (or its weight) lies in {placed[name]}")
    for name in sorted(set(placed) - set(tensors.files)):
        exam.find(placed[name], name, "missing")


def _weights(
    exam: Examination, expected: Expected, measurement: Measurement, tensors: Tensors, originals: Tensors
) -> dict[str, float]:
    """Compare every tensor of the source; return the largest magnitude of each quantised group's weights."""
    dtype = getattr(torch, measurement.compute_dtype)

    def one(name: str) -> Examination:
        part, entry = exam.part(), expected.weights[name]
        original = originals.get(entry.original)
        bits = entry.bits or (4 if entry.packed else 8)
        part.stored_bytes = original.numel() * bits // 8 if entry.is_quantised else original.nbytes
        if entry.is_quantised and entry.group is not None:
            # Weights are measured in the arithmetic of the measurement, to which they were cast.
            part.weight_amax[entry.group] = float(original.abs().max().to(dtype))
            weight, scale = original if entry.spread in WRITTEN else original.to(dtype), expected.scales[entry.scale]
            if entry.rounded is not None and entry.rounded.scales_sha256:
                _chosen_scales(part, name, entry, expected, tensors)
            elif entry.bits is not None and entry.zero_point is not None:
                part.many_scales[name], part.zero_points[name] = ints.ranges_of(weight, entry.bits, scale)
            elif entry.bits is not None:
                part.many_scales[name] = ints.scales_of(weight, entry.bits, scale)
            else:
                above = _read_scale(tensors, expected, entry.above)
                many = blocks.many_scales(weight, entry.spread, above)
                if many is not None:
                    part.many_scales[name] = many
        if name in tensors.files:
            part.tensors = 1
            # How far off compensated codes may be was recorded of weights in the arithmetic of the measurement.
            compared = original if entry.rounded is None else original.to(dtype)
            _weight(part, name, entry, expected, tensors, compared)
        return part

    with one_core_each(_THREADS) as pool:
        for part in pool.map(one, expected.weights):
            exam.merge(part)
    return exam.weight_amax


def _chosen_scales(exam: Examination, name: str, entry: Weight, expected: Expected, tensors: Tensors) -> None:
    """Check that scales that were chosen with a weight's codes are those; from then on they are what is wanted."""
    assert entry.rounded is not None
    for beside, known in ((entry.scale, exam.many_scales), (entry.zero_point, exam.zero_points)):
        stored = _read_scale(tensors, expected, beside)
        if beside is None or stored is None:
            continue  # a finding of its own
        part = beside.rpartition(".")[2]
        if _digest(stored) != entry.rounded.scales_sha256.get(part):
            exam.find(entry.file, beside, "its numbers are not those that the measurement chose with the codes")
        else:
            known[name] = stored


def _weight(
    exam: Examination, name: str, entry: Weight, expected: Expected, tensors: Tensors, original: torch.Tensor
) -> None:
    """Compare one tensor with the source's."""
    tensor, file = tensors.get(name), tensors.file(name)
    if entry.module:
        content = hashlib.sha256(str(tensor.dtype).encode())
        content.update(bytes_of(tensor).numpy().data)
        if tensor.dtype != original.dtype:  # formats that differ in what is done to inputs may store a weight alike
            beside = [part in tensors.files for part in (entry.input_scale, entry.zero_point)]
            content.update(str(beside).encode())
        exam.digests[entry.module] = content.hexdigest()
    wanted, shape, says = original.dtype, list(original.shape), f"leaves it alone: {original.dtype}"
    if entry.packed:
        wanted, shape, says = torch.uint8, [shape[0], shape[1] // 2], "says FP4 codes, two a byte,"
    elif entry.bits is not None:
        wanted, shape, says = ints.stored_as(original, entry.bits, packed=not name.endswith(".weight"))
    elif entry.is_quantised:
        wanted, says = torch.float8_e4m3fn, "says FP8 codes"
    if tensor.dtype != wanted or list(tensor.shape) != shape:
        exam.find(file, name, f"is {tensor.dtype} {list(tensor.shape)}, the scheme {says} {shape}")
    elif entry.is_quantised:
        scale = _read_scale(tensors, expected, entry.scale)
        above = _read_scale(tensors, expected, entry.above) if entry.packed else scale
        zeros = _read_scale(tensors, expected, entry.zero_point)
        if entry.rounded is not None and _digest(tensor) != entry.rounded.codes_sha256:
            exam.find(file, name, "its codes are not the compensated ones of the measurement")
        if scale is None or above is None or (zeros is None and entry.zero_point is not None):
            pass  # a finding of its own
        elif entry.bits is not None:
            exam.codes += original.numel()
            shift = None if entry.rounded is None else entry.rounded.largest_shift
            if wrong := ints.wrong_codes(tensor, scale, entry.bits, original, zeros, shift):
                _found_wrong(exam, name, entry, wrong, original)
        else:
            _codes(exam, name, entry, tensor, (scale, above), original)
    elif not torch.equal(bytes_of(tensor), bytes_of(original)):
        exam.find(file, name, "differs from the source, though the scheme leaves it alone")
    else:
        exam.bytes_identical += tensor.nbytes


def _read_scale(tensors: Tensors, expected: Expected, name: str | None) -> torch.Tensor | None:
    """Return a scale, [] or [rows] or one a block; None: it isn't there, or not of its dtype and shape.

    That is found later.
    """
    if name is None or name not in tensors.files:
        return None
    scale, wanted = tensors.get(name), expected.scales[name]
    if tuple(scale.shape) != wanted.shape or scale.dtype != wanted.dtype:
        return None
    if wanted.many_of is None:
        scale = scale.reshape(())
    elif wanted.by_row:
        scale = scale.reshape(-1)
    if not wanted.inverted:
        return scale
    # 1 / (1 / x) isn't always x; what codes were made with is x, where the file has just that.
    likely = torch.tensor(math.nan if wanted.likely is None else wanted.likely)
    return likely if torch.equal(1 / likely, scale) else 1 / scale


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor).numpy().data).hexdigest()


def _codes(
    exam: Examination,
    name: str,
    entry: Weight,
    codes: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    original: torch.Tensor,
) -> None:
    """Check that every code restores its source weight: within half a step, or as far off as was recorded.

    The largest code may stand for more. `scales`: the stored one, and the one above it, of FP4 codes.
    """
    exam.codes += original.numel()
    rounded, wrong = entry.rounded, 0
    largest = E2M1_MAX if entry.packed else E4M3_MAX
    at_once = max(1, _BLOCK // original.shape[1])
    for start in range(0, len(codes), at_once):
        rows = slice(start, start + at_once)
        some, wanted = blocks.numbers(codes[rows], entry.spread), original[rows].float()
        step = blocks.steps(scales[0], entry.spread, start, len(some), scales[1])
        restored = some * step
        if not entry.packed and not bool(torch.isfinite(restored).all()):
            exam.find(entry.file, name, "holds NaN codes")
            return
        if rounded is not None:
            wrong += int(((restored - wanted).abs() > rounded.largest_shift * step * _STEP_TOLERANCE).sum())
            continue
        allowed = blocks.half_steps(wanted, step, entry.spread) * _STEP_TOLERANCE
        saturated = (some.abs() == largest) & (wanted.abs() >= restored.abs()) & (wanted * some > 0)
        near = (restored - wanted).abs() <= allowed
        wrong += int((~(near | saturated)).sum())
    if wrong:
        _found_wrong(exam, name, entry, wrong, original)


def _found_wrong(exam: Examination, name: str, entry: Weight, wrong: int, original: torch.Tensor) -> None:
    what = _NOT_NEAREST if entry.rounded is None else "farther from the source than was recorded"
    exam.find(entry.file, name, f"{wrong:,} of {original.numel():,} codes are {what}")


def _scale_problem(stored: torch.Tensor, scale: Scale, wanted: torch.Tensor | None) -> str | None:
    """Return what is wrong with a stored scale's dtype, shape or values, or None."""
    if scale.says is not None:
        if stored.dtype == scale.dtype and tuple(stored.tolist()) == scale.says:
            return None
        return f"is {stored.dtype} {stored.tolist()}, not {scale.dtype} {list(scale.says)}"
    if stored.dtype != scale.dtype or tuple(stored.shape) != scale.shape:
        dtype, shape = str(scale.dtype).removeprefix("torch."), " x ".join(map(str, scale.shape))
        one = f"one {dtype} number{' [1]' if scale.shape else ''}"
        numbers = one if scale.many_of is None else f"{shape} {dtype} numbers"
        return f"is {stored.dtype} {list(stored.shape)}, not {numbers}"
    if wanted is None:
        return None  # the weight's own scale isn't there, which is a finding
    if scale.zero_bits is not None:
        return ints.zeros_problem(stored, wanted, scale.zero_bits)
    wrong = (stored.float().reshape(-1) != wanted.float()).nonzero().flatten().tolist()
    if not wrong:
        return None
    value, own = (float(numbers.reshape(-1)[wrong[0]]) for numbers in (stored, wanted))
    origin = "the source's weights give" if scale.value is None else "what calibration saw gives"
    if scale.many_of is not None:
        what = "row" if scale.by_row else "block"
        rows = f"{len(wrong):,} of {stored.numel():,} {what}s have another scale"
        return f"{rows}: {what} {wrong[0]} has {value}, {origin} {own}"
    usable = "" if 0 < value < float("inf") else " (a scale is finite and positive)"
    return f"is {value}{usable}, {origin} {own}"


def _scales(
    exam: Examination, expected: Expected, tensors: Tensors, weights: dict[str, float]
) -> Callable[[Scale], float | torch.Tensor | None]:
    """Check every scale's dtype, shape and value; return what gives the value that one must have."""

    def wanted(scale: Scale) -> float | torch.Tensor | None:
        if scale.says is not None:
            return None
        if scale.many_of is not None:
            return (exam.many_scales if scale.zero_bits is None else exam.zero_points).get(scale.many_of)
        return scale_of(weights[scale.group], scale.largest) if scale.value is None else scale.value

    for name, scale in expected.all_scales.items():
        stored = tensors.get(name) if name in tensors.files else None
        if stored is not None:
            exam.tensors += 1
            value = wanted(scale)
            dtype = torch.float32 if scale.zero_bits is None else torch.int32
            own = None if value is None else torch.as_tensor(value, dtype=dtype).reshape(-1)
            problem = _scale_problem(stored, scale, own if own is None or not scale.inverted else 1 / own)
            if problem is not None:
                exam.find(tensors.file(name), name, problem)
        if name in expected.kv_scales:
            number = None
            if stored is not None and stored.dtype == torch.float32 and stored.shape == ():
                number = float(stored)
            skipped = scale.module.rpartition(".")[0] in exam.scheme.kv_cache_skips
            exam.digests[f"{scale.module} (KV cache)"] = f"{number}{', not used' if skipped else ''}"
    if exam.scheme.kv_cache_format is not None and not expected.kv_scales:
        exam.find(MANIFEST, None, "the KV cache is FP8, but no layer has keys and values")
    return wanted


def _dtype_name(entry: Weight, name: str) -> str:
    """Return the dtype of codes as a manifest names it."""
    if entry.bits is not None:
        return "I8" if name.endswith(".weight") else "I32"
    return "U8" if entry.packed else "F8_E4M3"


def _manifest(
    exam: Examination,
    expected: Expected,
    manifest: CheckpointManifest,
    measurement: Measurement,
    wanted: Callable[[Scale], float | torch.Tensor | None],
) -> None:
    """Check that the manifest says what is expected, field by field but for the files."""
    for what, found, own in (
        ("scheme", manifest.scheme_sha256, exam.scheme.fingerprint()),
        ("measurement", manifest.measurement_sha256, measurement.fingerprint()),
        ("source model", manifest.source_sha256, measurement.model.sha256),
    ):
        if found != own:
            exam.find(MANIFEST, None, f"was written for another {what}")
    said = {name: getattr(manifest, name) for name in ("scheme", "carrier", "kv_cache_format")}
    said["kv_cache_skips"] = list(manifest.kv_cache_skips)
    said["modules"] = {module["tensor"]: module for module in manifest.model_dump(mode="json")["modules"]}
    said["kv_scales"] = {entry.tensor: entry.scale for entry in manifest.kv_scales}
    modules = {}
    for name, entry in expected.weights.items():
        if entry.is_quantised:
            weight_scale = wanted(expected.scales[entry.scale])
            many = weight_scale if isinstance(weight_scale, torch.Tensor) else None
            input_scale = expected.scales.get(entry.input_scale or "")
            above = expected.scales.get(entry.above or "")
            zeros = exam.zero_points.get(name)
            modules[entry.original] = {
                "name": entry.module,
                "tensor": entry.original,
                "format": exam.scheme.formats[entry.group or ""],
                "dtype": _dtype_name(entry, name),
                "weight_scale": weight_scale if many is None else None,
                "weight_scale_sha256": None if many is None else _digest(many),
                **({} if above is None else {"weight_scale_2": wanted(above)}),
                **({} if zeros is None else {"weight_zero_point_sha256": _digest(zeros)}),
                "input_scale": None if input_scale is None else wanted(input_scale),
                "rounding": "nearest" if entry.rounded is None else "compensated",
            }
    meant = {
        "scheme": exam.scheme.name,
        "carrier": expected.carrier,
        "kv_cache_format": exam.scheme.kv_cache_format,
        "kv_cache_skips": list(exam.scheme.kv_cache_skips),
        "modules": modules,
        "kv_scales": {name: wanted(scale) for name, scale in expected.kv_scales.items()},
    }
    if len(manifest.modules) != len(said["modules"]) or len(manifest.kv_scales) != len(said["kv_scales"]):
        exam.find(MANIFEST, None, "lists a module or a scale twice")
    for index, (path, how) in enumerate(differences(said, meant)):
        if index < _SHOWN:
            exam.find(MANIFEST, None, f"{path} {how}")
