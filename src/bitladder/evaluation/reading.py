"""A checkpoint's files -> a model that computes what they say."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from bitladder.errors import ModelError, foreign
from bitladder.evaluation.metrics import EXPORT_AGAIN
from bitladder.formats import (
    CARRIED_SCALES,
    COMPRESSED_TENSORS,
    FORMATS,
    INPUT_SCALE,
    KV_SCALE_NAMES,
    KV_SKIPS,
    MODELOPT,
    SCALE_DTYPE,
    WEIGHT,
    WEIGHT_PACKED,
    Arithmetic,
    Format,
    Layout,
    Part,
    format_of_algorithm,
    format_of_group,
    get_format,
    grids,
)
from bitladder.formats.kv_cache import Fp8Cache
from bitladder.models.kv_layers import cache_inputs, layer_index
from bitladder.models.loading import checkpoint_tensor_names, load_model
from bitladder.models.weights import WeightFiles, all_finite, read_config
from bitladder.reading import check_regular
from bitladder.records import layer_number

_INTEGERS = ("I8", "I32")


class FakeQuantLinear(nn.Module):
    """A linear module with dequantised weights [out_features, in_features], whose input is rounded by its format."""

    def __init__(self, linear: nn.Linear, format_: Format, input_scale: torch.Tensor | None) -> None:
        super().__init__()
        self.format = format_
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer(INPUT_SCALE, input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of the rounded input [..., in_features]: [..., out_features]."""
        scale: Any = self.input_scale
        return nn.functional.linear(self.format.served_input(x, scale), self.weight, self.bias)


def quantised_tensors(files: WeightFiles) -> list[str]:
    """Return the names of the weights that are stored as codes, sorted, as the original has them."""
    return sorted(_codes(files))


def _codes(files: WeightFiles) -> dict[str, str]:
    """Return the tensors of codes by the names of the weights that they stand for."""
    dtypes = {one.code_dtype for one in FORMATS.values()}
    scales = {*CARRIED_SCALES, *KV_SCALE_NAMES}
    found = {}
    for name, info in files.tensors.items():
        module, _, leaf = name.rpartition(".")
        # tables of a model may be integers, too
        of_a_weight = leaf in (WEIGHT, WEIGHT_PACKED) or info.dtype not in _INTEGERS
        if info.dtype in dtypes and leaf not in scales and of_a_weight:
            found[f"{module}.{WEIGHT}" if leaf == WEIGHT_PACKED else name] = name
    return found


@dataclass(frozen=True)
class _Stored:
    """A weight that is stored as codes, under the name that the original has."""

    weight: str
    codes: str  # the tensor that holds them
    format: Format
    layout: Layout

    def place(self, part: Part) -> Part:
        """Return a part of it as the file must have it."""
        name = f"{self.weight.removesuffix('.weight')}.{self.layout.name(part.name)}"
        return Part(name, part.dtype, self.layout.shape(part), packed=part.packed)


def _algorithms(section: Mapping[str, Any]) -> Callable[[str], tuple[str, Format | None]]:
    """Return what tells a module's format by `config.json`: what is said of it there, and the format of ours."""
    if section.get("quant_method") == COMPRESSED_TENSORS:
        groups = section.get("config_groups") or {}
        listed = {target: (name, group) for name, group in groups.items() for target in group.get("targets") or ()}

        def of_group(module: str) -> tuple[str, Format | None]:
            name, group = listed.get(module, ("in no config group", {}))
            return name, format_of_group(group)

        return of_group
    layers = section.get("quantized_layers") or {}

    def of_algorithm(module: str) -> tuple[str, Format | None]:
        algorithm = str((layers.get(module) or {}).get("quant_algo") if layers else section.get("quant_algo"))
        return algorithm, format_of_algorithm(algorithm)

    return of_algorithm


def _stored(files: WeightFiles, section: dict[str, Any], arithmetic: Mapping[str, Arithmetic]) -> Iterator[_Stored]:
    """Yield every stored weight with its format by `config.json`: of each module in a mix, else of all.

    Args:
        files: the checkpoint's.
        section: `quantization_config` of its configuration.
        arithmetic: see `load_checkpoint`.

    Raises:
        ModelError: the configuration names none of ours, or not all modules of a mix, or the codes are of another one.
    """
    directory, of_module = files.directory, _algorithms(section)
    carrier = COMPRESSED_TENSORS if section.get("quant_method") == COMPRESSED_TENSORS else MODELOPT
    for weight, name in sorted(_codes(files).items()):
        module = weight.removesuffix(".weight")
        said, format_ = of_module(module)
        if format_ is None:
            raise ModelError(
                f"{directory / 'config.json'}: {module} is stored as codes, but its "
                f"{'quant_algo' if carrier == MODELOPT else 'config group'} is {said}; known: "
                f"{', '.join(_names(carrier))}; {EXPORT_AGAIN}"
            )
        layout = format_.layouts[carrier]
        leaf = layout.name(WEIGHT)
        if files.tensors[name].dtype != format_.code_dtype or name != f"{module}.{leaf}":
            held = f"is {files.tensors[name].dtype}"
            raise ModelError(
                f"{directory / files.tensors[name].file}: {name} {held}, but {said} is "
                f"stored as {format_.code_dtype}{'' if leaf == WEIGHT else f' {leaf}'}; {EXPORT_AGAIN}"
            )
        yield _Stored(weight, name, get_format(format_.name, arithmetic), layout)


