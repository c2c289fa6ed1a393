"""What a checkpoint must hold, from source, scheme and measurement alone: `expect(...) -> Expected`.

Nothing here has seen a checkpoint or its manifest, and nothing is taken from the exporter: what it writes is
written out here a second time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitladder.errors import RecordError, StaleRecord
from bitladder.formats import get_format
from bitladder.models.sources import side_files
from bitladder.reading import read_json
from bitladder.records import BF16, Measurement, RoundedModule, Scheme
from bitladder.verification.layouts import CARRIERS, E4M3, E4M3_MAX, GROUPS, INTEGERS, LAYOUTS, Spread
from bitladder.verification.reading import INDEX, Tensors

CONFIG, LEGACY = "config.json", "hf_quant_config.json"
_KV_FORMATS = (None, "fp8")
_KV_MODULES = ("k_proj", "v_proj")
# Source: modelopt 0.47.0, torch/export/convert_hf_config.py and quant_utils.py; tests compare with its export.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


@dataclass(frozen=True)
class Weight:
    """What a tensor of the source has become, in the file in which the source has it."""

    file: str
    original: str  # its name in the source
    group: str | None = None  # None: not searched
    module: str = ""
    is_quantised: bool = False
    spread: Spread = "tensor"
    rounded: RoundedModule | None = None  # compensated codes
    scale: str = ""  # the tensors beside it
    above: str | None = None
    bits: int | None = None  # of integers; None: they aren't
    input_scale: str | None = None
    zero_point: str | None = None

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.spread == "fp4"


@dataclass(frozen=True)
class Scale:
    """A float32 scalar, or one number a row or a block; `value` None: what the source's weights give."""

    file: str
    group: str
    module: str
    value: float | None
    many_of: str | None = None  # the weight of whose rows or blocks it is
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    largest: float = E4M3_MAX  # as what the largest value is stored
    by_row: bool = False
    inverted: bool = False  # stored as 1 / scale
    says: tuple[int, ...] | None = None  # what it must be, where it is no scale
    likely: float | None = None  # what the measurement says that a weight's own inverted scale is
    zero_bits: int | None = None  # of zero points, several of which are one number; None: it is no such


@dataclass(frozen=True)
class Expected:
    """Everything that a checkpoint's directory must hold, and nothing else may."""

    carrier: str
    weights: dict[str, Weight]  # tensor of the checkpoint -> what of the source it is
    scales: dict[str, Scale]
    kv_scales: dict[str, Scale]
    config: dict[str, Any]
    legacy: dict[str, Any] | None  # hf_quant_config.json; None: it has none
    side_files: tuple[str, ...]
    has_index: bool

    @property
    def all_scales(self) -> dict[str, Scale]:
        """The scales of weights and inputs, and those of the KV cache."""
        return self.scales | self.kv_scales

    @property
    def placed(self) -> dict[str, str]:
        """Which file each tensor lies in."""
        return {n: e.file for n, e in self.weights.items()} | {n: e.file for n, e in self.all_scales.items()}

    @property
    def files(self) -> frozenset[str]:
        """The names of all files but the manifest and the card."""
        index = [INDEX] if self.has_index else []
        legacy = [] if self.legacy is None else [LEGACY]
        return frozenset([*self.placed.values(), CONFIG, *legacy, *index, *self.side_files])


def _number(amax: Mapping[str, torch.Tensor], name: str) -> float:
    if name not in amax:
        raise RecordError(f"measurement.safetensors has no {name}; run `bitladder measure` again")
    return float(amax[name])


def scale_of(amax: float, largest: float = E4M3_MAX) -> float:
    """Return amax / 448, or by what the largest value is stored as, as float32 division gives it."""
    return float(torch.tensor(amax, dtype=torch.float32) / torch.tensor(largest, dtype=torch.float32))


def cached_modules(measurement: Measurement) -> frozenset[str]:
    """Return the searched modules that make keys or values which a layer caches: `k_proj` and `v_proj` side by side."""
    names = {module.name for group in measurement.groups for module in group.modules if module.tensor is not None}
    parents = [{name.rpartition(".")[0] for name in names if name.endswith(f".{leaf}")} for leaf in _KV_MODULES]
    return frozenset(f"{parent}.{leaf}" for parent in parents[0] & parents[1] for leaf in _KV_MODULES)


