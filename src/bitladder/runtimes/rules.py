"""How runtimes read a ModelOpt FP8 checkpoint, where they differ: which configuration, which exclusions, which names.

One class of rules a runtime, applied to the modules that an architecture has (`architectures.py`).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Literal

from bitladder.runtimes.architectures import LLAVA_RENAMES, QWEN2_VL_RENAMES, Architecture

CONFIG_FILE, LEGACY_FILE = "config.json", "hf_quant_config.json"
_PLAIN = re.compile(r"[\w.\-]+")  # a name without any sign that means something in a regular expression
_KERNEL_MULTIPLE = 16  # FP8 products of cuBLAS want dimensions of 16 bytes (cuBLAS documentation, cublasLtMatmul)


@dataclass(frozen=True)
class Quantisation:
    """What a configuration file asks for."""

    file: str
    algorithm: str | None
    excludes: tuple[str, ...]
    kv_cache: str | None
    method: str  # quant_method; hf_quant_config.json is always ModelOpt's
    well_formed: bool  # whether the exclusions are a list of names, as runtimes insist


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _quantisation(file: str, algorithm: object, excludes: object, kv_cache: object, method: object) -> Quantisation:
    names = [] if excludes is None else excludes
    well_formed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Quantisation(
        file=file,
        algorithm=None if algorithm is None else str(algorithm),
        excludes=tuple(names) if isinstance(names, list) and well_formed else (),
        kv_cache=None if kv_cache is None else str(kv_cache),
        method=str(method),
        well_formed=well_formed,
    )


def inline(config: Mapping[str, Any]) -> Quantisation | None:
    """Return what config.json asks for. Source: vllm model_executor/model_loader/weight_utils.py, get_quant_config."""
    text = _section(config.get("text_config"))
    section = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, dict):
        return None
    if "quantization" in section:
        return nested(section, CONFIG_FILE)
    cache = _section(section.get("kv_cache_scheme"))
    eight_bit = (cache.get("type"), cache.get("num_bits")) == ("float", 8)
    return _quantisation(
        CONFIG_FILE,
        section.get("quant_algo"),
        section.get("ignore"),
        "FP8" if eight_bit else None,
        section.get("quant_method", "modelopt"),
    )


def nested(content: Mapping[str, Any], file: str) -> Quantisation:
    """Return what hf_quant_config.json asks for."""
    section = _section(content.get("quantization"))
    return _quantisation(
        file,
        section.get("quant_algo"),
        section.get("exclude_modules"),
        section.get("kv_cache_quant_algo"),
        "modelopt",
    )


@dataclass(frozen=True)
class RuntimeLayer:
    """One linear of a runtime, under its name there, and the modules of the architecture that are fused in it.

    `shards` are the runtime's names of all modules that could be in it, and `packed` whether vLLM's quantisation knows
    them; see `models.fusing.Layer`.
    """

    name: str
    modules: tuple[str, ...]
    shards: tuple[str, ...] = ()
    packed: bool = True


@dataclass(frozen=True)
class Decision:
    """What the exclusions make of a layer, and which of them hit it."""

    outcome: Literal["quantised", "excluded", "mixed"]
    patterns: tuple[str, ...] = ()


class Rules(ABC):
    """How one runtime reads a ModelOpt checkpoint, where runtimes differ."""

    runtime: ClassVar[str]
    version: ClassVar[str]
    fp8_method: ClassVar[str]
    other_method: ClassVar[str] = "UnquantizedLinearMethod"
    legacy_first: ClassVar[bool] = False  # whether hf_quant_config.json wins over config.json
    kernel_multiple: ClassVar[int | None] = None  # of a layer's two dimensions; None: any will do
    known_algorithms: ClassVar[frozenset[str]]  # besides FP8 with one scale a tensor

    def __init__(self, need: Architecture, excludes: Sequence[str]) -> None:
        self.need = need
        self.written = {pattern: exclude for exclude in excludes for pattern in self.mapped(exclude)}
        self.patterns = tuple(self.written)
        self.wild = frozenset(pattern for pattern in self.patterns if any(mark in pattern for mark in "*?["))

    @classmethod
    @abstractmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return the runtime's reading of `quant_algo`; None: it refuses."""

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return whether the runtime's names of this architecture's modules are known here.

        Those of a language model are as the checkpoint spells them; where it is a part of a whole, runtimes differ.
        """
        return need.known or not need.multimodal

    def mapped(self, exclude: str) -> tuple[str, ...]:
        """Return what the runtime makes of one exclusion before it matches."""
        return (exclude,)

    def name(self, module: str) -> str:
        """Return the runtime's name of a module, fused ones apart."""
        return module

    def never_quantised(self, module: str) -> bool:
        """Return whether the runtime keeps a module in 16 bits, whatever the configuration says."""
        return False

    @abstractmethod
    def decide(self, layer: RuntimeLayer) -> Decision:
        """Return what the exclusions make of a layer."""

    @abstractmethod
    def hits(self, pattern: str, name: str) -> bool:
        """Return whether a mapped exclusion hits a module or layer under its name in the runtime."""

    def exact(self, pattern: str, layer: RuntimeLayer) -> bool:
        """Return whether an exclusion is just the name of a layer, or of a module in it, as checkpoints spell it."""
        written = self.need.rename(f"{self.written[pattern]}.").removesuffix(".")
        return written in layer.modules or pattern == layer.name

    @cached_property
    def layers(self) -> tuple[RuntimeLayer, ...]:
        """The linears of the runtime's model."""
        module_of = {self.name(module): module for module in self.need.linears}
        return tuple(
            RuntimeLayer(layer.name, tuple(module_of[name] for name in layer.modules), layer.shards, layer.packed)
            for layer in self.need.fusing.layers(module_of)
        )

    def useless(self) -> list[str]:
        """Return the exclusions, as they are written, that hit nothing at all."""
        names = {self.name(name.rpartition(".")[0]) for name in self.need.tensors}
        names |= {layer.name for layer in self.layers} | {self.name(self.need.head)}
        names |= {self.need.fusing.asked_as(name) for name in names}
        useful = {
            written
            for pattern, written in self.written.items()
            if pattern in names or written == self.need.head.rpartition(".")[2] or self._hits_any(pattern, names)
        }
        return sorted(set(self.written.values()) - useful)

    def _hits_any(self, pattern: str, names: set[str]) -> bool:
        return any(self.hits(pattern, name) for name in names)


