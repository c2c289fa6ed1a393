"""Finds the language model inside a model, its quant groups, and what is left alone and why.

Everything here works on the configuration and the headers of the weight files: the model is built on the meta device,
so that a model we can't handle is refused before anything is computed.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bitladder.errors import UnsupportedModel
from bitladder.formats import why_no_shapes
from bitladder.models.anatomy import Anatomy, look
from bitladder.models.fusing import Fusing
from bitladder.models.loading import build_on_meta, checkpoint_tensor_names, image_token_ids
from bitladder.models.sources import check_fit, check_head, check_side_files, check_unquantised, split_when_loaded
from bitladder.models.weights import SIXTEEN_BIT_DTYPES, WeightFiles, read_config
from bitladder.recipe import MeasureSpec
from bitladder.records import QuantGroup, QuantModule, UntouchedModule

# Modules whose weights a runtime might quantise; norms and the like are never touched.
_MATRIX_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ZERO_WEIGHTS = "all zero in its weights: no FP8 scale"  # why a group isn't searched
BYPASSED = "the model's code uses its weights without running it: nothing says what its input would be"
UNREACHED = "text doesn't reach it (cross-attention, an adapter): not searched"
_EXPERTS = re.compile(r"(^|\.)(experts|expert)(\.|$)")


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


def find_target(directory: Path, formats: Sequence[str] | None = None) -> Target:
    """Return the quant groups of the language model in `directory`, and every other linear module with the reason.

    Args:
        directory: the model's files.
        formats: a group is searched that can have one of them; None: those that a recipe has by default.

    Raises:
        ModelError: files are missing or damaged. UnsupportedModel: nothing to search, with the reason.
        RecipeError: an unknown format.
    """
    formats = MeasureSpec().formats if formats is None else formats
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
    check_unquantised(weights, table)
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
        problem = problem or _why_not(members, linears, formats, tensor_of, weights)
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
    members: tuple[str, ...],
    linears: dict[str, nn.Linear],
    formats: Sequence[str],
    tensor_of: dict[str, str],
    weights: WeightFiles,
) -> str | None:
    """Return why a group's modules can't be quantised, or None."""
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in members}
    refused = [why_no_shapes(shapes, name) for name in formats]
    if None not in refused:
        return refused[0]
    for name in members:
        tensor = tensor_of.get(f"{name}.weight")
        if tensor is None:
            return f"{name}.weight is not stored under one name in the checkpoint"
        dtype = weights.tensors[tensor].dtype
        if dtype not in SIXTEEN_BIT_DTYPES:
            return f"{tensor} is stored as {dtype}; only {' and '.join(SIXTEEN_BIT_DTYPES)} weights are quantised"
    if all(weights.is_zero(tensor_of[f"{name}.weight"]) for name in members):
        return ZERO_WEIGHTS
    return None
