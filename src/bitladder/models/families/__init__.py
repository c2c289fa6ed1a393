"""What a model's runtime needs from the files: `architecture(config, shapes)` -> names and shapes of its tensors.

One file a family, listed here. `Architecture.rename` brings a checkpoint's tensor names to vLLM's, as its mapper does.
Of a model of no known family only what its files hold is known.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bitladder.formats import INPUT_SCALE, KV_SCALE_NAMES, WEIGHT_SCALE, WEIGHT_SCALE_2
from bitladder.models.families import causal, llava, qwen_vl
from bitladder.models.families.base import Architecture, Family, highest, number, section_of
from bitladder.models.families.causal import TEXT_KINDS, add_text
from bitladder.models.fusing import Fusing

__all__ = ["SCALES", "Architecture", "architecture", "architecture_name", "section_of", "uneven_layers"]

SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_2, INPUT_SCALE)  # of a quantised linear, beside its `weight`
# Where hybrid models list what their layers are. Source: transformers' configurations of hybrid models.
_LISTS_OF_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "block_types")
_PARTS = ("text_config", "vision_config", "audio_config")  # of which the configuration of a multimodal model has some
FAMILIES: dict[str, Family] = {**causal.FAMILIES, **qwen_vl.FAMILIES, **llava.FAMILIES}


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return the first of `architectures`, or `?`."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "?"


def architecture(config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Return what the model needs; for an architecture that isn't known, what its own files hold.

    Args:
        config: the content of config.json.
        stored: name -> shape of the tensors in the files.
    """
    text = section_of(config, "text_config") or config
    family = FAMILIES.get(architecture_name(config))
    kind = TEXT_KINDS.get((family.text_kind or str(text.get("model_type"))) if family else "")
    multimodal = any(isinstance(config.get(part), dict) for part in _PARTS)
    if family is None or kind is None:
        unknown = Architecture(
            known=False, text="", open_prefixes=("",), multimodal=multimodal, fusing=Fusing.of(config)
        )
        _add_open(unknown, stored)
        return unknown
    need = Architecture(
        renames=family.renames,
        text=family.text,
        vision=family.vision,
        head=family.head,
        open_prefixes=family.open_prefixes,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        multimodal=multimodal,
        fusing=Fusing.of(config),
    )
    names = [need.rename(name) for name in stored]
    layers = number(text, "num_hidden_layers")
    add_text(need, text, kind, highest(names, f"{need.text}layers.") if layers is None else layers)
    if family.add_vision is not None:
        family.add_vision(need, config, names)
    _add_open(need, stored)
    return need


def _add_open(need: Architecture, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Take what lies below the open prefixes as it is stored: nothing of it is missing, nor of another shape."""
    scaled = {name for stored_name in stored if (name := need.rename(stored_name)).endswith(f".{INPUT_SCALE}")}
    for stored_name, shape in stored.items():
        name = need.rename(stored_name)
        if not need.open_prefixes or not name.startswith(need.open_prefixes):
            continue
        if name.rpartition(".")[2] in (*SCALES, *KV_SCALE_NAMES):
            continue
        need.add(name, *shape)
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        # Only a linear rounds what it is given, so a scale for its input tells one whatever it is called.
        named = "embed" not in name and "norm" not in leaf
        if len(shape) == 2 and module != name and (named or f"{module}.{INPUT_SCALE}" in scaled):
            need.linears.append(module)


def uneven_layers(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return tensors that a layer lacks and its siblings have; how such a layer is noticed in unknown architectures.

    Siblings are layers of one kind: the configuration lists the kinds, or this layer has no part that they lack.

    Args:
        names: the tensors' names.
        config: the content of config.json.
    """
    lists: dict[str, dict[int, set[str]]] = {}  # what stands before the number -> number -> what stands after it
    for name in names:
        if match := re.search(r"\.(\d+)\.", name):
            lists.setdefault(name[: match.start()], {}).setdefault(int(match[1]), set()).add(name[match.end() :])
    missing = []
    for before, layers in lists.items():
        kinds = _layer_kinds(config, len(layers))
        parts = {layer: {after.partition(".")[0] for after in held} for layer, held in layers.items()}
        for layer, held in sorted(layers.items()):
            alike = [n for n in layers if kinds.get(n) == kinds.get(layer) and parts[layer] <= parts[n]]
            lacked = set().union(*(layers[n] for n in alike)) - held
            missing += [f"{before}.{layer}.{after}" for after in sorted(lacked)]
    return missing


def _layer_kinds(config: Mapping[str, Any], layers: int) -> Mapping[int, object]:
    """Return layer -> kind where a configuration lists as many as there are layers."""
    text = section_of(config, "text_config") or config
    listed = (kinds for name in _LISTS_OF_KINDS if isinstance(kinds := text.get(name), list | str))
    return next((dict(enumerate(kinds)) for kinds in listed if len(kinds) == layers), {})