class VllmRules(Rules):
    """vLLM's: a fused layer by its modules' exact names, all or none; then any substring; then wildcards.

    Source: vllm 0.32.0, model_executor/layers/quantization/modelopt.py (ModelOptQuantConfigBase.is_layer_excluded,
    apply_vllm_mapper, from_config; LINEAR_ALGOS), utils/quant_utils.py (is_layer_skipped). Its CUTLASS kernel pads
    (kernels/linear/scaled_mm/cutlass.py), so any dimensions will do.
    """

    runtime = "vllm"
    version = "0.32.0"
    fp8_method = "ModelOptLinearMethod"
    known_algorithms = frozenset(
        {"FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"}
    )
    _NEVER = ("vision_tower", "vision_model", "vit_large_projector")

    @classmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return `quant_algo` in upper case, as vLLM reads it."""
        upper = str(name or "").upper()
        return upper if upper == "FP8" or upper in cls.known_algorithms else None

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return True: vLLM's mapper renames exclusions as it renames tensors, so the checkpoint's names will do."""
        return True

    def mapped(self, exclude: str) -> tuple[str, ...]:
        """Return an exclusion under vLLM's names; a `*` at its end becomes "this, and all below it"."""
        if len(exclude) >= 2 and exclude[-1] == "*" and exclude[-2] != ".":
            return self.need.rename(exclude[:-1]), self.need.rename(f"{exclude[:-1]}.*")
        return (self.need.rename(exclude),)

    def never_quantised(self, module: str) -> bool:
        """Return whether it belongs to a vision tower that vLLM knows by these names."""
        return any(part in module for part in self._NEVER)

    def decide(self, layer: RuntimeLayer) -> Decision:
        """Decide by exact names first; only a whole fused name outranks its modules'."""
        asked = self.need.fusing.asked_as
        name = asked(layer.name)
        if layer.packed and name not in self.written:
            listed = tuple(shard for shard in map(asked, layer.shards) if shard in self.written)
            if listed:
                return Decision("excluded" if len(listed) == len(layer.shards) else "mixed", listed)
        hits = tuple(pattern for pattern in self.patterns if self.hits(pattern, name))
        return Decision("excluded" if hits else "quantised", hits)

    def hits(self, pattern: str, name: str) -> bool:
        """Return whether the pattern is anywhere in the name, or matches all of it as a wildcard."""
        return pattern in name or (pattern in self.wild and fnmatchcase(name, pattern))