def _kv_scales(
    scheme: Scheme, measurement: Measurement, amax: Mapping[str, torch.Tensor], files: Tensors
) -> Iterator[tuple[str, Scale]]:
    """Yield the scales of what every layer caches, beside the modules that make keys and values."""
    cached = cached_modules(measurement) if scheme.kv_cache_format is not None else frozenset()
    for group in measurement.groups:
        for module in group.modules:
            if module.name in cached and module.tensor is not None:
                which = module.name.rpartition(".")[2][0]  # k or v
                value = scale_of(_number(amax, f"{module.name}.{which}_amax"))
                prefix = module.tensor.removesuffix(".weight")
                yield f"{prefix}.{which}_scale", Scale(files.file(module.tensor), group.name, module.name, value)


def _groups(scheme: Scheme, measurement: Measurement) -> dict[str, Any]:
    """Return compressed-tensors' `quantization_config`: exact names, in the checkpoint's spelling and transformers'."""
    chosen = [
        (module, scheme.formats[group.name])
        for group in measurement.groups
        for module in group.modules
        if scheme.formats[group.name] != BF16
    ]
    names = [((module.tensor or module.name).removesuffix(".weight"), own) for module, own in chosen]
    names = list(dict.fromkeys([*names, *((module.name, own) for module, own in chosen)]))
    used = list(dict.fromkeys(own for _, own in names))
    stored = {GROUPS[name]["format"] for name in used}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(stored) > 1 else GROUPS[used[0]]["format"],
        "config_groups": {
            f"group_{index}": {**GROUPS[name], "targets": [module for module, own in names if own == name]}
            for index, name in enumerate(used)
        },
        "ignore": list(scheme.exclude_modules),
    }


