"""Finds the language model inside a model, its quant groups, and what is left alone and why.

Everything here works on the configuration and the headers of the weight files: the model is built on the meta device,
so that a model we can't handle is refused before anything is computed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitladder.errors import ModelError, UnsupportedModel
from bitladder.records import QuantGroup, QuantModule, UntouchedModule
from bitladder.weights import SIXTEEN_BIT_DTYPES, WeightFiles, read_config

# Linear modules that runtimes fuse into one, so that they must share a format and its scales.
# Source: vllm `packed_modules_mapping` of its decoder models; ModelOpt `quant_grouping_rules`.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
FP8_ALIGNMENT = 16  # FP8 matrix products need both dimensions divisible by 16 (torch._scaled_mm, CUTLASS)
# Modules whose weights a runtime might quantise; norms and the like are never touched.
_MATRIX_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EXPERTS = re.compile(r"(^|\.)(experts|expert)(\.|$)")


@dataclass(frozen=True)
class Target:
    """The searched part of a model.

    language_model: the language model's module path in the loaded model, "" where the model is nothing else.
    groups: the quant groups, in network order. untouched: every other linear, convolution or embedding, and why.
    """

    language_model: str
    groups: tuple[QuantGroup, ...]
    untouched: tuple[UntouchedModule, ...]


def model_class(config: Any) -> Any:
    """Return the transformers class that the configuration names.

    Raises:
        UnsupportedModel: transformers has no such class.
    """
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise UnsupportedModel(
        f"config.json names the architecture {', '.join(names) or '(none)'}, which transformers "
        f"{transformers.__version__} doesn't have; upgrade transformers or use a model without remote code"
    )


def load_config(directory: Path) -> Any:
    """Return the transformers configuration of a model directory.

    Raises:
        ModelError: missing, damaged. UnsupportedModel: unknown to transformers, or already quantised.
    """
    from transformers import AutoConfig

    raw = read_config(directory)
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedModel(f"{directory} is already quantised ({method}); start from the original checkpoint")
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(f"transformers can't read {directory / 'config.json'}: {reason}") from error


def embedding_rows(directory: Path) -> int | None:
    """Return how many tokens a model has embeddings for; None: its configuration doesn't say.

    Raises:
        ModelError: see `load_config`.
    """
    size = getattr(load_config(directory).get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def build_on_meta(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model without weights (meta device), for its structure; `dtype` is that of its parameters."""
    config = load_config(directory)
    cls = model_class(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def load_model(
    directory: Path | str, dtype: torch.dtype, device: str = "cpu", state_dict: dict[str, torch.Tensor] | None = None
) -> Any:
    """Return the model in evaluation mode, weights cast to `dtype`; `state_dict` takes the place of its files.

    Raises:
        ModelError: tensors are missing or left over.
    """
    directory = Path(directory)
    config = load_config(directory) if state_dict is None else None
    if config is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    cls = model_class(config)
    try:
        if state_dict is None:
            model, info = cls.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
        else:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(f"transformers can't load {directory}: {str(error).strip().splitlines()[0]}") from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{directory}: {len(wrong)} tensors are missing, left over or of another shape, e.g. {sorted(wrong)[0]}; "
            "config.json and the weights don't belong together"
        )
    return model.to(device).eval()


def checkpoint_tensor_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return which parameter of the loaded model each tensor of the checkpoint becomes.

    transformers 5 renames tensors while loading (`visual.*` -> `model.visual.*`); this applies its own rules.

    Args:
        model: the loaded model, or one on the meta device.
        names: the tensors' names in the files.

    Returns:
        `{tensor name in the files: parameter name in the model}`, without tensors that are merged or split on loading.

    Source: transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    table = {}
    for name in names:
        renamed, converted_by = rename_source_key(name, renamings, converters, prefix, state)
        if converted_by is None and renamed in state:
            table[name] = renamed
    return table


def image_token_ids(config: Any) -> list[int]:
    """Return the token ids that stand for pieces of pictures and videos in the model's input; none for plain text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({int(value) for name in names if (value := getattr(config, name, None)) is not None})


def find_language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the language model's module path ("" or dotted) and the module.

    Raises:
        UnsupportedModel: there is none, or the model is an encoder-decoder.
    """
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; Bitladder searches decoder-only language models")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if output is None or decoder is None or decoder is model:
        raise UnsupportedModel(
            f"{name} has no language model (no decoder with a vocabulary head); "
            "name a causal language model or a vision-language model that contains one"
        )
    paths = [path for path, module in model.named_modules() if module is decoder]
    return paths[0], decoder