def _names(carrier: str) -> list[str]:
    """Return what the formats that a carrier holds are called in messages about its configuration."""
    held = [one for one in FORMATS.values() if carrier in one.layouts]
    return [one.modelopt_algorithm if carrier == MODELOPT else one.name for one in held]


def _scale(files: WeightFiles, weight: str, part: Part) -> torch.Tensor:
    """Return what a part (weight_scale, input_scale, k_scale ...) holds, of its dtype and shape: scales are positive.

    Args:
        files: the checkpoint's.
        weight: the tensor of codes beside which it lies.
        part: under its name in the files.
    """
    name = part.name
    if name not in files.tensors:
        file = files.directory / files.tensors[weight].file
        raise ModelError(f"{file}: {weight} is stored as codes, but its {name} is missing; {EXPORT_AGAIN}")
    scale = files.load(name)
    one = len(part.shape) < 2 and math.prod(part.shape) == 1
    right_shape = scale.numel() == 1 if one else tuple(scale.shape) == part.shape
    values = grids.powers(scale) if part.dtype == "U8" else scale.float()
    positive = part.packed or bool(((values > 0) & (values < math.inf)).all())
    if files.tensors[name].dtype != part.dtype or not right_shape or not positive:
        file = files.directory / files.tensors[name].file
        dtype = "float32" if part.dtype == SCALE_DTYPE else part.dtype
        count = " x ".join(map(str, part.shape))
        kind = dtype if part.packed else f"positive {dtype}"
        wanted = f"one {kind} number" if one else f"{count} {kind} numbers"
        raise ModelError(f"{file}: {name} is not {wanted}; {EXPORT_AGAIN}")
    return scale


def _use_generation_config(model: Any, directory: Path) -> None:
    """Give the model the directory's generation_config.json, which a load from tensors passes over.

    Without it a checkpoint would stop at other tokens, and repeat itself more freely, than the original it is compared
    with.
    """
    path = directory / "generation_config.json"
    if not path.exists() or not model.can_generate():
        return
    from transformers import GenerationConfig

    with foreign(ModelError, f"{path} is damaged", EXPORT_AGAIN):
        check_regular(path)
        model.generation_config = GenerationConfig.from_pretrained(directory)


def load_checkpoint(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    arithmetic: Mapping[str, Arithmetic] = MappingProxyType({}),
) -> Any:
    """Return the model that an exported directory holds, with dequantised weights and fake-quantised inputs.

    Args:
        directory: the checkpoint.
        dtype: of weights and arithmetic.
        device: where it goes.
        arithmetic: format -> how the device that will serve computes it, where that isn't as it is stored.

    Raises:
        ModelError: a scale or weight is missing or left over, or is not what it should be; names file and tensor.
    """
    files = WeightFiles.open(directory)
    config = read_config(directory)
    if _codes(files) and "quantization_config" not in config:
        raise ModelError(
            f"{directory / 'config.json'} has no quantization_config, but weights are codes; {EXPORT_AGAIN}"
        )
    section = config.get("quantization_config") or {}
    stored = {one.weight: one for one in _stored(files, section, arithmetic)}
    state: dict[str, torch.Tensor] = {}
    input_scales: dict[str, torch.Tensor | None] = {}
    used: set[str] = set()
    for one in stored.values():
        name = one.weight
        state[name], input_scales[name] = _weight(files, one, dtype)
        used |= {one.codes} | {one.place(part).name for part in one.format.parts(state[name].shape)}
    kv_scales = [name for name in files.tensors if name.rpartition(".")[2] in KV_SCALE_NAMES]
    _check_kv_scales(files, section.get("kv_cache_scheme") is not None, kv_scales)
    skipped = _kv_skips(files, section, kv_scales)
    used.update(kv_scales)
    for name, info in files.tensors.items():
        if name in used:
            continue
        if name.rpartition(".")[2] in CARRIED_SCALES:
            raise ModelError(
                f"{directory / info.file}: {name} belongs to no weight whose format has it; {EXPORT_AGAIN}"
            )
        state[name] = files.load(name)
    names = sorted(state)
    model = load_model(directory, dtype, state_dict=state)
    _use_generation_config(model, directory)
    modules = checkpoint_tensor_names(model, names)
    for name, scale in input_scales.items():
        path = modules.get(name, "").removesuffix(".weight")
        linear = model.get_submodule(path) if path else None
        if not isinstance(linear, nn.Linear):
            file = directory / files.tensors[stored[name].codes].file
            raise ModelError(f"{file}: {name} is stored as codes, but it is no linear module's weight; {EXPORT_AGAIN}")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantLinear(linear, stored[name].format, scale))
    layers: dict[int, dict[str, torch.Tensor]] = {}
    model.kv_skips = set()
    for name in kv_scales:
        weight, _, kind = name.rpartition(".")
        layer = layer_index(model, modules[f"{weight}.weight"].removesuffix(".weight"))
        scale = _scale(files, f"{weight}.weight", Part(name, SCALE_DTYPE, ()))
        layers.setdefault(layer, {})[kind] = scale.reshape(()).to(device)
        if layer_number(name) in skipped:
            model.kv_skips.add(layer)
    model.kv_scales = {layer: (pair["k_scale"], pair["v_scale"]) for layer, pair in layers.items()}
    return model.to(device).eval()


