"""Pre-flight: what would a runtime make of a checkpoint, from its files alone? `preflight(directory)`.

Read are the JSON files, the headers of the safetensors files, and every scale; that is milliseconds, whatever the
model's size. With `read_weights=True` the weights are read too, for NaN and infinity: as long as the disk takes.
No runtime is imported. Each runtime's own rules (`rules.py`) are applied to one list of what the architecture needs
and one list of what the files hold:

- which configuration it reads, and whether it knows the algorithm;
- tensors that are missing, or for which it has no place; dtypes and shapes;
- for every linear, or fused group of linears, the format that its exclusions decide against the one that is stored;
- scales that are missing, not one number, not finite and positive, or unequal within a fused group;
- the FP8 KV cache that is asked for against its scales; the manifest's promises.

Tensor names are read as vLLM's mapper does, for every runtime. How the runtimes differ beyond that is in `rules.py`,
what an architecture needs in `architectures.py`, each with its sources; `files.py` reads what the directory holds.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from bitladder.errors import BitladderError, ModelError
from bitladder.reading import open_file
from bitladder.records import BF16, CheckpointManifest, ProbedLayer, ProbeResult
from bitladder.runtimes.architectures import SCALES, Architecture, architecture, architecture_name, uneven_layers
from bitladder.runtimes.base import Decision, Rules, RuntimeLayer
from bitladder.runtimes.config import CONFIG_FILE, LEGACY_FILE, Quantisation, inline, nested
from bitladder.runtimes.files import E4M3, SCALE_DTYPE, SIXTEEN_BIT, Files, Tensor, read_files
from bitladder.runtimes.findings import EXPORT_AGAIN, Findings
from bitladder.runtimes.registry import RULES

RUNTIMES = tuple(RULES)
FP8 = "fp8"  # as our formats are called
# Names of the scales of an attention's cached keys and values, in ModelOpt's form and in those that vLLM also knows.
# Source: vllm model_executor/model_loader/weight_utils.py, maybe_remap_kv_scale_name.
_KV_SCALE = re.compile(
    r"^(?P<attention>.+\.(?:self_attn|mixer))\.(?:[kv]_proj\.|qkv_proj\.|attn\.)?(?P<which>[kv])_scale$"
)
# Tensors that older checkpoints carry and that runtimes compute themselves.
# Source: vllm model_executor/models/utils.py, AutoWeightsLoader.REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER.
_COUNTERS = ("I64", "I32", "BOOL")  # buffers that count or index; no runtime casts them
_RECOMPUTED = re.compile(r"rotary_(?:emb|pos_emb)\.(?:inv_freq|cos_cached|sin_cached)$")


@dataclass
class _Sorted:
    """The checkpoint's tensors under vLLM's names, by what they are."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # what the architecture needs
    scales: dict[str, Tensor] = field(default_factory=dict)
    kv_scales: dict[str, Tensor] = field(default_factory=dict)  # `<attention>.k_scale`, `<attention>.v_scale`
    ignored: list[str] = field(default_factory=list)  # an output matrix of a model that has none of its own
    unexpected: list[str] = field(default_factory=list)  # as the checkpoint spells them


def _sort(need: Architecture, tensors: Iterable[Tensor]) -> _Sorted:
    kinds = _Sorted()
    for tensor in tensors:
        name = need.rename(tensor.name)
        module, _, leaf = name.rpartition(".")
        cache = _KV_SCALE.match(name)
        if _RECOMPUTED.search(name):
            continue
        if cache and f"{cache['attention']}.k_proj.weight" in need.tensors:
            kinds.kv_scales[f"{cache['attention']}.{cache['which']}_scale"] = tensor
        elif name in need.tensors:
            kinds.weights[name] = tensor
        elif leaf in SCALES and f"{module}.weight" in need.tensors:
            kinds.scales[name] = tensor
        elif need.tied and name == f"{need.head}.weight":
            kinds.ignored.append(tensor.name)
        else:
            kinds.unexpected.append(tensor.name)
    return kinds


def _usable(scale: float | None) -> bool:
    return scale is not None and 0 < scale < math.inf


