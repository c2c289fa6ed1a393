"""SGLang's rules: which layers it would run quantised."""

import re
from functools import cached_property
from typing import ClassVar

from bitladder.models.families import Architecture
from bitladder.models.families.llava import LLAVA_RENAMES
from bitladder.models.families.qwen_vl import QWEN2_VL_RENAMES
from bitladder.models.fusing import Layer
from bitladder.runtimes.base import MIX, Decision, Rules, Support

_PLAIN = re.compile(r"[\w.\-]+")  # a name without any sign that means something in a regular expression
_FP4 = "sglang 0.5.23, srt/layers/quantization/modelopt_quant.py (ModelOptFp4Config; ModelOptMixedPrecisionConfig)"
# Source: the same file, ModelOptFp8Config.from_config and ModelOptMixedPrecisionConfig; fp8.py, Fp8LinearMethod
_SCALE_INV = (
    "SGLang has no ModelOpt checkpoint of it alone, and in a mix looks for scales named weight_scale_inv, as DeepSeek "
    "calls them; ModelOpt writes weight_scale"
)


class SglangRules(Rules):
    """SGLang's: whole parts of a name, all modules of a fused layer or none; then `*` over the name or one part of it.

    Source: sgl-project/sglang, python/sglang/srt/layers/quantization/modelopt/modelopt.py at 3d2509d8a2ca
    (ModelOptQuantConfig), modelopt/schemes/modelopt_fp8.py at 578ca2f63399 (ModelOptFp8Config.from_config),
    modelopt/schemes/modelopt_mixed_precision.py at 717e1203914b (get_quant_method), utils.py since pull request
    #23467 (is_layer_skipped, _module_path_match), models/qwen2_5_vl.py and qwen3_vl.py (hf_to_sglang_mapper). An FP8
    product that CUTLASS can't take goes to Triton (fp8_utils.py, apply_fp8_linear).
    """

    runtime = "sglang"
    version = "main at 578ca2f63399"
    SUPPORT: ClassVar = {
        "fp8": Support("ModelOptFp8LinearMethod", 89, None, "modelopt/schemes/modelopt_fp8.py at 578ca2f63399"),
        "fp8_pc_pt": "SGLang takes it for FP8 with one scale a tensor and one for its inputs, and in a mix for 16 bits",
        "fp8_block": _SCALE_INV,
        "mxfp8": _SCALE_INV,
        "nvfp4": Support("ModelOptFp4LinearMethod", 80, None, _FP4),
        "nvfp4_w4a16": Support("ModelOptNvFp4A16LinearMethod", 80, None, _FP4),
    }
    known_algorithms = frozenset({"NVFP4", "W4A16_NVFP4", MIX})
    _MIXED_WITH = frozenset({"nvfp4", "nvfp4_w4a16"})
    _VISION_QKV = ("attn.qkv", "attn.qkv_proj")

    @classmethod
    def why_no_mix(cls, formats: frozenset[str]) -> str | None:
        """Return why a mix without four-bit layers is refused. Source: sglang 0.5.23, its choice of modelopt_mixed."""
        if formats & cls._MIXED_WITH:
            return None
        return "SGLang takes a mix without NVFP4 for another kind of checkpoint, W4AFP8"

    @classmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return FP8 for whatever has FP8 in its name, as SGLang does."""
        if name is None or name in cls.known_algorithms:
            return name
        return "FP8" if "FP8" in name else None

    @classmethod
    def listed_algorithm(cls, name: str) -> str:
        """Return the name itself: a mix is looked up by whole names. Source: `get_quant_method` of the mix."""
        return name

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return whether it isn't LLaVA, whose modules have other names there, or an unknown multimodal model."""
        return need.renames != LLAVA_RENAMES and super().reproduced(need)

    def mapped(self, exclude: str) -> tuple[str, ...]:
        """Return an exclusion under SGLang's names; the language model's are without `language_model.` there."""
        if self.need.vision is None:
            return (exclude,)
        name = exclude.replace(*self._VISION_QKV, 1)
        for old, new in QWEN2_VL_RENAMES:
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return (name.removeprefix("language_model."),)

    def name(self, module: str) -> str:
        """Return the name without `language_model.`, and the vision tower's with SGLang's own qkv_proj."""
        if self.need.vision is not None and module.startswith(self.need.vision):
            return module.replace(*self._VISION_QKV, 1)
        return module.removeprefix("language_model.")

    def never_quantised(self, module: str) -> bool:
        """Return whether it is the output matrix, which is no LinearBase there."""
        return module == self.need.head

    def decide(self, layer: Layer) -> Decision:
        """Decide by parts of the modules' names first, then by wildcards over the fused name."""
        shards = layer.shards or (layer.name,)
        listed = {shard: self._parts_of(shard) for shard in shards}
        found = tuple(pattern for patterns in listed.values() for pattern in patterns)
        if found:
            return Decision("excluded" if all(listed.values()) else "mixed", found)
        plain = {layer.name, *layer.name.split(".")}
        hits = (
            pattern
            for pattern in self.patterns
            if (pattern in plain if pattern in self._plain else self._globs(pattern, layer.name))
        )
        found = tuple(hits)
        return Decision("excluded", found) if found else self.quantised(layer)

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(pattern for pattern in self.patterns if _PLAIN.fullmatch(pattern))

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """Where in `patterns` a run of parts stands: there are as many of them as layers, and each is looked up."""
        places: dict[str, list[int]] = {}
        for place, pattern in enumerate(self.patterns):
            places.setdefault(pattern.rstrip("."), []).append(place)
        return places

    def _parts_of(self, name: str) -> list[str]:
        """Return the patterns that are some whole parts of the name, in their order."""
        parts = name.split(".")
        ends = range(1, len(parts) + 1)
        runs = {".".join(parts[start:end]) for start in range(len(parts)) for end in ends if end > start}
        return [self.patterns[place] for place in sorted(p for run in runs for p in self._places.get(run, ()))]

    def hits(self, pattern: str, name: str) -> bool:
        """Return whether the pattern is some parts of the name, or a wildcard for all of it or one part."""
        return self._part_of(pattern, name) or self._globs(pattern, name)

    @staticmethod
    def _part_of(pattern: str, name: str) -> bool:
        return f".{pattern.rstrip('.')}." in f".{name}."

    @staticmethod
    def _globs(pattern: str, name: str) -> bool:
        if _PLAIN.fullmatch(pattern):
            return pattern == name or pattern in name.split(".")
        try:
            expression = re.compile(pattern.replace(".", r"\.").replace("*", ".*"))
        except re.error:  # SGLang stops at it; here it hits nothing, which is warned of
            return False
        return any(expression.fullmatch(part) for part in (name, *name.split(".")))
