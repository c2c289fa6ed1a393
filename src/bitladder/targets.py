"""Finds the language model inside a model, its quant groups, and what is left alone and why.

Everything here works on the configuration and the headers of the weight files: the model is built on the meta device,
so that a model we can't handle is refused before anything is computed.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitladder.anatomy import Anatomy, look
from bitladder.errors import ModelError, UnsupportedModel, foreign
from bitladder.models.fusing import Fusing
from bitladder.models.sources import (
    as_loaded,
    check_fit,
    check_head,
    check_side_files,
    names_when_loaded,
    split_when_loaded,
)
from bitladder.records import QuantGroup, QuantModule, UntouchedModule
from bitladder.weights import SIXTEEN_BIT_DTYPES, WeightFiles, read_config

_QUANTISATION_KEYS = ("quantization_config", "compression_config")
LEGACY_QUANTISATION = "hf_quant_config.json"  # of ModelOpt's exports
FP8_ALIGNMENT = 16  # FP8 matrix products need both dimensions divisible by 16 (torch._scaled_mm, CUTLASS)
# Modules whose weights a runtime might quantise; norms and the like are never touched.
_MATRIX_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ZERO_WEIGHTS = "all zero in its weights: no FP8 scale"  # why a group isn't searched
BYPASSED = "the model's code uses its weights without running it: nothing says what its input would be"
UNREACHED = "text doesn't reach it (cross-attention, an adapter): not searched"
_EXPERTS = re.compile(r"(^|\.)(experts|expert)(\.|$)")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")  # keys of configurations
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Target:
    """The searched part of a model.

    language_model: the language model's module path in the loaded model, "" where the model is nothing else.
    groups: the quant groups, in network order. untouched: every other linear, convolution or embedding, and why.
    name: the model's class. anatomy: what its decoder layers do with hidden states.
    """

    language_model: str
    groups: tuple[QuantGroup, ...]
    untouched: tuple[UntouchedModule, ...]
    name: str = ""
    anatomy: Anatomy = field(default_factory=Anatomy, compare=False)


def model_class(config: Any) -> Any:
    """Return the transformers class that the configuration names.

    Raises:
        UnsupportedModel: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names or not isinstance(names, list | tuple):
        raise UnsupportedModel(
            "config.json has no list of `architectures`; put the name of the model's transformers class there, "
            '"architectures": ["LlamaForCausalLM"] for example'
        )
    names = [str(name) for name in names]
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise UnsupportedModel(
        f"config.json names the architecture {', '.join(names)}, which transformers "
        f"{transformers.__version__} doesn't have as a model; upgrade transformers or use a model without remote code"
    )


