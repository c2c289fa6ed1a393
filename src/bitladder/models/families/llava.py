"""LLaVA: any known language model behind a vision tower that is taken as it is stored.

Source: vllm 0.32.0, model_executor/models/llava.py (modules, hf_to_vllm_mapper).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bitladder.models.families.base import Architecture, number, product, section_of, vision_language

LLAVA_RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def _add_llava_projector(need: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add LlavaMultiModalProjector's tensors."""
    text = number(section_of(config, "text_config"), "hidden_size")
    bias = bool(config.get("multimodal_projector_bias", True))
    layers = config.get("vision_feature_layer", 0)
    copies = len(layers) if isinstance(layers, list) else 1
    seen = product(number(section_of(config, "vision_config"), "hidden_size"), copies)
    need.linear("multi_modal_projector.linear_1", text, seen, bias)
    need.linear("multi_modal_projector.linear_2", text, text, bias)


FAMILIES = {
    "LlavaForConditionalGeneration": vision_language(
        None, _add_llava_projector, LLAVA_RENAMES, "vision_tower.", ("vision_tower.",)
    ),
}