class _Check:
    """All checks of one checkpoint by one runtime's rules."""

    def __init__(self, files: Files, need: Architecture, rules: type[Rules], findings: Findings) -> None:
        self.files, self.need, self.findings = files, need, findings
        self.tensors = _sort(need, files.tensors)
        asked = [inline(files.config), None if files.legacy is None else nested(files.legacy, LEGACY_FILE)]
        self.configurations = [c for c in (reversed(asked) if rules.legacy_first else asked) if c is not None]
        self.quantisation = self.configurations[0] if self.configurations else None
        self.rules = rules(need, () if self.quantisation is None else self.quantisation.excludes)
        self.reproduced = rules.reproduced(need)
        self.decisions = {layer: self._decide(layer) for layer in self.rules.layers}
        self.wrong: set[str] = set()  # modules whose format is a finding already
        self._numbers: dict[str, float | None] = {}

    def run(self, read_weights: bool) -> str:
        """Make all checks; return the last one that made sense."""
        self._model()
        if not self._configuration():
            return "configuration"
        self._names()
        self._shapes()
        self._formats()
        if self.reproduced:
            self._excludes()
        self._scales()
        self._kv_cache()
        self._manifest()
        if read_weights:
            self._values()
        return "weights" if read_weights else "scales"

    # --- helpers

    def _decide(self, layer: RuntimeLayer) -> Decision:
        if self.quantisation is None or all(self.rules.never_quantised(module) for module in layer.modules):
            return Decision("excluded")
        return self.rules.decide(layer)

    @cached_property
    def _prefixes(self) -> list[tuple[str, str]]:
        """Prefixes of vLLM's names -> those that this checkpoint uses."""
        return [
            (new, old)
            for old, new in self.need.renames
            if any(tensor.name.startswith(old) for tensor in self.files.tensors)
        ]

    def _spelt(self, name: str) -> str:
        """Return the checkpoint's name of a module or tensor."""
        for new, old in self._prefixes:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    @property
    def _last_word(self) -> str:
        return f"let {self.rules.runtime}'s own loader have the last word"

    def _stored(self, module: str) -> str | None:
        """Return the format in which a module's weight is stored; None: it isn't there, or in no known one."""
        tensor = self.tensors.weights.get(f"{module}.weight")
        if tensor is None:
            return None
        return FP8 if tensor.dtype == E4M3 else BF16 if tensor.dtype in SIXTEEN_BIT else None

    def _runs(self, layer: RuntimeLayer) -> str:
        return FP8 if self.decisions[layer].outcome == "quantised" else BF16

    # --- the checks themselves

    def _model(self) -> None:
        """Say what can't be checked because the model's names aren't known."""
        name = architecture_name(self.files.config)
        if not self.need.known:
            self.findings.warn(
                "unsupported_model",
                CONFIG_FILE,
                f"what {name} needs isn't known here: only layers that lack what other layers have are noticed",
                self._last_word,
            )
        if not self.reproduced:
            self.findings.warn(
                "unsupported_model",
                CONFIG_FILE,
                f"what {self.rules.runtime} calls the modules of {name} isn't known here: no exclusion was checked",
                self._last_word,
            )

    def _configuration(self) -> bool:
        """Check what is asked for; return whether the rules here cover it."""
        if len(self.configurations) == 2:
            self._disagreement(*self.configurations)
        asked = self.quantisation
        if asked is None:
            return True
        if not asked.method.lower().startswith("modelopt"):
            self.findings.warn(
                "unsupported_format",
                asked.file,
                f"quant_method is {asked.method!r}; only ModelOpt's rules are known here, so no layer was checked",
                self._last_word,
            )
            return False
        if not asked.well_formed:
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"its exclusions are no list of names, which {self.rules.runtime} refuses",
                "write them as a list of the modules' exact names",
            )
            return False
        algorithm = self.rules.algorithm(asked.algorithm)
        if algorithm is None:
            known = ", ".join(["FP8", *sorted(self.rules.known_algorithms)])
            self.findings.error(
                "unsupported_format",
                asked.file,
                f"quant_algo is {asked.algorithm!r}, which {self.rules.runtime} doesn't know",
                f"correct it, or export again: {self.rules.runtime} knows {known}",
            )
            return False
        if algorithm != "FP8":
            self._another_algorithm(asked.file, algorithm)
        return algorithm == "FP8"

    def _another_algorithm(self, file: str, algorithm: str) -> None:
        """Say what is known of an algorithm other than FP8 with one scale a tensor; all others have more scales."""
        if any(not tensor.one_number for tensor in self.tensors.scales.values()):
            self.findings.warn(
                "unsupported_format",
                file,
                f"quant_algo is {algorithm}; only FP8 with one scale a tensor is known here, so no layer was checked",
                self._last_word,
            )
        else:
            self.findings.error(
                "unsupported_format",
                file,
                f"quant_algo is {algorithm}, but no tensor is stored as {algorithm} needs it",
                "set quant_algo to the format that is stored, or export again",
            )

    def _disagreement(self, winner: Quantisation, other: Quantisation) -> None:
        differences = []
        if str(winner.algorithm).upper() != str(other.algorithm).upper():
            differences.append(f"quant_algo ({winner.algorithm}, {other.algorithm})")
        if set(winner.excludes) != set(other.excludes):
            odd = sorted(set(winner.excludes) ^ set(other.excludes))
            differences.append(f"{len(odd)} exclusions, first {odd[0]}")
        if winner.kv_cache != other.kv_cache:
            differences.append(f"the KV cache ({winner.kv_cache}, {other.kv_cache})")
        if differences:
            self.findings.warn(
                "config_mismatch",
                other.file,
                f"differs from {winner.file}, which wins in {self.rules.runtime}, in {'; '.join(differences)}",
                "make both say the same: other runtimes read the other one",
            )

    def _names(self) -> None:
        """Check that every tensor has a place and every place a tensor."""
        runtime = self.rules.runtime
        for name in self.tensors.unexpected:
            self.findings.error(
                "unexpected_tensor",
                name,
                f"{runtime} has no place for this tensor",
                "rename it as the original model has it, or leave it out",
            )
        for name in self.tensors.ignored:
            self.findings.warn(
                "unexpected_tensor",
                name,
                "is ignored: the configuration ties the output matrix to the embedding",
                "leave it out, or set tie_word_embeddings to false",
            )
        fp8 = [module for module in self.need.linears if self._stored(module) == FP8]
        scales = [f"{module}.{leaf}" for module in fp8 for leaf in SCALES]
        needed = [*self.need.tensors, *(name for name in scales if name not in self.tensors.scales)]
        for name in needed:
            if name not in self.tensors.weights:
                self.findings.error(
                    "missing_tensor",
                    self._spelt(name),
                    f"isn't there: {runtime} would use whatever its memory holds",
                    EXPORT_AGAIN,
                )
        for name in [] if self.need.known else uneven_layers(self.tensors.weights, self.files.config):
            self.findings.warn("missing_tensor", name, "isn't there, but other layers have it", EXPORT_AGAIN)

    def _shapes(self) -> None:
        for name, tensor in self.tensors.weights.items():
            wanted = self.need.tensors[name]
            fits = len(wanted) == len(tensor.shape) and all(
                size in (None, held) for size, held in zip(wanted, tensor.shape, strict=True)
            )
            if not fits:
                sizes = ", ".join("?" if size is None else str(size) for size in wanted)
                self.findings.error(
                    "shape",
                    tensor.name,
                    f"is {list(tensor.shape)}, but {CONFIG_FILE} asks for [{sizes}]",
                    f"correct {CONFIG_FILE}, or export again from a model of this size",
                )

    def _formats(self) -> None:
        """Check every tensor's dtype, and every layer's format against what the runtime would run."""
        linear = {f"{module}.weight" for module in self.need.linears}
        for name, tensor in self.tensors.weights.items():
            if name in linear and tensor.dtype not in (E4M3, *SIXTEEN_BIT):
                self.findings.error(
                    "unsupported_format",
                    tensor.name,
                    f"is stored as {tensor.dtype}; quant_algo FP8 is {E4M3}, other values would be cast",
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

    def _format(self, layer: RuntimeLayer) -> None:
        """Check one layer of the runtime."""
        runtime, decision = self.rules.runtime, self.decisions[layer]
        stored = {module: held for module in layer.modules if (held := self._stored(module)) is not None}
        where = self._spelt(layer.modules[0])
        if len(set(stored.values())) > 1:
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
            self.findings.error(
                "mixed_group",
                where,
                f"{runtime} fuses {', '.join(m.rpartition('.')[2] for m in layer.modules)}, but only some are excluded",
                "exclude all of them or none, by their exact names",
            )
        elif stored and self._runs(layer) not in stored.values():
            self.wrong.update(stored)
            self._wrong_format(layer, where)
        elif FP8 in stored.values():
            self._kernel(layer, where)
        self._left_over(layer)

    def _wrong_format(self, layer: RuntimeLayer, where: str) -> None:
        """Say why a layer would run in another format than it is stored in."""
        runtime, patterns = self.rules.runtime, self.decisions[layer].patterns
        if self._runs(layer) == FP8:
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in 16 bits, but not excluded: {runtime} would cast it to FP8 without a scale",
                f"add its exact name to the exclusions in {CONFIG_FILE} and {LEGACY_FILE}",
            )
        elif self.quantisation is None:
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in FP8, but neither {CONFIG_FILE} nor {LEGACY_FILE} has a quantisation",
                "put ModelOpt's quantization_config back",
            )
        elif not patterns:
            self.findings.error(
                "wrong_format", where, f"is stored in FP8, but {runtime} never quantises it", "store it in BF16"
            )
        elif any(self.rules.exact(pattern, layer) for pattern in patterns):
            self.findings.error(
                "wrong_format",
                where,
                f"is stored in FP8, but excluded: {runtime} would take the codes for 16-bit numbers",
                "take it off the exclusions, or store it in BF16",
            )
        else:
            self.findings.error(
                "ambiguous_exclude",
                where,
                f"is stored in FP8, but the exclusion {self.rules.written[patterns[0]]!r} hits it in {runtime} too",
                "replace it by the exact names of the modules that it is meant for",
            )

    def _kernel(self, layer: RuntimeLayer, where: str) -> None:
        """Check the dimensions of an FP8 layer."""
        multiple = self.rules.kernel_multiple
        shapes = [self.tensors.weights[f"{m}.weight"].shape for m in layer.modules if self._stored(m) is not None]
        if multiple is None or any(len(shape) != 2 for shape in shapes):
            return
        sizes = (sum(shape[0] for shape in shapes), shapes[0][1])
        if any(size % multiple for size in sizes):
            self.findings.error(
                "unsupported_format",
                where,
                f"{self.rules.runtime}'s FP8 kernel takes multiples of {multiple}; the layer is {list(sizes)}",
                "leave this layer in BF16",
            )

    def _left_over(self, layer: RuntimeLayer) -> None:
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

    def _excludes(self) -> None:
        for pattern in self.rules.useless():
            self.findings.warn(
                "ambiguous_exclude",
                pattern,
                f"the exclusion hits nothing in {self.rules.runtime}",
                "correct its spelling, or leave it out",
            )

    def _scales(self) -> None:
        modules = {name.rpartition(".")[0] for name in self.tensors.scales}
        self._read_numbers([*self.tensors.scales.values(), *self.tensors.kv_scales.values()])
        for tensor in self.tensors.scales.values():
            self._scale(tensor)
        for layer in self.rules.layers:
            shared = [module for module in layer.modules if module in modules and self._stored(module) == FP8]
            for leaf in SCALES if self._runs(layer) == FP8 else ():
                self._equal(layer, shared, leaf)

    def _read_numbers(self, tensors: Sequence[Tensor]) -> None:
        for path in sorted({tensor.path for tensor in tensors}):
            with open_file(path) as file:
                for tensor in tensors:
                    if tensor.path == path and tensor.one_number:
                        self._numbers[tensor.name] = tensor.number(file)

    def _scale(self, tensor: Tensor) -> None:
        """Check one scale."""
        number = self._numbers.get(tensor.name)
        if not tensor.one_number:
            self.findings.error(
                "bad_scale",
                tensor.name,
                f"has the shape {list(tensor.shape)}; quant_algo FP8 has one scale a tensor",
                EXPORT_AGAIN,
            )
        elif number is None:
            self.findings.error(
                "bad_scale", tensor.name, f"is stored as {tensor.dtype}, not as {SCALE_DTYPE}", EXPORT_AGAIN
            )
        elif not _usable(number):
            self.findings.error("bad_scale", tensor.name, f"is {number}; a scale is finite and positive", EXPORT_AGAIN)
        elif tensor.dtype != SCALE_DTYPE:
            self.findings.warn(
                "bad_scale",
                tensor.name,
                f"is stored as {tensor.dtype}: rounded, so that codes and scale no longer fit exactly",
                f"store scales as {SCALE_DTYPE}",
            )

    def _equal(self, layer: RuntimeLayer, modules: Sequence[str], leaf: str) -> None:
        """Check that the modules of a fused layer share a scale."""
        tensors = [self.tensors.scales[name] for m in modules if (name := f"{m}.{leaf}") in self.tensors.scales]
        numbers = [self._numbers.get(tensor.name) for tensor in tensors]
        if not all(_usable(number) for number in numbers) or all(a == b for a, b in pairwise(numbers)):
            return
        fused = layer.name.rpartition(".")[2]
        if leaf == "weight_scale":
            self.findings.error(
                "unequal_scales",
                tensors[0].name,
                f"the modules that {self.rules.runtime} fuses into {fused} have different scales: it would quantise "
                "them again, to the largest, and serve other weights than those in the files",
                "quantise the modules of a fused layer with one scale, as `bitladder export` does",
            )
        else:
            self.findings.warn(
                "unequal_scales",
                tensors[0].name,
                f"the modules that {self.rules.runtime} fuses into {fused} have different input scales: it takes the "
                "largest",
                "calibrate the modules of a fused layer together",
            )

    def _kv_cache(self) -> None:
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
            for leaf in ("k_scale", "v_scale"):
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

    def _manifest(self) -> None:
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
                    self._spelt(module),
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

    def _promised(self) -> dict[str, str]:
        """Return the manifest's format of every quantised module, under vLLM's names."""
        if self.files.manifest is None:
            return {}
        return {
            self.need.rename(entry.tensor).removesuffix(".weight"): entry.format
            for entry in self.files.manifest.modules
        }

    def _values(self) -> None:
        for tensor in self.tensors.weights.values():
            if not tensor.finite():
                self.findings.error("bad_weight", tensor.name, "holds NaN or infinite values", EXPORT_AGAIN)

    def layers(self) -> tuple[ProbedLayer, ...]:
        """Return every linear as the runtime would treat it; none where its names aren't known."""
        if not self.reproduced:
            return ()
        promised = self._promised()
        return tuple(
            ProbedLayer(
                name=self._spelt(module),
                runtime_name=layer.name,
                promised=None if self.files.manifest is None else promised.get(module, BF16),
                format=self._runs(layer),
                method=self.rules.fp8_method if self._runs(layer) == FP8 else self.rules.other_method,
            )
            for layer in self.rules.layers
            for module in layer.modules
        )


