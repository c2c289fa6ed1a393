"""vLLM's rules: which layers it would run quantised."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from typing import ClassVar

from bitladder.models.families import Architecture
from bitladder.models.fusing import Layer
from bitladder.runtimes.base import MIX, Decision, Rules, Support

_NOT_IN_OLD_MIX = "vLLM 0.25.1 takes these layers of a mix for 16-bit ones without a word; 0.32.0 runs them"
_MODELOPT = "vllm {}, model_executor/layers/quantization/modelopt.py"
_SCHEMES = "vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_{}.py"


class VllmRules(Rules):
    """vLLM's: a fused layer by its modules' exact names, all or none; then any substring; then wildcards.

    In a mix a layer runs as its own name, or any of its modules', is listed; what isn't listed stays in 16 bits.

    Source: vllm 0.32.0, model_executor/layers/quantization/modelopt.py (ModelOptQuantConfigBase.is_layer_excluded,
    apply_vllm_mapper, from_config; LINEAR_ALGOS; ModelOptMixedPrecisionConfig._resolve_quant_algo, get_quant_method),
    utils/quant_utils.py (is_layer_skipped). Its CUTLASS kernel pads (kernels/linear/scaled_mm/cutlass.py), so any
    dimensions will do.
    """

    runtime = "vllm"
    version = "0.32.0"
    splits = True
    SUPPORT: ClassVar = {
        "fp8": Support("ModelOptLinearMethod", 80, None, _MODELOPT.format(version)),
        "fp8_pc_pt": Support(
            "ModelOptLinearMethod",
            80,
            None,
            _MODELOPT.format(version),
            caveat=_NOT_IN_OLD_MIX,
        ),
        # both need the whole blocks that the formats ask for; kernels.py says where inputs are rounded. Least here: of
        # ModelOptMxFp8Config and ModelOptFp8Config (get_min_capability); in a mix ModelOptMixedPrecisionConfig's, 7.5
        "fp8_block": Support("ModelOptLinearMethod", 80, None, _MODELOPT.format(version), caveat=_NOT_IN_OLD_MIX),
        "mxfp8": Support("ModelOptLinearMethod", 80, None, _MODELOPT.format(version)),
        # of both versions: GPUs without FP4 units run these layers with inputs in 16 bits, from 7.5 on
        "nvfp4": Support("ModelOptLinearMethod", 75, None, _MODELOPT.format(version)),
        "nvfp4_w4a16": Support("ModelOptLinearMethod", 75, None, _MODELOPT.format(version)),
    }
    CARRIED: ClassVar = {  # least: each scheme's get_min_capability
        # below 8.9 CompressedTensorsW8A16Fp8 takes FP8, from 7.5 on, and leaves inputs in 16 bits
        "fp8": Support("CompressedTensorsW8A8Fp8", 89, None, _SCHEMES.format("w8a8_fp8")),
        "fp8_pc_pt": Support("CompressedTensorsW8A8Fp8", 89, None, _SCHEMES.format("w8a8_fp8")),
        "fp8_block": Support("CompressedTensorsW8A8Fp8", 89, None, _SCHEMES.format("w8a8_fp8")),
        # 7.5 where ModelOpt's uniform layout asks for 8.0: its Marlin kernel does without FP8 units
        "mxfp8": Support("CompressedTensorsW8A8Mxfp8", 75, None, _SCHEMES.format("w8a8_mxfp8")),
        "nvfp4": Support("CompressedTensorsW4A4Fp4", 75, None, _SCHEMES.format("w4a4_nvfp4")),
        "nvfp4_w4a16": Support("CompressedTensorsW4A4Fp4", 75, None, _SCHEMES.format("w4a4_nvfp4")),
        "int8": Support("CompressedTensorsW8A8Int8", 75, None, _SCHEMES.format("w8a8_int8")),
        **{
            name: Support("CompressedTensorsWNA16", 75, None, _SCHEMES.format("wNa16"))
            for name in (
                *("int8_w8a16", "int8_w8a16_g64", "int4_w4a16", "int4_w4a16_g64"),
                *("int4_w4a16_asym", "int4_w4a16_asym_g64"),
            )
        },
    }
    known_algorithms = frozenset({"FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", MIX})
    kv_skip_argument = "--kv-cache-dtype-skip-layers"  # Source: vllm#33695, engine/arg_utils.py
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
        """Return whether it belongs to a vision tower that vLLM knows by these names; in a mix only the list counts."""
        return self.uniform is not None and any(part in module for part in self._NEVER)

    def decide(self, layer: Layer) -> Decision:
        """Decide by exact names first; only a whole fused name outranks its modules'."""
        asked = self.need.fusing.asked_as
        name = asked(layer.name)
        if layer.packed and name not in self.written:
            listed = tuple(shard for shard in map(asked, layer.shards) if shard in self.written)
            if listed:
                return Decision("excluded" if len(listed) == len(layer.shards) else "mixed", listed)
        hits = tuple(pattern for pattern in self.patterns if self.hits(pattern, name))
        return Decision("excluded", hits) if hits else self.quantised(layer)

    def entry(self, module: str) -> str:
        """Return a listed module under vLLM's names."""
        return self.need.rename(module)

    def spellings(self, name: str) -> tuple[str, ...]:
        """Return a name in vLLM's and in transformers' spelling.

        Source: vllm 0.32.0, ModelOptMixedPrecisionConfig._quantized_layer_prefix_candidates.
        """
        found = [name, "lm_head"] if name.endswith(".lm_head") else [name]
        vllms, transformers = "language_model.model.", "model.language_model."
        if name.startswith(vllms):
            found.append(transformers + name.removeprefix(vllms))
        elif name.startswith(transformers):
            found.append(vllms + name.removeprefix(transformers))
        return tuple(found)

    def listed(self, layer: Layer) -> dict[str, str]:
        """Return the layer's own entry, or those of its modules, or the first one below it."""
        asked = self.need.fusing.asked_as
        own = self._found([asked(layer.name)])
        if own:
            return dict([next(iter(own.items()))])
        shards = self._found(map(asked, layer.shards))
        below = next((self._below[name] for name in self.spellings(asked(layer.name)) if name in self._below), None)
        return shards or ({} if below is None else {below: self.mix[below]})

    def _found(self, names: Iterable[str]) -> dict[str, str]:
        return {entry: self.mix[entry] for name in names for entry in self.spellings(name) if entry in self.mix}

    @cached_property
    def _below(self) -> dict[str, str]:
        """What is above the entries of a mix -> the first entry below it."""
        found: dict[str, str] = {}
        for entry in self.mix:
            parts = entry.split(".")
            for end in range(1, len(parts)):
                found.setdefault(".".join(parts[:end]), entry)
        return found

    def hits(self, pattern: str, name: str) -> bool:
        """Return whether the pattern is anywhere in the name, or matches all of it as a wildcard."""
        return pattern in name or (pattern in self.wild and fnmatchcase(name, pattern))


class VllmRules0251(VllmRules):
    """vLLM 0.25.1's: a class a format, and a mix that knows FP8, NVFP4, W4A16_NVFP4 and MXFP8 alone.

    Source: vllm 0.25.1, the same files (ModelOptMixedPrecisionConfig.get_quant_method).
    """

    version = "0.25.1"
    CARRIED: ClassVar = {}  # wasn't read
    SUPPORT: ClassVar = {
        "fp8": Support("ModelOptFp8LinearMethod", 89, None, _MODELOPT.format(version)),
        "fp8_pc_pt": Support("ModelOptFp8PcPtLinearMethod", 89, None, _MODELOPT.format(version), in_mix=False),
        "fp8_block": Support("ModelOptFp8PbWoLinearMethod", 89, None, _MODELOPT.format(version), in_mix=False),
        "mxfp8": Support("ModelOptMxFp8LinearMethod", 80, None, _MODELOPT.format(version)),
        "nvfp4": Support("ModelOptNvFp4LinearMethod", 75, None, _MODELOPT.format(version)),
        "nvfp4_w4a16": Support("ModelOptNvFp4W4A16LinearMethod", 75, None, _MODELOPT.format(version)),
    }
