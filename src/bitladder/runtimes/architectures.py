"""What a model's runtime needs from the files: `architecture(config, shapes)` -> names and shapes of its tensors.

Names are those of vLLM's modules, fused ones apart: `language_model.model.layers.0.self_attn.q_proj`. `rename` brings a
checkpoint's tensor names there, as vLLM's mapper does. Known are Llama, Mistral, Qwen2, Qwen3, Qwen2-VL, Qwen2.5-VL,
Qwen3-VL and LLaVA (whose vision tower is taken as it is stored); of any other model only what its files hold is known.

Source: vllm 0.32.0, model_executor/models: llama.py, mistral.py, qwen2.py, qwen3.py, qwen2_vl.py, qwen2_5_vl.py,
qwen3_vl.py, llava.py (modules, hf_to_vllm_mapper); transformers' configuration classes for what a configuration omits.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitladder.formats import INPUT_SCALE, KV_SCALE_NAMES, WEIGHT_SCALE, WEIGHT_SCALE_2
from bitladder.models.fusing import Fusing
from bitladder.runtimes.config import section_of

SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_2, INPUT_SCALE)  # of a quantised linear, beside its `weight`
# Where hybrid models list what their layers are. Source: transformers' configurations of hybrid models.
_LISTS_OF_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "block_types")
_PARTS = ("text_config", "vision_config", "audio_config")  # of which the configuration of a multimodal model has some

Shape = tuple[int | None, ...]  # None: not derivable from the configuration


@dataclass
class Architecture:
    """What a model needs, under vLLM's names of its modules, fused ones apart.

    Attributes:
        renames: prefixes of tensor names in checkpoints -> in vLLM, tried in order.
        text, vision, head: prefixes of the language model's layers, of what sees, and the output matrix's name.
        known: False: nothing but what the files hold is known.
        tensors: name -> shape, without scales.
        linears: names of the linears among them, without `.weight`.
        open_prefixes: parts of which nothing is derived here.
        tied: whether the output matrix is the embedding.
        multimodal: whether the language model is one of several parts.
        fusing: what runtimes fuse in it.
    """

    renames: tuple[tuple[str, str], ...] = ()
    text: str = "model."
    vision: str | None = None
    head: str = "lm_head"
    known: bool = True
    tensors: dict[str, Shape] = field(default_factory=dict)
    linears: list[str] = field(default_factory=list)
    open_prefixes: tuple[str, ...] = ()
    tied: bool = False
    multimodal: bool = False
    fusing: Fusing = field(default_factory=Fusing.usual)

    def rename(self, name: str) -> str:
        """Return vLLM's name of a checkpoint's tensor or module.

        Source: vllm model_executor/models/utils.py, WeightsMapper: prefixes are replaced one after the other.
        """
        for old, new in self.renames:
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return name

    def add(self, name: str, *shape: int | None) -> None:
        """Add a tensor."""
        self.tensors[name] = shape

    def linear(self, name: str, out_features: int | None, in_features: int | None, bias: bool) -> None:
        """Add a linear's weight, [out_features, in_features], and its bias."""
        self.linears.append(name)
        self.add(f"{name}.weight", out_features, in_features)
        if bias:
            self.add(f"{name}.bias", out_features)