def _quantisation(
    scheme: Scheme, measurement: Measurement, carrier: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return `quantization_config` and `hf_quant_config.json`; None: the carrier has no such file."""
    if carrier != "modelopt":
        return _groups(scheme, measurement), None
    layers = {
        (module.tensor or module.name).removesuffix(".weight"): scheme.formats[group.name]
        for group in measurement.groups
        for module in group.modules
        if scheme.formats[group.name] != BF16
    }
    used = list(dict.fromkeys(layers.values()))
    algorithm = "MIXED_PRECISION" if len(used) > 1 else LAYOUTS[used[0]].algorithm
    names = list(scheme.exclude_modules)
    section: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": _PRODUCER,
        "ignore": names,
    }
    groups = {
        f"group_{index}": {
            "targets": sorted(m for m, own in layers.items() if own == name) if len(used) > 1 else ["Linear"],
            **LAYOUTS[name].group,
        }
        for index, name in enumerate(used)
    }
    if len(used) > 1 or LAYOUTS[used[0]].grouped_alone:
        section["config_groups"] = groups
    if scheme.kv_cache_format is not None:
        section["kv_cache_scheme"] = E4M3
    if scheme.kv_cache_skips:
        section["kv_cache_dtype_skip_layers"] = [
            number for name in scheme.kv_cache_skips for number in name.split(".") if number.isdigit()
        ]
    kv_cache = None if scheme.kv_cache_format is None else "FP8"
    legacy: dict[str, Any] = {"kv_cache_quant_algo": kv_cache, "exclude_modules": names}
    legacy |= {"quant_algo": algorithm} if len(used) > 1 else LAYOUTS[used[0]].entry
    if len(used) > 1:
        each = {module: LAYOUTS[name].entry for module, name in layers.items()}
        section["quantized_layers"] = legacy["quantized_layers"] = each
    return section, {"producer": _PRODUCER, "quantization": legacy}


def check_scheme(scheme: Scheme, measurement: Measurement, carrier: str = "modelopt") -> None:
    """Check that a scheme is one of this measurement, and that its exclusions are what it leaves in 16 bits.

    Raises:
        StaleRecord: it isn't.
    """
    known = {BF16, *(set(LAYOUTS) - set(INTEGERS) if carrier == "modelopt" else GROUPS)}
    problem = None
    if scheme.measurement_sha256 != measurement.fingerprint():
        problem = "was planned from another measurement"
    elif set(scheme.formats) != {group.name for group in measurement.groups}:
        problem = "doesn't name the measurement's quant groups"
    elif not set(scheme.formats.values()) <= known or set(scheme.formats.values()) == {BF16}:
        problem = f"has formats that no checkpoint holds ({', '.join(sorted(set(scheme.formats.values())))})"
    elif scheme.kv_cache_format not in _KV_FORMATS:
        problem = f"has a KV cache in {scheme.kv_cache_format}"
    else:
        left = {module.checkpoint_name for module in measurement.untouched}
        quantised: set[str] = set()
        for group in measurement.groups:
            own = {(module.tensor or module.name).removesuffix(".weight") for module in group.modules}
            own_list = left if scheme.formats[group.name] == BF16 else quantised
            own_list |= own
        named = set(scheme.exclude_modules)
        odd = sorted((left - named) | (quantised & named) | {name for name in named if set(name) & set("*?[")})
        if odd:
            problem = f"and its exclude_modules disagree about {odd[0]}"
    if problem is not None:
        raise StaleRecord(f"scheme {scheme.name} {problem}; run `bitladder plan` again")


def expect(
    scheme: Scheme,
    measurement: Measurement,
    amax: Mapping[str, torch.Tensor],
    source: Path,
    originals: Tensors,
    carrier: str,
) -> Expected:
    """Return what the scheme's checkpoint must hold.

    Args:
        scheme: of the measurement.
        measurement: whose modules, and codes where they are compensated.
        amax: its amax values, `{"<module>.input_amax": float32 scalar}`.
        source: the original model's directory.
        originals: its tensors.
        carrier: `modelopt` or `compressed-tensors`.

    Raises:
        StaleRecord: the scheme is of another measurement. RecordError: an amax value is missing.
    """
    check_scheme(scheme, measurement, carrier)
    rounding = measurement.rounding.modules if measurement.rounding is not None else ()
    rounded = {(module.name, module.format or measurement.formats[0]): module for module in rounding}
    weights = {name: Weight(originals.file(name), name) for name in originals.files}
    scales: dict[str, Scale] = {}
    for group in measurement.groups:
        is_quantised = scheme.formats[group.name] != BF16
        # What a runtime fuses has one input, and one scale for it.
        has_input = is_quantised and LAYOUTS[scheme.formats[group.name]].input_scale
        inputs = [_number(amax, f"{module.name}.input_amax") for module in group.modules] if has_input else []
        has_above = is_quantised and LAYOUTS[scheme.formats[group.name]].spread == "fp4"
        likely = [_number(amax, f"{module.name}.weight_amax") for module in group.modules] if has_above else []
        for module in group.modules:
            if module.tensor not in originals.files:
                raise StaleRecord(f"{source} has no tensor {module.tensor}, which was measured; measure again")
            name, file = module.tensor, originals.file(module.tensor)
            if not is_quantised:
                weights[name] = Weight(file, name, group.name, module.name)
                continue
            own_format, how = scheme.formats[group.name], CARRIERS[carrier]
            layout = LAYOUTS[own_format]
            alike = [(module.name, one) for one in (own_format, get_format(own_format).weight_like or "")]
            in_blocks = layout.spread == "fp4"
            prefix, own = name.removesuffix(".weight"), {}
            codes = f"{prefix}.{how.codes}" if in_blocks or layout.sharing is not None else name
            for part, (shape, dtype) in layout.scales(originals.shape(name)).items():
                value = scale_of(max(inputs), layout.largest) if part == "input_scale" else None
                leaf, held, inverted = how.stored(part, shape, in_blocks)
                own[part] = f"{prefix}.{leaf}"
                scales[own[part]] = Scale(
                    file,
                    group.name,
                    module.name,
                    value,
                    codes if shape and part != "weight_shape" else None,
                    held,
                    dtype,
                    layout.largest,
                    by_row=layout.spread == "row",
                    inverted=inverted,
                    says=originals.shape(name) if part == "weight_shape" else None,
                    likely=scale_of(max(likely), layout.largest) if inverted else None,
                    zero_bits=layout.bits if part == "weight_zero_point" else None,
                )
            del weights[name]
            weights[codes] = Weight(
                file,
                name,
                group.name,
                module.name,
                True,
                layout.spread,
                next((rounded[key] for key in alike if key in rounded), None),
                own["weight_scale"],
                own.get("weight_scale_2"),
                layout.bits,
                own.get("input_scale"),
                own.get("weight_zero_point"),
            )
    config = read_json(source / CONFIG)
    section, legacy = _quantisation(scheme, measurement, carrier)
    return Expected(
        carrier=carrier,
        weights=weights,
        scales=scales,
        kv_scales=dict(_kv_scales(scheme, measurement, amax, originals)),
        config={**config, "quantization_config": section},
        legacy=legacy,
        side_files=side_files(source),
        has_index=(source / INDEX).exists(),
    )