def preflight(
    directory: Path, runtimes: Sequence[str] = RUNTIMES, *, read_weights: bool = False
) -> tuple[ProbeResult, ...]:
    """Return what each runtime would make of the checkpoint in `directory`, one result a runtime.

    Args:
        directory: the checkpoint.
        runtimes: of `RUNTIMES`.
        read_weights: also look for NaN and infinity in the weights, which reads all of them. Without it only JSON
            files, headers and scales are read: milliseconds whatever the size.

    Raises:
        ModelError: there is no such directory. BitladderError: an unknown runtime.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory; name one that holds a checkpoint")
    unknown = sorted(set(runtimes) - set(RUNTIMES))
    if unknown:
        raise BitladderError(f"the pre-flight doesn't know the runtime {unknown[0]!r}; choose of {', '.join(RUNTIMES)}")
    findings = Findings()
    files = read_files(directory, findings)
    need = (
        None if files is None else architecture(files.config, {tensor.name: tensor.shape for tensor in files.tensors})
    )
    return tuple(_result(directory, RULES[name], files, need, findings.copy(), read_weights) for name in runtimes)


def _result(
    directory: Path,
    rules: type[Rules],
    files: Files | None,
    need: Architecture | None,
    findings: Findings,
    read_weights: bool,
) -> ProbeResult:
    """Return one runtime's result; `findings` holds what was found whatever the runtime."""
    manifest = None if files is None else files.manifest
    reached = "files"
    layers: tuple[ProbedLayer, ...] = ()
    if files is not None and need is not None:
        check = _Check(files, need, rules, findings)
        reached = check.run(read_weights)
        layers = check.layers() if reached != "configuration" else ()
    return ProbeResult(
        checkpoint=directory.name,
        scheme=None if manifest is None else manifest.scheme,
        manifest_sha256=None if manifest is None else manifest.fingerprint(),
        runtime=rules.runtime,
        version=rules.version,
        stage="preflight",
        reached=reached,
        device=None,
        layers=layers,
        findings=findings.records(),
    )
