"""In which format is a layer stored, in which would it run, and in which was it promised?"""

from bitladder.formats import get_format
from bitladder.models.families import SCALES
from bitladder.models.fusing import Layer
from bitladder.records import BF16, CheckpointManifest
from bitladder.runtimes.checks.subject import Subject
from bitladder.runtimes.config import CONFIG_FILE, LEGACY_FILE
from bitladder.runtimes.files import SIXTEEN_BIT
from bitladder.runtimes.findings import EXPORT_AGAIN

_CODES = {8: "FP8", 4: "FP4"}
_COUNTERS = ("I64", "I32", "BOOL")  # buffers that count or index; no runtime casts them


class FormatsCheck(Subject):
    """Checks dtypes and formats."""

    def check_formats(self) -> None:
        """Check every tensor's dtype, and every layer's format against what the runtime would run."""
        linear = {f"{module}.weight" for module in self.need.linears}
        codes = {get_format(name).code_dtype for name in self.rules.SUPPORT}
        for name, tensor in self.tensors.weights.items():
            known = name in linear and tensor.dtype in codes and self._stored(name.removesuffix(".weight")) is not None
            if name in linear and not known and tensor.dtype not in SIXTEEN_BIT:
                runs = self._runs_in[name.removesuffix(".weight")]
                wanted = get_format(next(iter(self.rules.SUPPORT)) if runs == BF16 else runs)
                self.findings.error(
                    "unsupported_format",
                    tensor.name,
                    f"is stored as {tensor.dtype}; quant_algo {wanted.modelopt_algorithm} is {wanted.code_dtype}, "
                    "other values would be cast",
                    EXPORT_AGAIN,
                )
            elif name not in linear and tensor.dtype not in (*SIXTEEN_BIT, *_COUNTERS):
                self._wrong(name, tensor.dtype, "is no linear, so it runs in 16 bits")
        for layer in self.rules.layers if self.reproduced else ():
            self._format(layer)

    def _wrong(self, name: str, dtype: str, why: str) -> None:
        self.findings.error(
            "wrong_format",
            self.tensors.weights[name].name,
            f"is stored as {dtype}, but {why}",
            "store it in BF16, as the original model has it",
        )

    def _format(self, layer: Layer) -> None:
        """Check one layer of the runtime."""
        runtime, decision = self.rules.runtime, self.decisions[layer]
        stored = {module: held for module in layer.modules if (held := self._stored(module)) is not None}
        where = self.spelt(layer.modules[0])
        quantised = {module: held != BF16 for module, held in stored.items()}
        if len(set(quantised.values())) > 1:
            self.wrong.update(stored)
            odd = ", ".join(f"{module.rpartition('.')[2]} in {held}" for module, held in stored.items())
            self.findings.error(
                "mixed_group",
                where,
                f"{runtime} fuses modules that are stored in different formats ({odd})",
                "quantise all of them or none",
            )
            return
        if decision.outcome == "mixed":
            self._mixed_decision(layer, where)
        elif stored and (self._runs(layer) != BF16) not in quantised.values():
            self.wrong.update(stored)
            self._wrong_format(layer, where)
        elif others := [m for m in stored if self._expected(m) not in (None, decision.format)]:
            self.wrong.update(others)
            self.findings.error(
                "wrong_format",
                self.spelt(others[0]),
                f"is stored in {stored[others[0]]}, but {runtime} would run it in {decision.format}",
                "make quant_algo say how it is stored, or export again",
            )
        elif any(quantised.values()):
            self._kernel(layer, where)
            self._listing(layer, where)
        self._left_over(layer)

    def _mixed_decision(self, layer: Layer, where: str) -> None:
        """Say that the modules of a fused layer are decided differently."""
        fuses = f"{self.rules.runtime} fuses {', '.join(m.rpartition('.')[2] for m in layer.modules)}, but "
        if any(pattern in self.rules.mix for pattern in self.decisions[layer].patterns):
            remedy = "give all of them the same quant_algo in quantized_layers"
            self.findings.error("mixed_group", where, f"{fuses}they are listed with different algorithms", remedy)
            return
        remedy = "exclude all of them or none, by their exact names"
        self.findings.error("mixed_group", where, f"{fuses}only some are excluded", remedy)

    def _listing(self, layer: Layer, where: str) -> None:
        """Warn of a quantised layer of which a mix lists only some modules."""
        lost = self.rules.unlisted(layer) if self.rules.mix else []
        if lost:
            self.findings.warn(
                "ambiguous_exclude",
                where,
                f"quantized_layers lists only some of what {self.rules.runtime} fuses, without "
                f"{', '.join(module.rpartition('.')[2] for module in lost)}: it takes the others' algorithm",
                "list every quantised module",
            )

    def _wrong_format(self, layer: Layer, where: str) -> None:
        """Say why a layer would run in another format than it is stored in."""
        runtime, patterns = self.rules.runtime, self.decisions[layer].patterns
        if self.rules.uniform is None and self._wrong_in_mix(layer, where):
            return
        if self._runs(layer) != BF16:
            codes = _CODES[get_format(self._runs(layer)).code_bits]
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in 16 bits, but not excluded: {runtime} would cast it to {codes} without a scale",
                f"add its exact name to the exclusions in {CONFIG_FILE} and {LEGACY_FILE}",
            )
        elif self.quantisation is None:
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in {self._kind(layer)}, but neither {CONFIG_FILE} nor {LEGACY_FILE} has a quantisation",
                "put ModelOpt's quantization_config back",
            )
        elif not patterns:
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in {self._kind(layer)}, but {runtime} never quantises it",
                "store it in BF16",
            )
        elif any(self.rules.exact(pattern, layer) for pattern in patterns):
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in {self._kind(layer)}, but excluded: {runtime} would take the codes for 16-bit numbers",
                "take it off the exclusions, or store it in BF16",
            )
        else:
            self.findings.error(
                "ambiguous_exclude",
                where,
                f"is stored in {self._kind(layer)}, but the exclusion {self.rules.written[patterns[0]]!r} hits it in "
                f"{runtime} too",
                "replace it by the exact names of the modules that it is meant for",
            )

    def _kind(self, layer: Layer) -> str:
        """Return what kind of codes a layer is stored in."""
        stored = next(held for module in layer.modules if (held := self._stored(module)) not in (None, BF16))
        return _CODES[get_format(str(stored)).code_bits]

    def _wrong_in_mix(self, layer: Layer, where: str) -> bool:
        """Say why a layer would run in another format than it is stored in, if a mix's list is the reason."""
        runtime, decision = self.rules.runtime, self.decisions[layer]
        codes = f"{runtime} would take the codes for 16-bit numbers"
        if decision.format != BF16:
            problem = f"is stored in 16 bits, but listed as {decision.format}: {runtime} would cast it without a scale"
            remedy = "take it off quantized_layers"
        elif decision.dropped is not None:
            problem = f"is stored quantised, but {decision.dropped}: {codes}"
            remedy = "serve it with a runtime, or a version of it, that takes this mix"
        elif not decision.patterns:
            problem = f"is stored quantised, but quantized_layers doesn't list it: {codes}"
            remedy = f"list it with its quant_algo in {CONFIG_FILE} and {LEGACY_FILE}"
        else:
            return False
        self.findings.error("wrong_format", where, problem, remedy)
        return True

    def _kernel(self, layer: Layer, where: str) -> None:
        """Check the dimensions of a quantised layer."""
        support = self.rules.support(self._runs(layer))
        kind = _CODES[get_format(self._runs(layer)).code_bits]
        multiple = None if support is None else support.multiple
        shapes = [self._shape(f"{m}.weight") for m in layer.modules if self._stored(m) is not None]
        if multiple is None or any(len(shape) != 2 for shape in shapes):
            return
        sizes = (sum(shape[0] for shape in shapes), shapes[0][1])
        if any(size % multiple for size in sizes):
            self.findings.error(
                "unsupported_format",
                where,
                f"{self.rules.runtime}'s {kind} kernel takes multiples of {multiple}; the layer is {list(sizes)}",
                "leave this layer in BF16",
            )

    def _left_over(self, layer: Layer) -> None:
        """Check that a layer in 16 bits has no scales."""
        for module in layer.modules:
            for leaf in SCALES:
                tensor = self.tensors.scales.get(f"{module}.{leaf}")
                if tensor is not None and self._stored(module) == BF16 and self._runs(layer) == BF16:
                    self.findings.error(
                        "unexpected_tensor",
                        tensor.name,
                        f"belongs to a layer in 16 bits, for which {self.rules.runtime} has no scale",
                        "leave it out",
                    )

    def check_manifest(self) -> None:
        """Check the files against what was exported."""
        manifest = self.files.manifest
        if manifest is None:
            return
        promised = self._promised()
        for module in self.need.linears:
            stored = self._stored(module)
            if stored is not None and module not in self.wrong and stored != promised.get(module, BF16):
                self.findings.error(
                    "wrong_format",
                    self.spelt(module),
                    f"is stored in {stored}, but the manifest promises {promised.get(module, BF16)}",
                    EXPORT_AGAIN,
                )
        asked = None if self.quantisation is None else self.quantisation.kv_cache
        if (manifest.kv_cache_format is None) != (asked is None):
            self.findings.error(
                "wrong_format",
                CheckpointManifest.FILE_NAME,
                f"promises the KV cache in {manifest.kv_cache_format or BF16}, the configuration says {asked or BF16}",
                EXPORT_AGAIN,
            )
