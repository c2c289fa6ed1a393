"""Has an FP8 KV cache its scales, and have those one?"""

from bitladder.formats import KV_SCALE_NAMES
from bitladder.runtimes.checks.scales import ScalesCheck
from bitladder.runtimes.config import CONFIG_FILE, LEGACY_FILE
from bitladder.runtimes.findings import EXPORT_AGAIN


class KvCacheCheck(ScalesCheck):
    """Checks the scales of the KV cache."""

    def check_kv_cache(self) -> None:
        """Check that an FP8 KV cache is asked for where there are scales for it, and has those of every layer."""
        held = self.tensors.kv_scales
        asked = self.quantisation.kv_cache if self.quantisation is not None else None
        if asked is None:
            for tensor in held.values():
                self.findings.error(
                    "config_mismatch",
                    tensor.name,
                    f"scales an FP8 KV cache, but the configuration that {self.rules.runtime} reads asks for none",
                    f"set kv_cache_scheme in {CONFIG_FILE} and kv_cache_quant_algo in {LEGACY_FILE}",
                )
            return
        for name in self._attentions():
            for leaf in KV_SCALE_NAMES:
                if f"{name}.{leaf}" not in held:
                    self.findings.error(
                        "missing_tensor",
                        self._spelt(f"{name}.{leaf[0]}_proj.{leaf}"),
                        f"isn't there, though the KV cache is {asked}: {self.rules.runtime} would use another",
                        EXPORT_AGAIN,
                    )
        for tensor in held.values():
            self._scale(tensor)

    def _attentions(self) -> list[str]:
        """Return the attentions that cache keys and values; in unknown architectures those that have a scale."""
        if not self.need.known:
            return sorted({name.rpartition(".")[0] for name in self.tensors.kv_scales})
        ending = ".self_attn.k_proj"
        return [
            name.removesuffix(".k_proj")
            for name in self.need.linears
            if name.startswith(self.need.text) and name.endswith(ending)
        ]
