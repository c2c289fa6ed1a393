"""Re-reads exported checkpoints against their schemes, and against each other: `verify(...) -> Verification`.

A second opinion: it shares no code with `checkpoint`, reads with safetensors' own reader, and compares with the source
tensor by tensor. What is checked:

- the manifest belongs to the scheme, and every file has its size and SHA-256; none is missing or extra;
- every tensor of the source is there under its name, with the dtype and shape that the scheme says, and no other is;
- outside the scheme: bytes equal to the source's;
- inside: E4M3 codes without NaN, finite positive float32 scales, equal within a fused group and to the manifest, and
  every code · scale within half an E4M3 step of the source weight (a code at ±448 may stand for what lies beyond).
  Compensated codes are not the nearest ones: they are the very codes that the measurement has, by their SHA-256, and
  no code · scale is farther from the source weight than it says;
- `config.json`, `hf_quant_config.json` and the weight index agree with the scheme, with the source and with each other;
- of every two schemes, exactly the modules with different formats have different tensors.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitladder import numerics
from bitladder.errors import RecordError
from bitladder.records import (
    BF16,
    CheckpointManifest,
    CheckpointVerification,
    Finding,
    Measurement,
    ModuleRecord,
    PairDifference,
    QuantGroup,
    QuantModule,
    RoundedModule,
    Scheme,
    Verification,
)
from bitladder.runinfo import Progress, no_progress, one_core_each
from bitladder.storage import sha256_of_file

_INDEX = "model.safetensors.index.json"
_EXPORT_AGAIN = "export this scheme again"
# float32 rounding of code · scale and of the division that made the code, relative to the half step
_STEP_TOLERANCE = 1 + 1e-5
_BLOCK = 1 << 18  # codes compared at a time: what a cache holds
_THREADS = min(8, os.cpu_count() or 1)
_Scales = tuple[float | None, float | None]  # weight scale, input scale; None where there is no usable one
_KV_CACHE_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


@dataclass
class _Examination:
    """What is known of one checkpoint while it is read."""

    directory: Path
    scheme: Scheme
    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # module -> SHA-256 of its weight's bytes and dtype
    tensors: int = 0
    codes: int = 0
    bytes_identical: int = 0

    def part(self) -> "_Examination":
        """Return an empty examination of the same checkpoint, to be merged."""
        return _Examination(self.directory, self.scheme)

    def merge(self, part: "_Examination") -> None:
        """Add what a part has found."""
        self.findings += part.findings
        self.digests |= part.digests
        self.tensors += part.tensors
        self.codes += part.codes
        self.bytes_identical += part.bytes_identical

    def find(self, file: str, tensor: str | None, problem: str, remedy: str = _EXPORT_AGAIN) -> None:
        self.findings.append(Finding(file=file, tensor=tensor, problem=problem, remedy=remedy))


def _weight_files(source: Path) -> list[Path]:
    """Return the weight files of the original: those that its index names, or the one of the usual name."""
    index = source / _INDEX
    if not index.exists():
        return [source / "model.safetensors"]
    return [source / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


class _Tensors:
    """All tensors of some weight files, read with safetensors' own reader."""

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self.files: dict[str, Any] = {}
        self.broken: dict[str, str] = {}
        for path in paths:
            try:
                handle: Any = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self.broken[path.name] = str(error)
                continue
            self.files.update((name, (path.name, handle)) for name in handle.keys())  # noqa: SIM118

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.files[name][1].get_tensor(name)
        return tensor

    def file(self, name: str) -> str:
        return str(self.files[name][0]) if name in self.files else "*.safetensors"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes, [bytes] uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_files(exam: _Examination, manifest: CheckpointManifest) -> None:
    """Check sizes and digests of the files, and that none is missing or extra."""
    listed = {entry.name: entry for entry in manifest.files}
    present = {path.relative_to(exam.directory).as_posix() for path in exam.directory.rglob("*") if path.is_file()} - {
        CheckpointManifest.FILE_NAME,
        CheckpointManifest.CARD_NAME,
    }
    for name in sorted(set(listed) - present):
        exam.find(name, None, "listed in the manifest, but missing")
    for name in sorted(present - set(listed)):
        exam.find(name, None, "not listed in the manifest", "remove it, or export this scheme again")
    both = sorted(present & set(listed))
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        digests = dict(zip(both, pool.map(lambda name: sha256_of_file(exam.directory / name), both), strict=True))
    for name, digest in digests.items():
        size, entry = (exam.directory / name).stat().st_size, listed[name]
        if size != entry.bytes:
            exam.find(name, None, f"has {size:,} bytes, the manifest says {entry.bytes:,}")
        elif digest != entry.sha256:
            exam.find(name, None, "its SHA-256 is not the manifest's: the content changed after the export")


