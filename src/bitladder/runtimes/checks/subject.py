"""One checkpoint before one runtime's rules: what it holds, and what the rules decide about each layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from bitladder.formats import INPUT_SCALE, WEIGHT_SCALE, WEIGHT_SCALE_2, Format, get_format
from bitladder.models.families import SCALES, Architecture
from bitladder.models.fusing import Layer
from bitladder.records import BF16
from bitladder.runtimes.base import MIX, RECOMPUTED, UNIFORM, Decision, Rules
from bitladder.runtimes.config import LEGACY_FILE, inline, nested
from bitladder.runtimes.files import SIXTEEN_BIT, Files, Tensor
from bitladder.runtimes.findings import Findings

ANY_SHAPE = (1 << 10, 1 << 10)  # of a weight: dimensions and dtypes of its scales are alike for all
# Names of the scales of an attention's cached keys and values, in ModelOpt's form and in those that vLLM also knows.
# Source: vllm model_executor/model_loader/weight_utils.py, maybe_remap_kv_scale_name.
_KV_SCALE = re.compile(
    r"^(?P<attention>.+\.(?:self_attn|mixer))\.(?:[kv]_proj\.|qkv_proj\.|attn\.)?(?P<which>[kv])_scale$"
)


@dataclass
class Sorted:
    """The checkpoint's tensors under vLLM's names, by what they are."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # what the architecture needs
    scales: dict[str, Tensor] = field(default_factory=dict)
    kv_scales: dict[str, Tensor] = field(default_factory=dict)  # `<attention>.k_scale`, `<attention>.v_scale`
    ignored: list[str] = field(default_factory=list)  # an output matrix of a model that has none of its own
    unexpected: list[str] = field(default_factory=list)  # as the checkpoint spells them


def _sort(need: Architecture, tensors: Iterable[Tensor]) -> Sorted:
    kinds = Sorted()
    for tensor in tensors:
        name = need.rename(tensor.name)
        module, _, leaf = name.rpartition(".")
        cache = _KV_SCALE.match(name)
        if RECOMPUTED.search(name):
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


