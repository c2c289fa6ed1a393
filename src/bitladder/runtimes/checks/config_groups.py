"""What a runtime makes of a checkpoint in compressed-tensors' layout: its config groups against what is stored.

Which layer is in which group is decided as vLLM does it, whose loader the layout is made for.
Source: vllm 0.32.0, model_executor/layers/quantization/compressed_tensors/utils.py (should_ignore_layer,
find_matched_target) and compressed_tensors.py (apply_vllm_mapper, get_scheme_dict), utils/config_utils.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from bitladder.formats import (
    CARRIED_SCALES,
    COMPRESSED_TENSORS,
    FORMATS,
    GLOBAL_SCALES,
    WEIGHT,
    WEIGHT_ZERO_POINT,
    Part,
    format_of_group,
    get_format,
)
from bitladder.models.families import Architecture, section_of
from bitladder.models.fusing import Layer
from bitladder.reading import open_file
from bitladder.records import BF16, ErrorClass, ProbedLayer
from bitladder.runtimes.base import RECOMPUTED, Rules
from bitladder.runtimes.config import CONFIG_FILE
from bitladder.runtimes.files import SIXTEEN_BIT, Files, Tensor
from bitladder.runtimes.findings import EXPORT_AGAIN, Findings

# What vLLM's linears are called; a target that is part of such a name, "Linear" say, means all of them.
_CLASSES = ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear")
_CODES = frozenset(
    one.layouts[COMPRESSED_TENSORS].name(WEIGHT) for one in FORMATS.values() if COMPRESSED_TENSORS in one.layouts
)
_UNKNOWN = "codes of an unknown format"


class Names:
    """A list of names and `re:` patterns, in whose order the first that matches counts."""

    def __init__(self, written: Iterable[str], need: Architecture) -> None:
        self.written = list(written)
        mapped = [need.rename(name) if "." in name and not name.startswith("re:") else name for name in self.written]
        self._exact: dict[str, int] = {}
        for index, name in enumerate(mapped):
            self._exact.setdefault(name, index)
        self._patterns = [(i, re.compile(name[3:])) for i, name in enumerate(mapped) if name.startswith("re:")]
        self._classes = [(i, name.lower()) for i, name in enumerate(mapped) if not name.startswith("re:")]
        self.used: set[int] = set()

    def first(self, name: str) -> str | None:
        """Return what of the list matches a name first, as it is written; None: nothing."""
        found = [index for index, pattern in self._patterns if pattern.match(name)]
        found += [self._exact[name]] if name in self._exact else []
        self.used.update(found)
        return self.written[min(found)] if found else None

    def of_class(self) -> str | None:
        """Return what of the list means any linear."""
        names = [index for index, part in self._classes if any(part in one.lower() for one in _CLASSES)]
        names += [index for index, pattern in self._patterns if any(pattern.match(one) for one in _CLASSES)]
        self.used.update(names)
        return self.written[min(names)] if names else None

    def idle(self) -> list[str]:
        """Return what has matched nothing so far."""
        return [name for index, name in enumerate(self.written) if index not in self.used]


class GroupsCheck:
    """All checks of one checkpoint in compressed-tensors' layout by one runtime's rules."""

    def __init__(self, files: Files, need: Architecture, rules: type[Rules], findings: Findings) -> None:
        self.files, self.need, self.findings = files, need, findings
        self.rules = rules(need, ())
        section = section_of(files.config, "quantization_config")
        self.groups: Mapping[str, Any] = section_of(section, "config_groups")
        listed = {str(target): group for group in self.groups.values() for target in group.get("targets") or ()}
        self.targets, self.listed = Names(listed, need), listed
        self.ignore = Names((str(name) for name in section.get("ignore") or ()), need)
        self.tensors: dict[str, Tensor] = {
            need.rename(one.name): one for one in files.tensors if not RECOMPUTED.search(one.name)
        }
        self.runs: dict[str, str] = {}  # module -> format

    def run(self, read_weights: bool) -> str:
        """Make all checks; return the last one that made sense."""
        runtime = self.rules.runtime
        for name, group in self.groups.items():
            found = format_of_group(group)
            if found is None or found.name not in self.rules.CARRIED:
                self.findings.warn(
                    "unsupported_format",
                    CONFIG_FILE,
                    f"config_groups.{name} asks for what isn't known here, so no layer was checked",
                    f"let {runtime}'s own loader have the last word",
                )
                return "configuration"
        for layer in self.rules.layers:
            self._layer(layer)
        self._places()
        for written in self.targets.idle():
            if not self._alias(written):
                self.findings.warn(
                    "ambiguous_exclude",
                    written,
                    f"config_groups name it, but it is no layer in {runtime}",
                    "correct its spelling, or leave it out",
                )
        self._promises()
        if read_weights:
            for tensor in self.tensors.values():
                if not tensor.finite():
                    self.findings.error("bad_weight", tensor.name, "holds NaN or infinite values", EXPORT_AGAIN)
        return "weights" if read_weights else "scales"

    def layers(self) -> tuple[ProbedLayer, ...]:
        """Return every linear as the runtime would treat it."""
        promised = self._promised()
        rows = []
        for layer in self.rules.layers:
            for module in layer.modules:
                runs = self.runs.get(module, BF16)
                support = self.rules.CARRIED.get(runs)
                rows.append(
                    ProbedLayer(
                        name=self.spelt(module),
                        runtime_name=layer.name,
                        promised=None if self.files.manifest is None else promised.get(module, BF16),
                        format=runs,
                        method=self.rules.other_method if support is None else support.method,
                    )
                )
        return tuple(rows)

    def _alias(self, written: str) -> bool:
        """Return whether a name is transformers' for a module that is listed by the checkpoint's as well."""
        parts = written.split(".")
        return any(".".join(parts[start:]) in self._ends for start in range(1, len(parts)) if parts[start] == "layers")

    @cached_property
    def _ends(self) -> set[str]:
        return {name[name.index("layers.") :] for name in self.runs if "layers." in name}

    def spelt(self, module: str) -> str:
        """Return the checkpoint's name of a module."""
        held = next((self.tensors[f"{module}.{leaf}"] for leaf in _CODES if f"{module}.{leaf}" in self.tensors), None)
        return module if held is None else held.name.rpartition(".")[0]

    def _stored(self, module: str) -> str | None:
        """Return the format in which a module is stored, told by its tensors; None: its weight isn't there."""
        weight = self.tensors.get(f"{module}.{WEIGHT}")
        if weight is not None and weight.dtype in SIXTEEN_BIT:
            return BF16
        beside = {leaf for leaf in CARRIED_SCALES if f"{module}.{leaf}" in self.tensors}
        for name, format_ in FORMATS.items():
            layout = format_.layouts.get(COMPRESSED_TENSORS)
            codes = None if layout is None else self.tensors.get(f"{module}.{layout.name(WEIGHT)}")
            if layout is None or codes is None or codes.dtype != format_.code_dtype or len(codes.shape) != 2:
                continue
            if beside == {layout.name(part) for part in format_.scale_names} and self._odd(module, name) is None:
                return name
        return _UNKNOWN if any(f"{module}.{leaf}" in self.tensors for leaf in _CODES) else None

    def _odd(self, module: str, format_name: str) -> tuple[Part, Tensor | None] | None:
        """Return the first part of a format that a module lacks or has in another dtype or shape."""
        format_ = get_format(format_name)
        layout = format_.layouts[COMPRESSED_TENSORS]
        codes = self.tensors.get(f"{module}.{layout.name(WEIGHT)}")
        shape = (1, 1) if codes is None or len(codes.shape) != 2 else format_.weight_shape(codes.shape)
        for part in format_.stored(shape):
            held = self.tensors.get(f"{module}.{layout.name(part.name)}")
            wanted = Part(layout.name(part.name), part.dtype, layout.shape(part))
            one = wanted.shape in ((), (1,)) and held is not None and math.prod(held.shape) == 1
            if part.counts and held is not None and held.shape == (2,) and not self._says(held, shape):
                return replace(wanted, counts=True), held
            if held is None or held.dtype != wanted.dtype or not (one or held.shape == wanted.shape):
                return wanted, held
        return None

    @staticmethod
    def _says(tensor: Tensor, shape: tuple[int, int]) -> bool:
        """Return whether a tensor holds this shape."""
        with open_file(tensor.path) as file:
            numbers = tensor.numbers(file)
        return numbers is not None and tuple(int(one) for one in numbers) == shape

    def _decide(self, layer: Layer) -> str:
        """Return the format in which the runtime runs a layer."""
        asked = self.need.fusing.asked_as
        shards = tuple(map(asked, layer.shards))
        name, runtime = asked(layer.name), self.rules.runtime
        if self.ignore.first(name) is not None:
            return BF16
        ignored = [self.ignore.first(shard) is not None for shard in shards]
        if any(ignored):
            if not all(ignored):
                self.findings.error(
                    "mixed_group",
                    self.spelt(layer.modules[0]),
                    f"{runtime} fuses {_leaves(layer.modules)}, but only some are ignored, at which it stops",
                    "ignore all of them or none, by their exact names",
                )
            return BF16
        target = self.targets.first(name)
        if target is None and shards:
            found = [self.targets.first(shard) for shard in shards]
            target = found[0] if all(found) else None
            groups = [format_of_group(self.listed[one]) for one in found if one is not None]
            if target is not None and len({one.name for one in groups if one is not None}) > 1:
                self.findings.error(
                    "mixed_group",
                    self.spelt(layer.modules[0]),
                    f"{runtime} fuses {_leaves(layer.modules)}, but they are in different config groups: it takes the "
                    "first one's for all, and doesn't say so",
                    "name all of them in one group",
                )
        if target is None:
            target = self.targets.of_class()
        group = None if target is None else format_of_group(self.listed[target])
        return BF16 if group is None else group.name

    def _layer(self, layer: Layer) -> None:
        """Check one layer of the runtime."""
        runs, runtime = self._decide(layer), self.rules.runtime
        for module in layer.modules:
            self.runs[module] = runs
            stored = self._stored(module)
            if stored is None:
                codes = WEIGHT if runs == BF16 else get_format(runs).layouts[COMPRESSED_TENSORS].name(WEIGHT)
                self._missing(f"{module}.{codes}")
            elif runs == BF16 and stored != BF16:
                problem = (
                    f"is stored as codes, but no config group names it: {runtime} would take them for 16-bit numbers"
                )
                remedy = f"name it in the group of its format in {CONFIG_FILE}"
                self.findings.error("wrong_format", self.spelt(module), problem, remedy)
            elif runs != BF16 and stored == BF16:
                problem = f"is stored in 16 bits, but a config group makes it {runs}: {runtime} finds no codes for it"
                remedy = f"take it off that group, or ignore it, in {CONFIG_FILE}"
                self.findings.error("wrong_format", self.spelt(module), problem, remedy)
            elif runs != stored:
                self._wrong_parts(module, runs, stored)
        if runs != BF16:
            self._numbers(layer, runs)

    def _wrong_parts(self, module: str, runs: str, stored: str) -> None:
        """Say what of a format a module hasn't."""
        odd = self._odd(module, runs)
        if odd is not None and odd[1] is None and odd[0].name == WEIGHT_ZERO_POINT:
            # not as good as symmetric: without them the codes stand for other numbers
            self._missing(f"{module}.{WEIGHT_ZERO_POINT}")
            return
        if odd is None or stored != _UNKNOWN:
            problem = f"is stored as {stored}, but its config group makes it {runs}"
            self.findings.error("wrong_format", self.spelt(module), problem, f"name it in the group of {stored}")
            return
        wanted, held = odd
        if held is None:
            self._missing(f"{module}.{wanted.name}")
            return
        if wanted.counts and held.shape == wanted.shape:
            problem = "says another shape of the weight than its codes have"
            self.findings.error("shape", held.name, problem, EXPORT_AGAIN)
            return
        kind: ErrorClass = "wrong_format" if wanted.name in _CODES else "bad_scale"
        problem = f"is {held.dtype} {list(held.shape)}; {runs} has {wanted.dtype} {list(wanted.shape)}"
        self.findings.error(kind, held.name, problem, EXPORT_AGAIN)

    def _missing(self, name: str) -> None:
        spelt = f"{self.spelt(name.rpartition('.')[0])}.{name.rpartition('.')[2]}"
        self.findings.error(
            "missing_tensor",
            spelt,
            f"isn't there: {self.rules.runtime} would use whatever its memory holds",
            EXPORT_AGAIN,
        )

    def _numbers(self, layer: Layer, runs: str) -> None:
        """Check that scales are positive numbers, and that fused modules share those that are one number."""
        format_ = get_format(runs)
        layout = format_.layouts[COMPRESSED_TENSORS]
        for part in format_.parts((1 << 10, 1 << 10)):
            if part.counts:
                continue
            values: dict[str, float] = {}
            for module in layer.modules:
                held = self.tensors.get(f"{module}.{layout.name(part.name)}")
                if held is None:
                    continue
                with open_file(held.path) as file:
                    numbers = held.numbers(file)
                if numbers is None:
                    continue
                odd = numbers[~((numbers > 0) & (numbers < math.inf))]
                if len(part.shape) > 1:
                    odd = odd[odd != 0]  # of a block of zeros
                if len(odd):
                    some = f"{len(odd)} of {len(numbers)} scales that aren't finite and positive"
                    self.findings.error("bad_scale", held.name, f"has {some}, the first is {odd[0]}", EXPORT_AGAIN)
                elif not part.shape and len(numbers) == 1:
                    values[held.name] = float(numbers[0])
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                make = self.findings.warn if part.name.startswith("input") else self.findings.error
                make(
                    "unequal_scales",
                    next(iter(values)),
                    f"{self.rules.runtime} fuses modules with different scales and takes one for all ({shown})",
                    EXPORT_AGAIN,
                )

    def _places(self) -> None:
        """Check that every tensor has a place, and every place beside linears a tensor."""
        for name, tensor in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            runs = self.runs.get(module)
            if name in self.need.tensors and leaf == WEIGHT and (runs in (None, BF16) or leaf in self._parts(runs)):
                continue
            if name in self.need.tensors and runs is None:
                continue
            if runs is not None and leaf in {*self._parts(runs), "bias"}:
                continue
            if self.need.tied and name == f"{self.need.head}.{WEIGHT}":
                continue
            self.findings.error(
                "unexpected_tensor",
                tensor.name,
                f"{self.rules.runtime} has no place for this tensor",
                "rename it as compressed-tensors has it, or leave it out",
            )
        for name, wanted in self.need.tensors.items():
            module, _, leaf = name.rpartition(".")
            if name not in self.tensors and (module not in self.runs or leaf != WEIGHT):
                self._missing(name)
            self._shape(module, leaf, wanted)

    def _shape(self, module: str, leaf: str, wanted: tuple[int | None, ...]) -> None:
        """Check a tensor's shape, of packed codes without the packing, against what the configuration asks for."""
        stored = self._stored(module) if module in self.runs and leaf == WEIGHT else BF16
        coded = stored not in (None, BF16, _UNKNOWN)
        layout = get_format(str(stored)).layouts[COMPRESSED_TENSORS] if coded else None
        held = self.tensors.get(f"{module}.{leaf if layout is None else layout.name(leaf)}")
        if held is None or stored == _UNKNOWN or f"{module}.{leaf}".startswith(self.need.open_prefixes):
            return
        shape = held.shape if layout is None else get_format(str(stored)).weight_shape(held.shape)
        if len(shape) != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, shape, strict=True)):
            sizes = ", ".join("?" if size is None else str(size) for size in wanted)
            problem = f"holds {list(shape)} numbers, but {CONFIG_FILE} asks for [{sizes}]"
            remedy = f"correct {CONFIG_FILE}, or export again from a model of this size"
            self.findings.error("shape", held.name, problem, remedy)

    def _parts(self, runs: str) -> set[str]:
        """Return the names of all that a module in a format has."""
        if runs == BF16:
            return {WEIGHT}
        layout = get_format(runs).layouts[COMPRESSED_TENSORS]
        return {layout.name(part) for part in (WEIGHT, *get_format(runs).scale_names)}

    def _promised(self) -> dict[str, str]:
        if self.files.manifest is None:
            return {}
        modules = self.files.manifest.modules
        return {self.need.rename(entry.tensor).removesuffix(f".{WEIGHT}"): entry.format for entry in modules}

    def _promises(self) -> None:
        """Check the files against what was exported."""
        if self.files.manifest is None:
            return
        promised = self._promised()
        for module in self.runs:
            stored, meant = self._stored(module), promised.get(module, BF16)
            if stored not in (None, _UNKNOWN, meant):
                self.findings.error(
                    "wrong_format",
                    self.spelt(module),
                    f"is stored in {stored}, but the manifest promises {meant}",
                    EXPORT_AGAIN,
                )


def _leaves(modules: Iterable[str]) -> str:
    return ", ".join(module.rpartition(".")[2] for module in modules)


def canonical(tensors: Iterable[Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by ModelOpt's names of them."""
    found: dict[str, tuple[int, ...]] = {}
    for one in tensors:
        module, _, leaf = one.name.rpartition(".")
        if leaf in _CODES:
            leaf = WEIGHT
        elif leaf in GLOBAL_SCALES.values():
            leaf = next(own for own, name in GLOBAL_SCALES.items() if name == leaf)
        found[f"{module}.{leaf}" if module else leaf] = one.shape
    return found