def _read_json(exam: _Examination, directory: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        exam.find(name, None, "missing")
        return {}
    except ValueError as error:
        exam.find(name, None, f"not JSON ({error})")
        return {}
    return content if isinstance(content, dict) else {}


def _check_configs(exam: _Examination, source: Path, tensors: _Tensors) -> None:
    """Check both quantisation configurations and the weight index."""
    config = _read_json(exam, exam.directory, "config.json")
    quantisation = config.pop("quantization_config", {})
    legacy = _read_json(exam, exam.directory, "hf_quant_config.json").get("quantization", {})
    original = _read_json(exam, source, "config.json")
    original.pop("quantization_config", None)  # null in some models
    if config != original:
        exam.find("config.json", None, "differs from the source's beyond quantization_config")
    wanted = sorted(exam.scheme.exclude_modules)
    for file, key, section in (
        ("config.json", "ignore", quantisation),
        ("hf_quant_config.json", "exclude_modules", legacy),
    ):
        if section.get("quant_algo") != "FP8":
            exam.find(file, None, f"quant_algo is {section.get('quant_algo')!r}, the scheme needs 'FP8'")
        names = section.get(key, [])
        if sorted(names) != wanted:
            odd = sorted(set(names) ^ set(wanted))
            exam.find(file, odd[0] if odd else None, f"{key} is not the scheme's exclude_modules")
        if any(character in name for name in names for character in "*?["):
            exam.find(file, None, f"{key} holds a wildcard; names must be exact")
    fp8_cache = exam.scheme.kv_cache_format is not None
    for file, key, value, meant in (
        ("hf_quant_config.json", "kv_cache_quant_algo", legacy.get("kv_cache_quant_algo"), "FP8"),
        ("config.json", "kv_cache_scheme", quantisation.get("kv_cache_scheme"), _KV_CACHE_SCHEME),
    ):
        if value != (meant if fp8_cache else None):
            exam.find(file, None, f"{key} is {value!r}, but the scheme's KV cache is {exam.scheme.kv_cache_format}")
    if quantisation.get("quant_method") != "modelopt":
        exam.find("config.json", None, f"quant_method is {quantisation.get('quant_method')!r}, not 'modelopt'")
    if (exam.directory / _INDEX).exists():
        weight_map = _read_json(exam, exam.directory, _INDEX).get("weight_map", {})
        placed = {name: tensors.file(name) for name in tensors.files}
        for name in sorted(set(weight_map.items()) ^ set(placed.items()))[:1]:
            exam.find(_INDEX, name[0], "the index and the files disagree about where this tensor lies")
    elif len({file for file, _ in tensors.files.values()}) > 1:
        exam.find(_INDEX, None, "missing, though the weights lie in several files")


def _check_copied(exam: _Examination, name: str, tensor: torch.Tensor, original: torch.Tensor, file: str) -> None:
    """Check that a tensor outside the scheme is bit-identical to the source's."""
    if tensor.dtype != original.dtype or tensor.shape != original.shape:
        exam.find(
            file,
            name,
            f"is {tensor.dtype} {list(tensor.shape)}, the source has {original.dtype} {list(original.shape)}, "
            "and the scheme leaves it alone",
        )
    elif not torch.equal(_bytes(tensor), _bytes(original)):
        exam.find(file, name, "differs from the source, though the scheme leaves it alone")
    else:
        exam.bytes_identical += tensor.nbytes


def _scalar(exam: _Examination, tensors: _Tensors, name: str) -> float | None:
    """Return a scale, or None after noting what is wrong with it."""
    if name not in tensors.files:
        exam.find("*.safetensors", name, "missing: the runtime would use an arbitrary scale")
        return None
    scale = tensors.get(name)
    if scale.dtype != torch.float32 or scale.numel() != 1:
        exam.find(tensors.file(name), name, f"is {scale.dtype} {list(scale.shape)}, not one float32 number")
        return None
    value = float(scale)
    if not (0 < value < float("inf")):
        exam.find(tensors.file(name), name, f"is {value}; a scale is finite and positive")
        return None
    return value


def _check_codes(
    exam: _Examination,
    name: str,
    codes: torch.Tensor,
    scale: float,
    original: torch.Tensor,
    rounded: RoundedModule | None,
) -> None:
    """Check that every code restores its source weight: within half an E4M3 step, or as far off as was recorded."""
    exam.codes += codes.numel()
    step = torch.tensor(scale)
    wrong = 0
    if rounded is not None and hashlib.sha256(_bytes(codes).numpy().data).hexdigest() != rounded.codes_sha256:
        exam.find("*.safetensors", name, "its codes are not the compensated ones of the measurement")
    flat, source = codes.view(-1), original.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        some = flat[start : start + _BLOCK]
        restored, wanted = some.float() * step, source[start : start + _BLOCK].float()
        if not bool(torch.isfinite(restored).all()):
            exam.find("*.safetensors", name, "holds NaN codes")
            return
        if rounded is not None:
            wrong += int(((restored - wanted).abs() > rounded.largest_shift * step * _STEP_TOLERANCE).sum())
            continue
        allowed = numerics.half_step(wanted, step) * _STEP_TOLERANCE
        saturated = (some.float().abs() == numerics.E4M3_MAX) & (wanted.abs() >= restored.abs())
        wrong += int((((restored - wanted).abs() > allowed) & ~saturated).sum())
    if wrong:
        what = "not the ones nearest to the source" if rounded is None else "farther from the source than was recorded"
        exam.find("*.safetensors", name, f"{wrong:,} of {codes.numel():,} codes are {what}")


def _check_tensor(
    exam: _Examination,
    name: str,
    group: QuantGroup | None,
    module: QuantModule | None,
    entry: ModuleRecord | None,
    rounded: RoundedModule | None,
    tensors: _Tensors,
    originals: _Tensors,
) -> _Scales | None:
    """Check one tensor of the source in the checkpoint; return its weight and input scale where it is quantised."""
    if name not in tensors.files:
        exam.find("*.safetensors", name, "missing")
        return None
    exam.tensors += 1
    tensor, original, file = tensors.get(name), originals.get(name), tensors.file(name)
    if module is not None:
        content = hashlib.sha256(str(tensor.dtype).encode())
        content.update(_bytes(tensor).numpy().data)
        exam.digests[module.name] = content.hexdigest()
    if group is None or exam.scheme.formats[group.name] == BF16:
        _check_copied(exam, name, tensor, original, file)
        return None
    prefix = name.removesuffix(".weight")
    exam.tensors += 2
    weight_scale = _scalar(exam, tensors, f"{prefix}.weight_scale")
    input_scale = _scalar(exam, tensors, f"{prefix}.input_scale")
    if entry is None or (entry.weight_scale, entry.input_scale) != (weight_scale, input_scale):
        exam.find(CheckpointManifest.FILE_NAME, name, "the manifest's scales are not those in the file")
    if entry is not None and entry.rounding != ("nearest" if rounded is None else "compensated"):
        exam.find(CheckpointManifest.FILE_NAME, name, f"is recorded as rounded {entry.rounding}, the measurement not")
    if tensor.dtype != numerics.E4M3_DTYPE or tensor.shape != original.shape:
        exam.find(
            file,
            name,
            f"is {tensor.dtype} {list(tensor.shape)}, the scheme says FP8 codes {list(original.shape)}",
        )
    elif weight_scale is not None:
        _check_codes(exam, name, tensor, weight_scale, original, rounded)
    return weight_scale, input_scale


def _check_tensors(exam: _Examination, measurement: Measurement, manifest: CheckpointManifest, source: Path) -> None:
    """Check every tensor of the checkpoint against the source and the scheme."""
    recorded = {module.name: module for module in manifest.modules}
    rounding = measurement.rounding.modules if measurement.rounding is not None else ()
    rounded = {module.name: module for module in rounding}
    with ExitStack() as stack:
        tensors = _Tensors(sorted(exam.directory.glob("*.safetensors")), stack)
        originals = _Tensors(_weight_files(source), stack)
        for file, problem in tensors.broken.items():
            exam.find(file, None, f"not a readable safetensors file ({problem})")
        _check_configs(exam, source, tensors)
        modules = {
            module.tensor: (group, module)
            for group in measurement.groups
            for module in group.modules
            if module.tensor is not None
        }
        expected = set(originals.files)
        for name in set(originals.files) & set(modules):
            if exam.scheme.formats[modules[name][0].name] != BF16:
                prefix = name.removesuffix(".weight")
                expected |= {f"{prefix}.weight_scale", f"{prefix}.input_scale"}

        def check(name: str) -> tuple[_Examination, _Scales | None]:
            part = exam.part()
            group, module = modules.get(name, (None, None))
            path = module.name if module is not None else ""
            entry, own = recorded.get(path), rounded.get(path)
            return part, _check_tensor(part, name, group, module, entry, own, tensors, originals)

        group_scales: dict[str, set[_Scales]] = {}
        with one_core_each(_THREADS) as pool:
            for name, (part, scales) in zip(originals.files, pool.map(check, originals.files), strict=True):
                exam.merge(part)
                if scales is not None:
                    group_scales.setdefault(modules[name][0].name, set()).add(scales)
        expected |= _check_kv_scales(exam, tensors, measurement, manifest)
        for name in sorted(set(tensors.files) - expected):
            exam.find(tensors.file(name), name, "neither in the source nor asked for by the scheme")
        for group_name, different in group_scales.items():
            if len(different) > 1:
                exam.find("*.safetensors", group_name, "its modules are fused by the runtime, but their scales differ")


def _check_kv_scales(
    exam: _Examination, tensors: _Tensors, measurement: Measurement, manifest: CheckpointManifest
) -> set[str]:
    """Check that every layer's keys and values have their scale where the cache is FP8; return the scales' names."""
    wanted: dict[str, str] = {}  # name of the scale -> what of it counts as a difference between two checkpoints
    if exam.scheme.kv_cache_format is not None:
        for group in measurement.groups:
            for module in group.modules:
                leaf = module.name.rpartition(".")[2]
                if module.tensor is not None and leaf in ("k_proj", "v_proj"):
                    wanted[f"{module.tensor.removesuffix('.weight')}.{leaf[0]}_scale"] = module.name
        if not wanted:
            exam.find(CheckpointManifest.FILE_NAME, None, "the KV cache is FP8, but no layer has keys and values")
    recorded = {entry.tensor: entry.scale for entry in manifest.kv_scales}
    for name in sorted(set(recorded) - set(wanted)):
        exam.find(CheckpointManifest.FILE_NAME, name, "recorded, though the scheme has no such scale")
    for name, owner in wanted.items():
        exam.tensors += 1
        scale = _scalar(exam, tensors, name)
        if scale is not None and recorded.get(name) != scale:
            exam.find(CheckpointManifest.FILE_NAME, name, "the manifest's scale is not the one in the file")
        exam.digests[f"{owner} (KV cache)"] = str(scale)
    return set(wanted)


def examine(
    scheme: Scheme, measurement: Measurement, source: Path, directory: Path
) -> tuple[CheckpointVerification, dict[str, str]]:
    """Check one checkpoint; return the verdict and each searched module's digest (of its weight's bytes and dtype)."""
    exam = _Examination(directory, scheme)
    manifest_sha256 = ""
    try:
        manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    except RecordError as error:
        exam.find(CheckpointManifest.FILE_NAME, None, str(error))
    else:
        manifest_sha256 = manifest.fingerprint()
        for what, found, wanted in (
            ("scheme", manifest.scheme_sha256, scheme.fingerprint()),
            ("measurement", manifest.measurement_sha256, measurement.fingerprint()),
            ("source model", manifest.source_sha256, measurement.model.sha256),
        ):
            if found != wanted:
                exam.find(CheckpointManifest.FILE_NAME, None, f"was written for another {what}")
        _check_files(exam, manifest)
        _check_tensors(exam, measurement, manifest, source)
    verdict = CheckpointVerification(
        scheme=scheme.name,
        manifest_sha256=manifest_sha256,
        tensors_checked=exam.tensors,
        codes_checked=exam.codes,
        bytes_identical=exam.bytes_identical,
        findings=tuple(exam.findings),
    )
    return verdict, exam.digests


def compare(
    first: Scheme, second: Scheme, measurement: Measurement, digests: Mapping[str, Mapping[str, str]]
) -> PairDifference:
    """Check that two checkpoints differ exactly where their schemes do."""
    expected = {
        module.name
        for group in measurement.groups
        if first.formats[group.name] != second.formats[group.name]
        for module in group.modules
    }
    if first.kv_cache_format != second.kv_cache_format:
        expected |= {
            f"{module.name} (KV cache)"
            for group in measurement.groups
            for module in group.modules
            if module.name.endswith((".k_proj", ".v_proj"))
        }
    one, other = digests[first.name], digests[second.name]
    differing = {name for name in set(one) | set(other) if one.get(name) != other.get(name)}
    findings = []
    if not differing:
        findings.append(
            Finding(
                file="*.safetensors",
                tensor=None,
                problem=f"the checkpoints of {first.name} and {second.name} hold the same weights",
                remedy="export both again; if their schemes are equal, drop one",
            )
        )
    for name in sorted(expected ^ differing)[:3]:
        problem = "the same in both, though the formats differ" if name in expected else "different in both"
        findings.append(
            Finding(
                file="*.safetensors",
                tensor=name,
                problem=f"{problem} ({first.name}, {second.name})",
                remedy="export both schemes again",
            )
        )
    return PairDifference(
        first=first.name,
        second=second.name,
        modules_expected=len(expected),
        modules_differing=len(differing),
        findings=tuple(findings),
    )


def verify(
    schemes: Sequence[Scheme],
    measurement: Measurement,
    source: Path,
    directories: Mapping[str, Path],
    progress: Progress = no_progress,
) -> Verification:
    """Check every checkpoint against its scheme, and every two against each other.

    Args:
        schemes: what was planned.
        measurement: what they were planned from.
        source: the original model's directory.
        directories: `{scheme name: checkpoint directory}`.
        progress: told of every checkpoint.
    """
    verdicts, digests = [], {}
    for index, scheme in enumerate(schemes):
        progress("verify", index, len(schemes))
        verdict, digests[scheme.name] = examine(scheme, measurement, source, directories[scheme.name])
        verdicts.append(verdict)
    progress("verify", len(schemes), len(schemes))
    pairs = [
        compare(first, second, measurement, digests)
        for index, first in enumerate(schemes)
        for second in schemes[index + 1 :]
    ]
    return Verification(checkpoints=tuple(verdicts), pairs=tuple(pairs))
