"""Has an FP8 KV cache its scales, and have those one? Which layers stay in 16 bits?"""

from bitladder.formats import KV_SCALE_NAMES, KV_SKIPS
from bitladder.records import layer_number
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
                        self.spelt(f"{name}.{leaf[0]}_proj.{leaf}"),
                        f"isn't there, though the KV cache is {asked}: {self.rules.runtime} would use another",
                        EXPORT_AGAIN,
                    )
        for tensor in held.values():
            self._scale(tensor)
        self._check_skips()

    def _check_skips(self) -> None:
        """Check the layers whose cache is to stay in 16 bits, and say that the files alone don't make it so."""
        listed = next((found.kv_skips for found in self.configurations if found.file == CONFIG_FILE), ())
        promised = (
            [str(layer_number(one)) for one in self.files.manifest.kv_cache_skips] if self.files.manifest else None
        )
        if promised is not None and promised != list(listed):
            self.findings.error(
                "wrong_format",
                CONFIG_FILE,
                f"{KV_SKIPS} is {list(listed)}, but the manifest promises {promised}",
                EXPORT_AGAIN,
            )
        if not listed:
            return
        layers = "1 layer" if len(listed) == 1 else f"{len(listed)} layers"
        argument = self.rules.kv_skip_argument
        self.findings.warn(
            "wrong_format",
            f"{CONFIG_FILE}: {KV_SKIPS}",
            f"keeps the KV cache of {layers} in 16 bits, which {self.rules.runtime} reads from no file: it stores "
            "theirs in FP8 too, by the scales that are there",
            f"serve it with {argument} {' '.join(listed)}"
            if argument
            else "serve it with vLLM, or export with kv_cache: fp8 or none",
        )

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