class SglangRules(Rules):
    """SGLang's: whole parts of a name, all modules of a fused layer or none; then `*` over the name or one part of it.

    Source: sgl-project/sglang, python/sglang/srt/layers/quantization/modelopt/modelopt.py at 3d2509d8a2ca
    (ModelOptQuantConfig), modelopt/schemes/modelopt_fp8.py at 578ca2f63399 (ModelOptFp8Config.from_config), utils.py
    since pull request #23467 (is_layer_skipped, _module_path_match), models/qwen2_5_vl.py and qwen3_vl.py
    (hf_to_sglang_mapper). An FP8 product that CUTLASS can't take goes to Triton (fp8_utils.py, apply_fp8_linear).
    """

    runtime = "sglang"
    version = "main at 578ca2f63399"
    fp8_method = "ModelOptFp8LinearMethod"
    known_algorithms = frozenset({"NVFP4", "MIXED_PRECISION"})
    _VISION_QKV = ("attn.qkv", "attn.qkv_proj")

    @classmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return FP8 for whatever has FP8 in its name, as SGLang does."""
        if name is None or name in cls.known_algorithms:
            return name
        return "FP8" if "FP8" in name else None

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

    def decide(self, layer: RuntimeLayer) -> Decision:
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
        return Decision("excluded" if found else "quantised", found)

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


class TensorRtLlmRules(Rules):
    """TensorRT-LLM's: shell wildcards over the whole name, a fused layer as soon as one of its modules is hit.

    The language model of a vision-language model is a model of its own there, so its modules are called
    `model.layers...`; the vision tower and the output matrix are never quantised.

    Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py at 01ea6d79d454
    (QuantConfig.is_module_excluded_from_quantization), _torch/models/modeling_utils.py at cb4c622cf5bb
    (apply_quant_config_exclude_modules), quantization/modelopt_config.py at 2edf354d4b92 (which file wins),
    _torch/model_config.py at 008e0af8980f, _torch/models/modeling_qwen2vl.py (Qwen2VisionModelBase), and
    _torch/modules/linear.py at 00bbf71e7964 (FP8QDQLinearMethod: cuBLAS).
    """

    runtime = "tensorrt_llm"
    version = "main at 008e0af8980f"
    fp8_method = "FP8QDQLinearMethod"
    legacy_first = True
    kernel_multiple = _KERNEL_MULTIPLE
    known_algorithms = frozenset({"FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4", "MIXED_PRECISION"})

    @classmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return `quant_algo` if it is a name of TensorRT-LLM's QuantAlgo, letter by letter."""
        return name if name == "FP8" or name in cls.known_algorithms else None

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return whether it is a language model, or Qwen2-VL or Qwen2.5-VL."""
        return need.renames in ((), QWEN2_VL_RENAMES) and super().reproduced(need)

    def name(self, module: str) -> str:
        """Return the name in the language model alone."""
        return module.removeprefix("language_model.")

    def never_quantised(self, module: str) -> bool:
        """Return whether it is the output matrix, or in the vision tower."""
        return module == self.need.head or (self.need.vision is not None and module.startswith(self.need.vision))

    def decide(self, layer: RuntimeLayer) -> Decision:
        """Decide by the fused name and those of its modules: one hit is enough."""
        names = (layer.name, *(self.name(module) for module in layer.modules))
        listed = dict.fromkeys(name for name in names if name in self.written)
        wild = [pattern for pattern in self.wild if any(fnmatchcase(name, pattern) for name in names)]
        hits = tuple(sorted({*listed, *wild}, key=self.patterns.index))
        return Decision("excluded" if hits else "quantised", hits)

    def hits(self, pattern: str, name: str) -> bool:
        """Return whether the pattern matches the whole name."""
        return pattern == name or (pattern in self.wild and fnmatchcase(name, pattern))


RULES: dict[str, type[Rules]] = {rules.runtime: rules for rules in (VllmRules, SglangRules, TensorRtLlmRules)}
