"""A checkpoint's files -> a model that computes what they say."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitladder.errors import ModelError, foreign
from bitladder.evaluation.metrics import EXPORT_AGAIN
from bitladder.formats import (
    FORMATS,
    INPUT_SCALE,
    KV_SCALE_NAMES,
    SCALE_DTYPE,
    SCALE_NAMES,
    WEIGHT,
    Format,
    Part,
    format_of_algorithm,
    grids,
)
from bitladder.formats.kv_cache import Fp8Cache
from bitladder.models.kv_layers import cache_inputs, layer_index
from bitladder.models.loading import checkpoint_tensor_names, load_model
from bitladder.models.weights import WeightFiles, all_finite, read_config
from bitladder.reading import check_regular


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
        return nn.functional.linear(self.format.round_input(x, scale), self.weight, self.bias)


def quantised_tensors(files: WeightFiles) -> list[str]:
    """Return the names of the weights that are stored as codes, sorted."""
    dtypes = {one.code_dtype for one in FORMATS.values()}
    scales = {*SCALE_NAMES, *KV_SCALE_NAMES}
    return sorted(
        name for name, info in files.tensors.items() if info.dtype in dtypes and name.rpartition(".")[2] not in scales
    )


def _formats_of(files: WeightFiles, section: dict[str, Any], codes: Iterable[str]) -> dict[str, Format]:
    """Return the format of every stored weight by `config.json`: of each module in a mix, else of all.

    Args:
        files: the checkpoint's.
        section: `quantization_config` of its configuration.
        codes: names of the weights that are stored as codes.

    Raises:
        ModelError: the configuration names none of ours, or not all modules of a mix, or the codes are of another one.
    """
    directory = files.directory
    layers = section.get("quantized_layers") or {}
    found = {}
    for name in codes:
        module = name.removesuffix(".weight")
        algorithm = (layers.get(module) or {}).get("quant_algo") if layers else section.get("quant_algo")
        format_ = format_of_algorithm(str(algorithm))
        if format_ is None:
            raise ModelError(
                f"{directory / 'config.json'}: {module} is stored as codes, but its quant_algo is {algorithm}; known: "
                f"{', '.join(one.modelopt_algorithm for one in FORMATS.values())}; {EXPORT_AGAIN}"
            )
        if files.tensors[name].dtype != format_.code_dtype:
            raise ModelError(
                f"{directory / files.tensors[name].file}: {name} is {files.tensors[name].dtype}, but {algorithm} is "
                f"stored as {format_.code_dtype}; {EXPORT_AGAIN}"
            )
        found[name] = format_
    return found


def _scale(files: WeightFiles, weight: str, part: Part) -> torch.Tensor:
    """Return a part (weight_scale, input_scale, k_scale ...) of a weight: positive numbers of its dtype and shape."""
    name = f"{weight.removesuffix('.weight')}.{part.name}"
    if name not in files.tensors:
        file = files.directory / files.tensors[weight].file
        raise ModelError(f"{file}: {weight} is stored as codes, but its {name} is missing; {EXPORT_AGAIN}")
    scale = files.load(name)
    right_shape = tuple(scale.shape) == part.shape if part.shape else scale.numel() == 1
    values = grids.powers(scale) if part.dtype == "U8" else scale.float()
    if (
        files.tensors[name].dtype != part.dtype
        or not right_shape
        or not bool(((values > 0) & (values < math.inf)).all())
    ):
        file = files.directory / files.tensors[name].file
        dtype = "float32" if part.dtype == SCALE_DTYPE else part.dtype
        count = " x ".join(map(str, part.shape))
        wanted = f"{count} positive {dtype} numbers" if part.shape else f"one positive {dtype} number"
        raise ModelError(f"{file}: {name} is not {wanted}; {EXPORT_AGAIN}")
    return scale.reshape(part.shape)


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


def load_checkpoint(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the model that an exported directory holds, with dequantised weights and fake-quantised inputs.

    Raises:
        ModelError: a scale or weight is missing or left over, or is not what it should be; names file and tensor.
    """
    files = WeightFiles.open(directory)
    codes = quantised_tensors(files)
    config = read_config(directory)
    if codes and "quantization_config" not in config:
        raise ModelError(
            f"{directory / 'config.json'} has no quantization_config, but weights are codes; {EXPORT_AGAIN}"
        )
    section = config.get("quantization_config") or {}
    formats = _formats_of(files, section, codes)
    state: dict[str, torch.Tensor] = {}
    input_scales: dict[str, torch.Tensor | None] = {}
    used: set[str] = set()
    for name, format_ in formats.items():
        info = files.tensors[name]
        shape = format_.weight_shape(info.shape)
        problem = format_.why_not(shape)
        if problem is not None:
            raise ModelError(f"{directory / info.file}: {name}: shape {list(shape)} {problem}; {EXPORT_AGAIN}")
        parts = {part.name: _scale(files, name, part) for part in format_.parts(shape)}
        used |= {f"{name.removesuffix('.weight')}.{part}" for part in parts}
        state[name] = format_.decode({WEIGHT: files.load(name), **parts}, dtype)
        if not all_finite(state[name]):
            raise ModelError(f"{directory / info.file}: {name} holds NaN or overflows {dtype}; {EXPORT_AGAIN}")
        input_scales[name] = parts.get(INPUT_SCALE)
    kv_scales = [name for name in files.tensors if name.rpartition(".")[2] in KV_SCALE_NAMES]
    _check_kv_scales(files, section.get("kv_cache_scheme") is not None, kv_scales)
    used.update(kv_scales)
    for name, info in files.tensors.items():
        if name in input_scales or name in used:
            continue
        if name.rpartition(".")[2] in SCALE_NAMES:
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
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} is stored as codes, but it is no linear module's weight; {EXPORT_AGAIN}")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantLinear(linear, formats[name], scale))
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name in kv_scales:
        weight, _, kind = name.rpartition(".")
        layer = layer_index(model, modules[f"{weight}.weight"].removesuffix(".weight"))
        layers.setdefault(layer, {})[kind] = _scale(files, f"{weight}.weight", Part(kind, SCALE_DTYPE, ())).to(device)
    model.kv_scales = {layer: (pair["k_scale"], pair["v_scale"]) for layer, pair in layers.items()}
    return model.to(device).eval()


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


def cached(model: Any) -> dict[str, Any]:
    """Return what a loaded checkpoint is called with for its whole input to go through a new cache, as it asks for.

    That is an FP8 one, or none at all: what is in 16 bits isn't changed by being stored.
    """
    scales = getattr(model, "kv_scales", None)
    return cache_inputs(model, Fp8Cache(model.config, scales) if scales else None)