def _number(section: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of `names` that is a whole number; None: none is, so it can't be checked."""
    return next((section[name] for name in names if isinstance(section.get(name), int)), None)


def _product(*factors: float | None) -> int | None:
    numbers = [factor for factor in factors if factor is not None]
    return int(math.prod(numbers)) if len(numbers) == len(factors) else None


def _highest(tensors: Iterable[str], prefix: str) -> int:
    """Return how many layers the tensors below `prefix` have."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for name in tensors if (match := pattern.match(name))), default=0)


@dataclass(frozen=True)
class _TextKind:
    """How the language models that are known differ."""

    qkv_bias: bool | None  # None: the configuration's attention_bias, which then covers o_proj too
    qk_norm: bool = False
    head_dim: int | None = None  # where the configuration names none; None: hidden size / heads


_TEXT_KINDS = {
    "llama": _TextKind(qkv_bias=None),
    "mistral": _TextKind(qkv_bias=False),
    "qwen2": _TextKind(qkv_bias=True),
    "qwen3": _TextKind(qkv_bias=None, qk_norm=True, head_dim=128),
}


def _add_text(need: Architecture, text: Mapping[str, Any], kind: _TextKind, layers: int) -> None:
    """Add the language model's tensors."""
    hidden, inner = _number(text, "hidden_size"), _number(text, "intermediate_size")
    heads = _number(text, "num_attention_heads")
    kv_heads = _number(text, "num_key_value_heads") or heads
    head = _number(text, "head_dim") or kind.head_dim
    if head is None and hidden and heads:
        head = hidden // heads
    queries, keys = _product(heads, head), _product(kv_heads, head)
    attention_bias = bool(text.get("attention_bias", False))
    qkv_bias = attention_bias if kind.qkv_bias is None else kind.qkv_bias
    o_bias, mlp_bias = kind.qkv_bias is None and attention_bias, bool(text.get("mlp_bias", False))
    need.add(f"{need.text}embed_tokens.weight", _number(text, "vocab_size"), hidden)
    need.add(f"{need.text}norm.weight", hidden)
    for layer in range(layers):
        prefix = f"{need.text}layers.{layer}"
        need.add(f"{prefix}.input_layernorm.weight", hidden)
        need.add(f"{prefix}.post_attention_layernorm.weight", hidden)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            need.linear(f"{prefix}.self_attn.{name}_proj", rows, hidden, qkv_bias)
        need.linear(f"{prefix}.self_attn.o_proj", hidden, queries, o_bias)
        for name in ("q_norm", "k_norm") if kind.qk_norm else ():
            need.add(f"{prefix}.self_attn.{name}.weight", head)
        for name in ("gate_proj", "up_proj"):
            need.linear(f"{prefix}.mlp.{name}", inner, hidden, mlp_bias)
        need.linear(f"{prefix}.mlp.down_proj", hidden, inner, mlp_bias)
    if not need.tied:
        need.linear(need.head, _number(text, "vocab_size"), hidden, bias=False)


def _blocks(vision: Mapping[str, Any], names: Iterable[str]) -> int:
    depth = _number(vision, "depth")
    return _highest(names, "visual.blocks.") if depth is None else depth


def _norm(need: Architecture, name: str, size: int | None, bias: bool) -> None:
    need.add(f"{name}.weight", size)
    if bias:
        need.add(f"{name}.bias", size)


def _add_patches(need: Architecture, vision: Mapping[str, Any], hidden: int | None, bias: bool) -> None:
    patch = _number(vision, "patch_size")
    channels = _number(vision, "in_channels", "in_chans")
    need.add("visual.patch_embed.proj.weight", hidden, channels, _number(vision, "temporal_patch_size"), patch, patch)
    if bias:
        need.add("visual.patch_embed.proj.bias", hidden)


def _merged(vision: Mapping[str, Any], hidden: int | None) -> int | None:
    """Return the size of the patches that are merged into one token."""
    return _product(hidden, _number(vision, "spatial_merge_size"), _number(vision, "spatial_merge_size"))


def _add_block(need: Architecture, prefix: str, hidden: int | None, *, norm_bias: bool) -> None:
    """Add a vision block's norms and attention, which all Qwen towers have alike."""
    for name in ("norm1", "norm2"):
        _norm(need, f"{prefix}.{name}", hidden, bias=norm_bias)
    need.linear(f"{prefix}.attn.qkv", _product(3, hidden), hidden, bias=True)
    need.linear(f"{prefix}.attn.proj", hidden, hidden, bias=True)


def _add_merger(
    need: Architecture, vision: Mapping[str, Any], hidden: int | None, out: int | None, *, norm_bias: bool
) -> None:
    """Add the merger of Qwen2-VL and Qwen2.5-VL."""
    merged = _merged(vision, hidden)
    _norm(need, "visual.merger.ln_q", hidden, bias=norm_bias)
    need.linear("visual.merger.mlp.0", merged, merged, bias=True)
    need.linear("visual.merger.mlp.2", out, merged, bias=True)


def _add_qwen2_5_vision(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add Qwen2_5_VisionTransformer's tensors."""
    vision = section_of(config, "vision_config")
    hidden, inner = _number(vision, "hidden_size"), _number(vision, "intermediate_size")
    _add_patches(need, vision, hidden, bias=False)
    for block in range(_blocks(vision, names)):
        prefix = f"visual.blocks.{block}"
        _add_block(need, prefix, hidden, norm_bias=False)
        for name in ("gate_proj", "up_proj"):
            need.linear(f"{prefix}.mlp.{name}", inner, hidden, bias=True)
        need.linear(f"{prefix}.mlp.down_proj", hidden, inner, bias=True)
    _add_merger(need, vision, hidden, _number(vision, "out_hidden_size"), norm_bias=False)


def _add_qwen2_vision(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add Qwen2VisionTransformer's tensors."""
    vision = section_of(config, "vision_config")
    hidden, ratio = _number(vision, "embed_dim"), vision.get("mlp_ratio")
    inner = _product(hidden, ratio) if isinstance(ratio, int | float) else None
    _add_patches(need, vision, hidden, bias=False)
    for block in range(_blocks(vision, names)):
        prefix = f"visual.blocks.{block}"
        _add_block(need, prefix, hidden, norm_bias=True)
        need.linear(f"{prefix}.mlp.fc1", inner, hidden, bias=True)
        need.linear(f"{prefix}.mlp.fc2", hidden, inner, bias=True)
    _add_merger(need, vision, hidden, _number(vision, "hidden_size"), norm_bias=True)


def _add_qwen3_vision(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add Qwen3_VisionTransformer's tensors."""
    vision = section_of(config, "vision_config")
    hidden, inner = _number(vision, "hidden_size"), _number(vision, "intermediate_size")
    merged = _merged(vision, hidden)
    _add_patches(need, vision, hidden, bias=True)
    need.add("visual.pos_embed.weight", _number(vision, "num_position_embeddings"), hidden)
    for block in range(_blocks(vision, names)):
        prefix = f"visual.blocks.{block}"
        _add_block(need, prefix, hidden, norm_bias=True)
        need.linear(f"{prefix}.mlp.linear_fc1", inner, hidden, bias=True)
        need.linear(f"{prefix}.mlp.linear_fc2", hidden, inner, bias=True)
    mergers = [("visual.merger", hidden)]
    deep = vision.get("deepstack_visual_indexes")
    mergers += [
        (f"visual.deepstack_merger_list.{i}", merged) for i in range(len(deep) if isinstance(deep, list) else 0)
    ]
    for prefix, norm_size in mergers:
        _norm(need, f"{prefix}.norm", norm_size, bias=True)
        need.linear(f"{prefix}.linear_fc1", merged, merged, bias=True)
        need.linear(f"{prefix}.linear_fc2", _number(vision, "out_hidden_size"), merged, bias=True)


def _add_llava_projector(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add LlavaMultiModalProjector's tensors."""
    text = _number(section_of(config, "text_config"), "hidden_size")
    bias = bool(config.get("multimodal_projector_bias", True))
    layers = config.get("vision_feature_layer", 0)
    copies = len(layers) if isinstance(layers, list) else 1
    seen = _product(_number(section_of(config, "vision_config"), "hidden_size"), copies)
    need.linear("multi_modal_projector.linear_1", text, seen, bias)
    need.linear("multi_modal_projector.linear_2", text, text, bias)


QWEN2_VL_RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
QWEN3_VL_RENAMES = (
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
LLAVA_RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


@dataclass(frozen=True)
class _Family:
    """What models with the same name in `architectures` have in common.

    Attributes:
        text_kind: of `_TEXT_KINDS`; None: the language model's own model_type.
        add_vision: adds what sees, given the whole configuration and the stored names.
        renames, text, vision, head, open_prefixes: see `Architecture`.
    """

    text_kind: str | None
    add_vision: Callable[[Architecture, Mapping[str, Any], Iterable[str]], None] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    text: str = "model."
    vision: str | None = None
    head: str = "lm_head"
    open_prefixes: tuple[str, ...] = ()


def _vision_language(
    text_kind: str | None,
    add_vision: Callable[[Architecture, Mapping[str, Any], Iterable[str]], None],
    renames: tuple[tuple[str, str], ...],
    vision: str = "visual.",
    open_prefixes: tuple[str, ...] = (),
) -> _Family:
    return _Family(
        text_kind, add_vision, renames, "language_model.model.", vision, "language_model.lm_head", open_prefixes
    )


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("mistral"),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3"),
    "Qwen2VLForConditionalGeneration": _vision_language("qwen2", _add_qwen2_vision, QWEN2_VL_RENAMES),
    "Qwen2_5_VLForConditionalGeneration": _vision_language("qwen2", _add_qwen2_5_vision, QWEN2_VL_RENAMES),
    "Qwen3VLForConditionalGeneration": _vision_language("qwen3", _add_qwen3_vision, QWEN3_VL_RENAMES),
    "LlavaForConditionalGeneration": _vision_language(
        None, _add_llava_projector, LLAVA_RENAMES, "vision_tower.", ("vision_tower.",)
    ),
}


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
    family = _FAMILIES.get(architecture_name(config))
    kind = _TEXT_KINDS.get((family.text_kind or str(text.get("model_type"))) if family else "")
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
    layers = _number(text, "num_hidden_layers")
    _add_text(need, text, kind, _highest(names, f"{need.text}layers.") if layers is None else layers)
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
        parts = {number: {after.partition(".")[0] for after in held} for number, held in layers.items()}
        for number, held in sorted(layers.items()):
            alike = [n for n in layers if kinds.get(n) == kinds.get(number) and parts[number] <= parts[n]]
            lacked = set().union(*(layers[n] for n in alike)) - held
            missing += [f"{before}.{number}.{after}" for after in sorted(lacked)]
    return missing


def _layer_kinds(config: Mapping[str, Any], layers: int) -> Mapping[int, object]:
    """Return layer -> kind where a configuration lists as many as there are layers."""
    text = section_of(config, "text_config") or config
    listed = (kinds for name in _LISTS_OF_KINDS if isinstance(kinds := text.get(name), list | str))
    return next((dict(enumerate(kinds)) for kinds in listed if len(kinds) == layers), {})
