"""What a checkpoint must hold, from source, scheme and measurement alone: `expect(...) -> Expected`.

Nothing here has seen a checkpoint or its manifest, and nothing is taken from the exporter: what it writes is
written out here a second time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bitladder.errors import RecordError, StaleRecord
from bitladder.models.sources import side_files
from bitladder.reading import read_json
from bitladder.records import BF16, Measurement, RoundedModule, Scheme
from bitladder.verification.reading import INDEX, Tensors

CONFIG, LEGACY = "config.json", "hf_quant_config.json"
_KV_FORMATS = (None, "fp8")
_KV_MODULES = ("k_proj", "v_proj")
# Source: modelopt 0.47.0, torch/export/convert_hf_config.py and quant_utils.py; tests compare with its export.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_E4M3: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_E2M1: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
E2M1_MAX = 6.0
BLOCK = 16  # elements of a row that share a scale
EXPONENT_BLOCK = 32  # elements of a row that share an exponent
SQUARE = 128  # rows and columns that share a scale
# What a weight's scales are for: all of it, a row, a square of rows and columns, a block of a row of
# packed codes, or a block of a row, as an exponent.
Spread = Literal["tensor", "row", "square", "fp4", "exponent"]


@dataclass(frozen=True)
class _Layout:
    """What a file holds of a format: its `quant_algo`, what a weight's scale is for, whether an input has one."""

    algorithm: str
    weights: dict[str, Any] | None  # in `config_groups`; None: the algorithm is all that is said there
    inputs: dict[str, Any] | None  # there, too; None: nothing is said of them
    input_scale: bool
    spread: Spread = "tensor"
    grouped_alone: bool = True  # whether `config_groups` are written where a checkpoint has this format only

    @property
    def entry(self) -> dict[str, Any]:
        """What is said of a module in `quantized_layers`."""
        size = {"fp4": BLOCK, "exponent": EXPONENT_BLOCK}.get(self.spread)
        return {"quant_algo": self.algorithm, **({"group_size": size} if size else {})}

    @property
    def group(self) -> dict[str, Any]:
        """What is said in `config_groups`."""
        if self.weights is None:
            return {"quant_algo": self.algorithm}
        return {"weights": self.weights, **({} if self.inputs is None else {"input_activations": self.inputs})}

    @property
    def largest(self) -> float:
        """What the largest value of a weight or an input is stored as."""
        return E4M3_MAX * E2M1_MAX if self.spread == "fp4" else E4M3_MAX

    def scales(self, shape: tuple[int, ...]) -> "dict[str, tuple[tuple[int, ...], torch.dtype]]":
        """Return `{part: (shape, dtype)}` of the scales of a weight."""
        number: tuple[tuple[int, ...], torch.dtype] = (), torch.float32
        found = {"weight_scale": number}
        if self.spread == "row":
            found = {"weight_scale": ((shape[0],), torch.float32)}
        elif self.spread == "square":
            found = {"weight_scale": ((shape[0] // SQUARE, 1, shape[1] // SQUARE, 1), torch.float32)}
        elif self.spread == "exponent":
            found = {"weight_scale": ((shape[0], shape[1] // EXPONENT_BLOCK), torch.uint8)}
        elif self.spread == "fp4":
            blocks = (shape[0], shape[1] // BLOCK)
            found = {"weight_scale": (blocks, torch.float8_e4m3fn), "weight_scale_2": number}
        return found | ({"input_scale": number} if self.input_scale else {})


# Source: modelopt 0.47.0, torch/export/convert_hf_config.py.
_LAYOUTS = {
    "fp8": _Layout("FP8", weights=_E4M3, inputs=_E4M3, input_scale=True),
    "fp8_pc_pt": _Layout(
        "FP8_PER_CHANNEL_PER_TOKEN",
        weights={**_E4M3, "strategy": "channel"},
        inputs=_E4M3,
        input_scale=False,
        spread="row",
        grouped_alone=False,
    ),
    "fp8_block": _Layout(
        "fp8_pb_wo", weights=None, inputs=None, input_scale=False, spread="square", grouped_alone=False
    ),
    "mxfp8": _Layout(
        "MXFP8",
        weights={**_E4M3, "group_size": EXPONENT_BLOCK},
        inputs={**_E4M3, "group_size": EXPONENT_BLOCK},
        input_scale=False,
        spread="exponent",
        grouped_alone=False,
    ),
    "nvfp4": _Layout("NVFP4", weights=_E2M1, inputs=_E2M1, input_scale=True, spread="fp4"),
    "nvfp4_w4a16": _Layout("W4A16_NVFP4", weights=_E2M1, inputs=None, input_scale=False, spread="fp4"),
}


@dataclass(frozen=True)
class Weight:
    """A tensor of the source, in the file in which the checkpoint has it too."""

    file: str
    group: str | None = None  # None: not searched
    module: str = ""
    is_quantised: bool = False
    spread: Spread = "tensor"
    rounded: RoundedModule | None = None  # compensated codes

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


@dataclass(frozen=True)
class Expected:
    """Everything that a checkpoint's directory must hold, and nothing else may."""

    weights: dict[str, Weight]  # tensor -> ..., of the source
    scales: dict[str, Scale]
    kv_scales: dict[str, Scale]
    config: dict[str, Any]
    legacy: dict[str, Any]
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
        return frozenset([*self.placed.values(), CONFIG, LEGACY, *index, *self.side_files])


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


def _quantisation(scheme: Scheme, measurement: Measurement) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `quantization_config` and `hf_quant_config.json`."""
    layers = {
        (module.tensor or module.name).removesuffix(".weight"): scheme.formats[group.name]
        for group in measurement.groups
        for module in group.modules
        if scheme.formats[group.name] != BF16
    }
    used = list(dict.fromkeys(layers.values()))
    algorithm = "MIXED_PRECISION" if len(used) > 1 else _LAYOUTS[used[0]].algorithm
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
            **_LAYOUTS[name].group,
        }
        for index, name in enumerate(used)
    }
    if len(used) > 1 or _LAYOUTS[used[0]].grouped_alone:
        section["config_groups"] = groups
    if scheme.kv_cache_format is not None:
        section["kv_cache_scheme"] = _E4M3
    kv_cache = None if scheme.kv_cache_format is None else "FP8"
    legacy: dict[str, Any] = {"kv_cache_quant_algo": kv_cache, "exclude_modules": names}
    legacy |= {"quant_algo": algorithm} if len(used) > 1 else _LAYOUTS[used[0]].entry
    if len(used) > 1:
        each = {module: _LAYOUTS[name].entry for module, name in layers.items()}
        section["quantized_layers"] = legacy["quantized_layers"] = each
    return section, {"producer": _PRODUCER, "quantization": legacy}


def check_scheme(scheme: Scheme, measurement: Measurement) -> None:
    """Check that a scheme is one of this measurement, and that its exclusions are what it leaves in 16 bits.

    Raises:
        StaleRecord: it isn't.
    """
    known = {BF16, *_LAYOUTS}
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
    scheme: Scheme, measurement: Measurement, amax: Mapping[str, torch.Tensor], source: Path, originals: Tensors
) -> Expected:
    """Return what the scheme's checkpoint must hold.

    Args:
        scheme: of the measurement.
        measurement: whose modules, and codes where they are compensated.
        amax: its amax values, `{"<module>.input_amax": float32 scalar}`.
        source: the original model's directory.
        originals: its tensors.

    Raises:
        StaleRecord: the scheme is of another measurement. RecordError: an amax value is missing.
    """
    check_scheme(scheme, measurement)
    rounding = measurement.rounding.modules if measurement.rounding is not None else ()
    rounded = {module.name: module for module in rounding}
    weights = {name: Weight(originals.file(name)) for name in originals.files}
    scales: dict[str, Scale] = {}
    for group in measurement.groups:
        is_quantised = scheme.formats[group.name] != BF16
        # What a runtime fuses has one input, and one scale for it.
        has_input = is_quantised and _LAYOUTS[scheme.formats[group.name]].input_scale
        inputs = [_number(amax, f"{module.name}.input_amax") for module in group.modules] if has_input else []
        for module in group.modules:
            if module.tensor not in weights:
                raise StaleRecord(f"{source} has no tensor {module.tensor}, which was measured; measure again")
            name, file = module.tensor, originals.file(module.tensor)
            if not is_quantised:
                weights[name] = Weight(file, group.name, module.name)
                continue
            layout = _LAYOUTS[scheme.formats[group.name]]
            weights[name] = Weight(file, group.name, module.name, True, layout.spread, rounded.get(module.name))
            for part, (shape, dtype) in layout.scales(originals.shape(name)).items():
                value = scale_of(max(inputs), layout.largest) if part == "input_scale" else None
                many_of = name if shape else None
                scales[f"{name.removesuffix('.weight')}.{part}"] = Scale(
                    file, group.name, module.name, value, many_of, shape, dtype, layout.largest
                )
    config = read_json(source / CONFIG)
    section, legacy = _quantisation(scheme, measurement)
    return Expected(
        weights=weights,
        scales=scales,
        kv_scales=dict(_kv_scales(scheme, measurement, amax, originals)),
        config={**config, "quantization_config": section},
        legacy=legacy,
        side_files=side_files(source),
        has_index=(source / INDEX).exists(),
    )