def _weight(files: WeightFiles, stored: _Stored, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a weight that its codes restore, and the scale of its input where there is one."""
    info, format_ = files.tensors[stored.codes], stored.format
    where, shape = files.directory / info.file, format_.weight_shape(info.shape)
    problem = format_.why_not(shape)
    if problem is not None:
        raise ModelError(f"{where}: {stored.codes}: shape {list(shape)} {problem}; {EXPORT_AGAIN}")
    parts = {}
    for part in format_.parts(shape):
        if part.counts:
            _check_shape(files, stored, stored.place(part), shape)
            continue
        scale = _scale(files, stored.codes, stored.place(part))
        parts[part.name] = stored.layout.restored(part.name, scale.reshape(part.shape))
    weight = format_.served_weight({WEIGHT: files.load(stored.codes), **parts}, dtype)
    if not all_finite(weight):
        raise ModelError(f"{where}: {stored.codes} holds NaN or overflows {dtype}; {EXPORT_AGAIN}")
    return weight, parts.get(INPUT_SCALE)


def _check_shape(files: WeightFiles, stored: _Stored, part: Part, shape: tuple[int, int]) -> None:
    """Check what says how large a packed weight is."""
    where = files.directory / files.tensors[stored.codes].file
    if part.name not in files.tensors:
        raise ModelError(f"{where}: {stored.codes} is stored as codes, but its {part.name} is missing; {EXPORT_AGAIN}")
    found = files.load(part.name).tolist()
    if found != list(shape):
        raise ModelError(f"{where}: {part.name} is {found}, but {stored.codes} holds {list(shape)}; {EXPORT_AGAIN}")


def _check_kv_scales(files: WeightFiles, asked: bool, kv_scales: list[str]) -> None:
    """Check that keys and values have scales exactly where config.json asks for an FP8 KV cache."""
    directory = files.directory
    if asked and not kv_scales:
        raise ModelError(
            f"{directory / 'config.json'} asks for an FP8 KV cache, but keys and values have no scales; {EXPORT_AGAIN}"
        )
    for name in kv_scales:
        if not asked:
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} is there, but config.json asks for no FP8 KV cache; {EXPORT_AGAIN}")
        prefix, _, kind = name.rpartition(".")
        leaf, other = ("k_proj", "v_proj.v_scale") if kind == "k_scale" else ("v_proj", "k_proj.k_scale")
        partner = f"{prefix.removesuffix(leaf)}{other}"
        if not prefix.endswith(f".{leaf}") or partner not in files.tensors:
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} has no partner {partner}; {EXPORT_AGAIN}")


def _kv_skips(files: WeightFiles, section: Mapping[str, Any], kv_scales: list[str]) -> set[int]:
    """Return the numbers of the layers whose cache stays in 16 bits, each of which must have scales that others use."""
    known = {str(layer_number(name)): layer_number(name) for name in kv_scales}
    listed = section.get(KV_SKIPS) or []
    odd = [one for one in listed if one not in known] if isinstance(listed, list) else [listed]
    if odd:
        raise ModelError(
            f"{files.directory / 'config.json'}: {KV_SKIPS} names {odd[0]!r}, which is no layer whose keys and values "
            f"have scales; {EXPORT_AGAIN}"
        )
    return {known[one] for one in listed}


def cached(model: Any) -> dict[str, Any]:
    """Return what a loaded checkpoint is called with for its whole input to go through a new cache, as it asks for.

    That is an FP8 one, or none at all: what is in 16 bits isn't changed by being stored.
    """
    scales = getattr(model, "kv_scales", None)
    return cache_inputs(model, Fp8Cache(model.config, scales, model.kv_skips) if scales else None)