def load_config(directory: Path) -> Any:
    """Return the transformers configuration of a model directory.

    Raises:
        ModelError: missing, damaged. UnsupportedModel: unknown to transformers, or already quantised.
    """
    import transformers
    from transformers import AutoConfig

    raw = read_config(directory)
    method = _quantised_by(raw, directory)
    if method is not None:
        raise UnsupportedModel(f"{directory} is already quantised ({method}); start from the original checkpoint")
    _check_layers(raw, directory)
    try:
        with foreign(UnsupportedModel, f"transformers can't read {directory / 'config.json'}", "correct it"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except UnsupportedModel as error:
        if "auto_map" in raw:
            raise UnsupportedModel(
                f"{directory} brings code of its own (model_type {raw.get('model_type')!r}), which isn't run; "
                f"architectures of transformers {transformers.__version__} are taken: upgrade it, or convert the model "
                "to one that it has"
            ) from error
        raise
    return _unquantised(config)


def _check_layers(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a number of layers that no model has: transformers makes lists of that length.

    Raises:
        ModelError: there are more.
    """
    sections = [config, config.get("text_config"), config.get("vision_config")]
    for section in [section for section in sections if isinstance(section, dict)]:
        for key in _LAYER_COUNTS:
            number = section.get(key)
            if isinstance(number, int | float) and number > _MOST_LAYERS:
                raise ModelError(f"{directory / 'config.json'}: {key} is {number}, no model has so many; correct it")


def _quantised_by(config: Mapping[str, Any], directory: Path) -> str | None:
    """Return how a model is quantised already, by its configuration; None: it isn't.

    Raises:
        ModelError: it says so in a form that nobody can read.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in _QUANTISATION_KEYS:
            value = section.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ModelError(
                    f"{directory / 'config.json'}: {key} is no JSON object; remove it if the weights aren't quantised"
                )
            return str(value.get("quant_method", "unknown method"))
    return LEGACY_QUANTISATION if (directory / LEGACY_QUANTISATION).exists() else None


def _unquantised(config: Any) -> Any:
    """Return the configuration without its section about quantisation, null included, which transformers trips over."""
    for section in (config, config.get_text_config()):
        for key in _QUANTISATION_KEYS:
            if hasattr(section, key):
                delattr(section, key)
    return config


def embedding_rows(directory: Path) -> int | None:
    """Return how many tokens a model has embeddings for; None: its configuration doesn't say.

    Raises:
        ModelError: see `load_config`.
    """
    size = getattr(load_config(directory).get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


_NO_POSITIONS = ("alibi", "nope")  # by `position_embedding_type`
# Types whose max_position_embeddings holds what `factor` makes of it already.
_FACTOR_IS_IN = ("longrope", "llama3", "yarn", "su", "deepseek_yarn", "deepseek_llama_scaling")


def most_positions(directory: Path) -> int | None:
    """Return how many tokens a sequence of a model may have; None: its configuration sets no limit, or it needs none.

    Raises:
        ModelError: see `load_config`.

    Source: vLLM 0.32, config/model.py, `_get_and_verify_max_len`: linear and dynamic scaling of rotary positions
    multiply the limit, but Gemma 3's holds it already.
    """
    config = load_config(directory).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    free = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) in _NO_POSITIONS
    if not isinstance(limit, int) or limit < 1 or free:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [one.get("factor") or 1 for one in sets if one.get("rope_type") not in _FACTOR_IS_IN]
    return limit if "gemma3" in config.model_type else int(limit * max(factors, default=1))


def build_on_meta(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model without weights (meta device), for its structure; `dtype` is that of its parameters."""
    config = load_config(directory)
    cls = model_class(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    remedy = "correct its architectures, model_type or sizes"
    try:
        with (
            foreign(UnsupportedModel, f"transformers can't build {cls.__name__} from {directory}/config.json", remedy),
            torch.device("meta"),
        ):
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
    from transformers import AutoConfig

    directory = Path(directory)
    if state_dict is None:
        config = load_config(directory)
    else:
        with foreign(ModelError, f"transformers can't read {directory / 'config.json'}"):
            config = _unquantised(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    cls = model_class(config)
    with foreign(ModelError, f"transformers can't load {directory}"):
        if state_dict is None:
            with as_loaded(directory) as files:
                model, info = cls.from_pretrained(files, config=config, dtype=dtype, output_loading_info=True)
        else:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
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
    state = model.state_dict()
    found = names_when_loaded(model, names).items()
    return {name: made for name, (made, is_converted) in found if not is_converted and made in state}


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
    decoder = None if output is None else _decoder_of(model, output)
    if decoder is None:
        raise UnsupportedModel(
            f"{name} has no language model (no decoder with a vocabulary head); "
            "name a causal language model or a vision-language model that contains one"
        )
    paths = [path for path, module in model.named_modules() if module is decoder]
    return paths[0], decoder


def _decoder_of(model: Any, head: nn.Module) -> nn.Module | None:
    """Return the decoder that `get_decoder` leads to, through a language model with a head of its own (BLIP-2).

    Where it leads to the head (ModernBERT) or nowhere (Llama 4), it is the only model inside.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model or decoder is head:
        inside = [child for child in model.children() if hasattr(child, "get_decoder")]
        decoder = inside[0] if len(inside) == 1 else None
    if decoder is None or getattr(decoder, "get_output_embeddings", lambda: None)() is None:
        return decoder
    return _decoder_of(decoder, head)


def _decoder_layers(path: str, decoder: nn.Module) -> str:
    """Return the module path of the decoder's list of layers."""
    candidates = [
        f"{path}.{name}" if path else name
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList) and any(map(_is_block, module))
    ]
    if len(candidates) != 1:
        raise UnsupportedModel(
            f"{type(decoder).__name__} at {path!r} has {len(candidates)} lists of layers, one was expected; "
            "Bitladder searches decoder-only language models"
        )
    return candidates[0]


def _is_block(module: nn.Module) -> bool:
    """Return whether a module is made of linear modules, and none itself (Gemma 3n has lists of projections)."""
    linears = [each for each in module.modules() if type(each).__name__ == "Conv1D" or isinstance(each, nn.Linear)]
    return bool(linears) and module not in linears


def find_target(directory: Path) -> Target:
    """Return the quant groups of the language model in `directory`, and every other linear module with the reason.

    Raises:
        ModelError: files are missing or damaged. UnsupportedModel: nothing to search, with the reason.
    """
    check_side_files(directory)
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
    table = checkpoint_tensor_names(model, weights.tensors)
    check_fit(model, weights, table)
    tensor_of = {parameter: tensor for tensor, parameter in table.items()}
    check_head(model, weights, tensor_of)
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    matrices = {name: module for name, module in model.named_modules() if isinstance(module, _MATRIX_MODULES)}
    linears = {name: module for name, module in matrices.items() if isinstance(module, nn.Linear)}
    searched: list[str] = []
    reasons: dict[str, str] = {}
    for name, module in matrices.items():
        if name in linears and name.startswith(f"{layers}."):
            searched.append(name)
        elif module is model.get_output_embeddings():
            reasons[name] = "vocabulary head: not searched"
        elif module is model.get_input_embeddings():
            reasons[name] = "token embedding: not searched"
        elif name.startswith(f"{path}.") or not path:
            reasons[name] = "language model, outside the decoder layers: not searched"
        else:
            reasons[name] = "outside the language model (vision tower, projector): not searched"

    anatomy = look(model, layers)
    if anatomy.fails is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} can't be run on text alone ({anatomy.fails}); name a model that continues text"
        )
    idle = _idle(model, anatomy)
    groups = []
    for layer in Fusing.of(read_config(directory)).layers(searched):
        members = layer.modules
        problem = next((idle[name] for name in members if name in idle), None)
        problem = problem or _why_not(members, linears, tensor_of, weights)
        if problem is not None:
            reasons.update(dict.fromkeys(members, problem))
            continue
        modules = tuple(
            QuantModule(
                name=name,
                tensor=tensor_of[f"{name}.weight"],
                shape=(linears[name].out_features, linears[name].in_features),
            )
            for name in members
        )
        elements = sum(linears[name].weight.numel() for name in members)
        groups.append(QuantGroup(name=layer.name, modules=modules, weight_elements=elements))
    wide = next((t for name in searched if (t := tensor_of.get(f"{name}.weight")) and _is_wide(weights, t)), None)
    if not groups and wide is not None:
        code = (
            f"import torch, transformers as t; t.{type(model).__name__}.from_pretrained({str(directory)!r}, "
            "dtype=torch.bfloat16).save_pretrained('NEW')"
        )
        raise UnsupportedModel(
            f"{directory} is stored in {weights.tensors[wide].dtype} ({wide}); 16-bit weights are quantised. Cast it: "
            f"python -c {shlex.quote(code)}, copy tokenizer and processor files to NEW, and name NEW"
        )
    if not groups:
        why = next(
            (reason for name, reason in reasons.items() if name.startswith(f"{layers}.")),
            "its decoder layers hold no torch.nn.Linear",
        )
        raise UnsupportedModel(f"{type(model).__name__}: nothing to quantise in {layers}: {why}")
    untouched = []
    whole = split_when_loaded(model, weights.tensors)
    for name in matrices:
        if name not in reasons:
            continue
        tensor = tensor_of.get(f"{name}.weight")
        if tensor is None and f"{name}.weight" in tied:
            tensor = f"{name}.weight"  # tied: not in the files, but the runtime builds the module
        if tensor is None:  # split on loading: the runtime knows it whole; merged: by the module's own name
            tensor = whole.get(f"{name}.weight", f"{name}.weight")
        untouched.append(
            UntouchedModule(name=name, checkpoint_name=tensor.removesuffix(".weight"), reason=reasons[name])
        )
    return Target(path, tuple(groups), tuple(untouched), type(model).__name__, anatomy)


def _idle(model: nn.Module, found: Anatomy) -> dict[str, str]:
    """Return why linear modules in decoder layers would never see an input, for each that doesn't.

    A model that sees may run them for pictures.
    """
    unreached = frozenset[str]() if image_token_ids(model.config) else found.idle
    return dict.fromkeys(unreached, UNREACHED) | dict.fromkeys(found.bypassed, BYPASSED)


def _is_wide(weights: WeightFiles, tensor: str) -> bool:
    return weights.tensors[tensor].dtype in ("F32", "F64")


def _why_not(
    members: tuple[str, ...], linears: dict[str, nn.Linear], tensor_of: dict[str, str], weights: WeightFiles
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
    if all(weights.is_zero(tensor_of[f"{name}.weight"]) for name in members):
        return ZERO_WEIGHTS
    return None
