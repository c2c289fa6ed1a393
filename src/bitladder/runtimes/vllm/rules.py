"""vLLM's rules: which layers it would run quantised."""

from fnmatch import fnmatchcase

from bitladder.runtimes.architectures import Architecture
from bitladder.runtimes.base import Decision, Rules, RuntimeLayer


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