class Subject:
    """One checkpoint, read by one runtime's rules."""

    def __init__(self, files: Files, need: Architecture, rules: type[Rules], findings: Findings) -> None:
        self.files, self.need, self.findings = files, need, findings
        self.tensors = _sort(need, files.tensors)
        asked = [inline(files.config), None if files.legacy is None else nested(files.legacy, LEGACY_FILE)]
        self.configurations = [c for c in (reversed(asked) if rules.legacy_first else asked) if c is not None]
        self.quantisation = self.configurations[0] if self.configurations else None
        excludes = () if self.quantisation is None else self.quantisation.excludes
        self.rules = rules(need, excludes, self._algorithms(rules))
        self.reproduced = rules.reproduced(need)
        self.decisions = {layer: self._decide(layer) for layer in self.rules.layers}
        self.wrong: set[str] = set()  # modules whose format is a finding already
        self._numbers: dict[str, float | None] = {}
        self._rows: dict[str, list[float] | None] = {}  # of a scale with many numbers: those that can't be one
        self._runs_in = {module: self._runs(layer) for layer in self.rules.layers for module in layer.modules}

    def _algorithms(self, rules: type[Rules]) -> str | dict[str, str]:
        """Return the algorithm that the configuration asks for, as the runtime reads it; of a mix each module's."""
        asked = self.quantisation
        if asked is None:
            return UNIFORM
        if rules.algorithm(asked.algorithm) == MIX:
            return {name: rules.listed_algorithm(one) for name, one in (asked.layers or {}).items()}
        return rules.algorithm(asked.algorithm) or UNIFORM

    def _decide(self, layer: Layer) -> Decision:
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

    def spelt(self, name: str) -> str:
        """Return the checkpoint's name of a module or tensor."""
        for new, old in self._prefixes:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def _stored(self, module: str) -> str | None:
        """Return the format in which a module is stored; None: its weight isn't there, or in no known one.

        Formats of one dtype differ in their scales. Where those don't tell, it is the one in which it would run.
        """
        tensor = self.tensors.weights.get(f"{module}.weight")
        if tensor is None:
            return None
        if tensor.dtype in SIXTEEN_BIT:
            return BF16
        alike = [one.name for one in self._formats if one.code_dtype == tensor.dtype]
        scale = self.tensors.scales.get(f"{module}.{WEIGHT_SCALE}")
        if scale is not None and len(scale.shape) >= 2:
            alike = [name for name in alike if self._has_such(name, scale)] or alike
        elif scale is not None and (not scale.one_number or tensor.shape[:1] != (1,)):
            spreads = ("tensor", *(["block"] if tensor.dtype in self._packed else [])) if scale.one_number else ("row",)
            alike = [name for name in alike if get_format(name).spread in spreads]
        runs = self._runs_in[module]
        if runs not in alike and tensor.dtype in self._packed:  # any bytes may be such codes: scales tell
            rounded, held = f"{module}.{INPUT_SCALE}" in self.tensors.scales, self.tensors.scales
            alike = [name for name in alike if get_format(name).has_input_scale == rounded]
            return next(iter(alike), None) if f"{module}.{WEIGHT_SCALE_2}" in held else None
        return runs if runs in alike else next(iter(alike), None)

    @staticmethod
    def _has_such(format_name: str, scale: Tensor) -> bool:
        """Return whether a format's weight scale is of this dtype and has so many dimensions."""
        parts = get_format(format_name).parts(ANY_SHAPE)
        found = next(part for part in parts if part.name == WEIGHT_SCALE)
        return (found.dtype, len(found.shape)) == (scale.dtype, len(scale.shape))

    def _shape(self, tensor: str) -> tuple[int, ...]:
        """Return a stored weight's shape, of a linear without the packing of its codes."""
        held, module = self.tensors.weights[tensor], tensor.removesuffix(".weight")
        if module not in self._runs_in or len(held.shape) != 2 or tensor.startswith(self.need.open_prefixes):
            return held.shape
        stored = self._stored(module)
        return held.shape if stored in (None, BF16) else get_format(str(stored)).weight_shape(held.shape)

    @cached_property
    def _packed(self) -> frozenset[str]:
        """The dtypes of several codes a number."""
        return frozenset(one.code_dtype for one in self._formats if one.codes_a_number > 1)

    @cached_property
    def _formats(self) -> list[Format]:
        return [get_format(name) for name in self.rules.SUPPORT]

    def _runs(self, layer: Layer) -> str:
        return self.decisions[layer].format

    def _expected(self, module: str) -> str | None:
        """Return the format whose scales a quantised module needs; None: it isn't one.

        That is the one in which it runs, unless its scales are just those of another one.
        """
        stored, runs = self._stored(module), self._runs_in[module]
        if stored in (None, BF16) or runs == BF16:
            return None if stored == BF16 else stored
        if runs in self.rules.SUPPORT and get_format(str(stored)).code_dtype != get_format(runs).code_dtype:
            return stored
        dynamic = f"{module}.{INPUT_SCALE}" not in self.tensors.scales
        another = (
            f"{module}.{WEIGHT_SCALE}" in self.tensors.scales and get_format(str(stored)).has_input_scale != dynamic
        )
        return stored if another else runs

    @staticmethod
    def _leaves(format_name: str | None) -> tuple[str, ...]:
        """Return the names of the scales that a module in a format has."""
        if format_name is None or format_name == BF16:
            return ()
        return get_format(format_name).scale_names

    def _promised(self) -> dict[str, str]:
        """Return the manifest's format of every quantised module, under vLLM's names."""
        if self.files.manifest is None:
            return {}
        return {
            self.need.rename(entry.tensor).removesuffix(".weight"): entry.format
            for entry in self.files.manifest.modules
        }
