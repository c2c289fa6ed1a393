"""TensorRT-LLM's rules: which layers it would run quantised."""

from fnmatch import fnmatchcase
from typing import ClassVar

from bitladder.models.families import Architecture
from bitladder.models.families.qwen_vl import QWEN2_VL_RENAMES
from bitladder.models.fusing import Layer
from bitladder.runtimes.base import MIX, Decision, Rules, Support

_KERNEL_MULTIPLE = 16  # FP8 products of cuBLAS want dimensions of 16 bytes (cuBLAS documentation, cublasLtMatmul)
_LINEAR = "tensorrt_llm/_torch/modules/linear.py at 00bbf71e7964"


class TensorRtLlmRules(Rules):
    """TensorRT-LLM's: shell wildcards over the whole name, a fused layer as soon as one of its modules is hit.

    The language model of a vision-language model is a model of its own there, so its modules are called
    `model.layers...`; the vision tower and the output matrix are never quantised.

    Source: NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py at 01ea6d79d454
    (QuantConfig.is_module_excluded_from_quantization), _torch/models/modeling_utils.py at cb4c622cf5bb
    (apply_quant_config_exclude_modules), quantization/modelopt_config.py at 2edf354d4b92 (which file wins),
    _torch/model_config.py at 008e0af8980f (load_modelopt_quant_config), _torch/models/modeling_qwen2vl.py
    (Qwen2VisionModelBase), and _torch/modules/linear.py at 00bbf71e7964 (FP8QDQLinearMethod: cuBLAS;
    FP8RowwiseLinearMethod; FP8BlockScalesLinearMethod). Of a mix: model_config.py (_build_modelopt_quant_config; a
    quant_cfg.json beside it isn't read here) and modeling_utils.py (apply_layerwise_quant_config, then the exclusions).
    """

    runtime = "tensorrt_llm"
    version = "main at 008e0af8980f"
    SUPPORT: ClassVar = {
        "fp8": Support("FP8QDQLinearMethod", None, _KERNEL_MULTIPLE, _LINEAR),
        # the dimensions of fp8_rowwise_gemm weren't read: CUTLASS, too, moves 16 bytes at a time
        "fp8_pc_pt": Support("FP8RowwiseLinearMethod", None, _KERNEL_MULTIPLE, _LINEAR),
        # `fp8_pb_wo` is renamed to FP8_BLOCK_SCALES, and the two dimensions of one of its scales are squeezed out
        "fp8_block": Support(
            "FP8BlockScalesLinearMethod",
            None,
            None,
            _LINEAR,
            in_mix="TensorRT-LLM knows fp8_pb_wo as the algorithm of a whole checkpoint, not of a module in a mix",
        ),
        "mxfp8": "MXFP8 is no algorithm of what was read of TensorRT-LLM",
        # it asserts whole blocks of the input's features, as the format itself asks for
        "nvfp4": Support("NVFP4LinearMethod", None, None, _LINEAR),
        "nvfp4_w4a16": "TensorRT-LLM has no W4A16_NVFP4 (quantization/mode.py, QuantAlgo)",
    }
    legacy_first = True
    known_algorithms = frozenset({"FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "fp8_pb_wo", "NVFP4", MIX})
    # what decides about a fused layer in a mix: the first entry that has one of these in its name
    _DECIDING: ClassVar = {"gate_up_proj": ("gate_proj", "gate_up_proj"), "qkv_proj": ("q_proj",)}

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

    def decide(self, layer: Layer) -> Decision:
        """Decide by the fused name and those of its modules: one hit is enough."""
        names = (layer.name, *(self.name(module) for module in layer.modules))
        listed = dict.fromkeys(name for name in names if name in self.written)
        wild = [pattern for pattern in self.wild if any(fnmatchcase(name, pattern) for name in names)]
        hits = tuple(sorted({*listed, *wild}, key=self.patterns.index))
        return Decision("excluded", hits) if hits else self.quantised(layer)

    def listed(self, layer: Layer) -> dict[str, str]:
        """Return the entry of a layer's own name; of a fused one the first that holds its deciding module's."""
        parent, _, own = layer.name.rpartition(".")
        if own not in self._DECIDING or not layer.shards:
            return {layer.name: self.mix[layer.name]} if layer.name in self.mix else {}
        names = [f"{parent}.{name}" for name in self._DECIDING[own]]
        found = next((entry for entry in self.mix if any(name in entry for name in names)), None)
        return {} if found is None else {found: self.mix[found]}

    def hits(self, pattern: str, name: str) -> bool:
        """Return whether the pattern matches the whole name."""
        return pattern == name or (pattern in self.wild and fnmatchcase(name, pattern))