def _decoder_layers(path: str, decoder: nn.Module) -> str:
    """Return the module path of the decoder's list of layers."""
    candidates = [
        f"{path}.{name}" if path else name
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if len(candidates) != 1:
        raise UnsupportedModel(
            f"{type(decoder).__name__} at {path!r} has {len(candidates)} lists of layers, one was expected; "
            "Bitladder searches decoder-only language models"
        )
    return candidates[0]


def _group_name(module: str) -> str:
    """Return the quant group of a module path: the fused module's path, or its own."""
    parent, _, leaf = module.rpartition(".")
    for fused, members in FUSED_MODULES.items():
        if leaf in members:
            return f"{parent}.{fused}"
    return module


def find_target(directory: Path) -> Target:
    """Return the quant groups of the language model in `directory`, and every other linear module with the reason.

    Raises:
        ModelError: files are missing or damaged. UnsupportedModel: nothing to search, with the reason.
    """
    weights = WeightFiles.open(directory)
    model = build_on_meta(directory)
    path, decoder = find_language_model(model)
    layers = _decoder_layers(path, decoder)
    experts = next((n for n, _ in model.named_modules() if n.startswith(f"{layers}.") and _EXPERTS.search(n)), None)
    if experts is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has experts ({experts}); mixtures of experts are not supported yet, "
            "dense decoder layers are"
        )
    tensor_of = {parameter: tensor for tensor, parameter in checkpoint_tensor_names(model, weights.tensors).items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    matrices = {name: module for name, module in model.named_modules() if isinstance(module, _MATRIX_MODULES)}
    linears = {name: module for name, module in matrices.items() if isinstance(module, nn.Linear)}
    searched: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for name, module in matrices.items():
        if name in linears and name.startswith(f"{layers}."):
            searched.setdefault(_group_name(name), []).append(name)
        elif module is model.get_output_embeddings():
            reasons[name] = "vocabulary head: not searched"
        elif module is model.get_input_embeddings():
            reasons[name] = "token embedding: not searched"
        elif name.startswith(f"{path}.") or not path:
            reasons[name] = "language model, outside the decoder layers: not searched"
        else:
            reasons[name] = "outside the language model (vision tower, projector): not searched"

    groups = []
    for group, members in searched.items():
        problem = _why_not(members, linears, tensor_of, weights)
        if problem is not None:
            reasons.update(dict.fromkeys(members, problem))
            continue
        leaf = group.rpartition(".")[2]
        order = FUSED_MODULES.get(leaf, ())
        if order:
            members = sorted(members, key=lambda name: order.index(name.rpartition(".")[2]))
        modules = tuple(
            QuantModule(
                name=name,
                tensor=tensor_of[f"{name}.weight"],
                shape=(linears[name].out_features, linears[name].in_features),
            )
            for name in members
        )
        elements = sum(linears[name].weight.numel() for name in members)
        groups.append(QuantGroup(name=group, modules=modules, weight_elements=elements))
    if not groups:
        why = next(
            (reason for name, reason in reasons.items() if name.startswith(f"{layers}.")),
            "its decoder layers hold no torch.nn.Linear",
        )
        raise UnsupportedModel(f"{type(model).__name__}: nothing to quantise in {layers}: {why}")
    untouched = []
    for name in matrices:
        if name not in reasons:
            continue
        tensor = tensor_of.get(f"{name}.weight")
        if tensor is None and f"{name}.weight" in tied:
            tensor = f"{name}.weight"  # tied: not in the files, but the runtime builds the module
        if tensor is None:
            tensor = f"{name}.weight"  # merged or split on loading: the runtime knows the module's own name
        untouched.append(
            UntouchedModule(name=name, checkpoint_name=tensor.removesuffix(".weight"), reason=reasons[name])
        )
    return Target(path, tuple(groups), tuple(untouched))


def _why_not(
    members: list[str], linears: dict[str, nn.Linear], tensor_of: dict[str, str], weights: WeightFiles
) -> str | None:
    """Return why a group's modules can't be quantised, or None."""
    for name in members:
        out_features, in_features = linears[name].out_features, linears[name].in_features
        if out_features % FP8_ALIGNMENT or in_features % FP8_ALIGNMENT:
            return (
                f"shape [{out_features}, {in_features}] of {name} is not divisible by {FP8_ALIGNMENT}: "
                "no FP8 matrix product"
            )
        tensor = tensor_of.get(f"{name}.weight")
        if tensor is None:
            return f"{name}.weight is not stored under one name in the checkpoint"
        dtype = weights.tensors[tensor].dtype
        if dtype not in SIXTEEN_BIT_DTYPES:
            return f"{tensor} is stored as {dtype}; only {' and '.join(SIXTEEN_BIT_DTYPES)} weights are quantised"
    return None
