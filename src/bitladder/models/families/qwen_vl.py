"""Vision-language models Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Source: vllm 0.32.0, model_executor/models: qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py (modules, hf_to_vllm_mapper).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bitladder.models.families.base import Architecture, highest, number, product, section_of, vision_language

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


def _blocks(vision: Mapping[str, Any], names: Iterable[str]) -> int:
    depth = number(vision, "depth")
    return highest(names, "visual.blocks.") if depth is None else depth


def _norm(need: Architecture, name: str, size: int | None, bias: bool) -> None:
    need.add(f"{name}.weight", size)
    if bias:
        need.add(f"{name}.bias", size)


def _add_patches(need: Architecture, vision: Mapping[str, Any], hidden: int | None, bias: bool) -> None:
    patch = number(vision, "patch_size")
    channels = number(vision, "in_channels", "in_chans")
    need.add("visual.patch_embed.proj.weight", hidden, channels, number(vision, "temporal_patch_size"), patch, patch)
    if bias:
        need.add("visual.patch_embed.proj.bias", hidden)


def _merged(vision: Mapping[str, Any], hidden: int | None) -> int | None:
    """Return the size of the patches that are merged into one token."""
    return product(hidden, number(vision, "spatial_merge_size"), number(vision, "spatial_merge_size"))


def _add_block(need: Architecture, prefix: str, hidden: int | None, *, norm_bias: bool) -> None:
    """Add a vision block's norms and attention, which all Qwen towers have alike."""
    for name in ("norm1", "norm2"):
        _norm(need, f"{prefix}.{name}", hidden, bias=norm_bias)
    need.linear(f"{prefix}.attn.qkv", product(3, hidden), hidden, bias=True)
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
    hidden, inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
    _add_patches(need, vision, hidden, bias=False)
    for block in range(_blocks(vision, names)):
        prefix = f"visual.blocks.{block}"
        _add_block(need, prefix, hidden, norm_bias=False)
        for name in ("gate_proj", "up_proj"):
            need.linear(f"{prefix}.mlp.{name}", inner, hidden, bias=True)
        need.linear(f"{prefix}.mlp.down_proj", hidden, inner, bias=True)
    _add_merger(need, vision, hidden, number(vision, "out_hidden_size"), norm_bias=False)


def _add_qwen2_vision(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add Qwen2VisionTransformer's tensors."""
    vision = section_of(config, "vision_config")
    hidden, ratio = number(vision, "embed_dim"), vision.get("mlp_ratio")
    inner = product(hidden, ratio) if isinstance(ratio, int | float) else None
    _add_patches(need, vision, hidden, bias=False)
    for block in range(_blocks(vision, names)):
        prefix = f"visual.blocks.{block}"
        _add_block(need, prefix, hidden, norm_bias=True)
        need.linear(f"{prefix}.mlp.fc1", inner, hidden, bias=True)
        need.linear(f"{prefix}.mlp.fc2", hidden, inner, bias=True)
    _add_merger(need, vision, hidden, number(vision, "hidden_size"), norm_bias=True)


def _add_qwen3_vision(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add Qwen3_VisionTransformer's tensors."""
    vision = section_of(config, "vision_config")
    hidden, inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
    merged = _merged(vision, hidden)
    _add_patches(need, vision, hidden, bias=True)
    need.add("visual.pos_embed.weight", number(vision, "num_position_embeddings"), hidden)
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
        need.linear(f"{prefix}.linear_fc2", number(vision, "out_hidden_size"), merged, bias=True)


FAMILIES = {
    "Qwen2VLForConditionalGeneration": vision_language("qwen2", _add_qwen2_vision, QWEN2_VL_RENAMES),
    "Qwen2_5_VLForConditionalGeneration": vision_language("qwen2", _add_qwen2_5_vision, QWEN2_VL_RENAMES),
    "Qwen3VLForConditionalGeneration": vision_language("qwen3", _add_qwen3_vision, QWEN3_VL_RENAMES),
}
