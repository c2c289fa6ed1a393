"""How runtimes read a ModelOpt checkpoint, where they differ: which configuration, formats, exclusions, names.

One class of rules a runtime, applied to the modules that an architecture has (`architectures.py`). What a runtime makes
of a format is its row in the runtime's `SUPPORT`; what the format is, `bitladder.formats` says.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from bitladder.formats import format_of_algorithm, get_format
from bitladder.models.families import Architecture
from bitladder.models.fusing import Layer
from bitladder.records import BF16

MIX = "MIXED_PRECISION"  # the `quant_algo` of a checkpoint whose modules each name their own
# Tensors that older checkpoints carry and that runtimes compute themselves.
# Source: vllm model_executor/models/utils.py, AutoWeightsLoader.REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER.
RECOMPUTED = re.compile(r"rotary_(?:emb|pos_emb)\.(?:inv_freq|cos_cached|sin_cached)$")
UNIFORM = get_format("fp8").modelopt_algorithm  # what is meant where no algorithm is said


@dataclass(frozen=True)
class Support:
    """How a runtime runs a format.

    Attributes:
        method: its class that does.
        capability: least compute capability of an NVIDIA GPU, times ten; None: not known here.
        multiple: of a layer's two dimensions; None: any will do.
        source: where that is read.
        in_mix: whether it also does where the checkpoint is a mix; otherwise it leaves such layers in 16 bits, or does
            what is said.
        caveat: what other versions do with such layers of a mix, to be warned of; None: nothing else.
    """

    method: str
    capability: int | None
    multiple: int | None
    source: str
    in_mix: bool | str = True
    caveat: str | None = None


@dataclass(frozen=True)
class Decision:
    """What a configuration makes of a layer.

    Attributes:
        outcome: "mixed" where the modules of a fused layer are decided differently.
        patterns: the exclusions that hit it, or, of a layer that a mix quantises, the entries that list it.
        format: in which it runs.
        dropped: of a layer that is listed in a mix: why it runs in 16 bits all the same.
    """

    outcome: Literal["quantised", "excluded", "mixed"]
    patterns: tuple[str, ...] = ()
    format: str = BF16
    dropped: str | None = None


def format_of(algorithm: str) -> str:
    """Return our name of an algorithm's format, or the algorithm itself where it is none of ours."""
    found = format_of_algorithm(algorithm)
    return algorithm if found is None else found.name


class Rules(ABC):
    """How one runtime reads a ModelOpt checkpoint, where runtimes differ."""

    runtime: ClassVar[str]
    version: ClassVar[str]
    SUPPORT: ClassVar[Mapping[str, Support | str]]  # format -> how it runs, or why it doesn't
    CARRIED: ClassVar[Mapping[str, Support]] = {}  # the same of compressed-tensors' layout; empty: not known here
    other_method: ClassVar[str] = "UnquantizedLinearMethod"
    legacy_first: ClassVar[bool] = False  # whether hf_quant_config.json wins over config.json
    splits: ClassVar[bool] = False  # whether it splits layers among ranks as `models/splitting.py` says
    known_algorithms: ClassVar[frozenset[str]]  # besides FP8 with one scale a tensor
    kv_skip_argument: ClassVar[str | None] = None  # names layers whose KV cache stays in 16 bits; None: there is none

    def __init__(
        self, need: Architecture, excludes: Sequence[str], algorithms: str | Mapping[str, str] = UNIFORM
    ) -> None:
        """Make the rules for one model.

        Args:
            need: the model.
            excludes: as the configuration has them.
            algorithms: one for all, or, of a mix, that of each module that it lists, in ModelOpt's names.
        """
        self.need = need
        self.uniform = format_of(algorithms) if isinstance(algorithms, str) else None
        listed = {} if isinstance(algorithms, str) else algorithms
        self.entries = {self.entry(module): module for module in listed}
        self.mix = {self.entry(module): format_of(algorithm) for module, algorithm in listed.items()}
        self.written = {pattern: exclude for exclude in excludes for pattern in self.mapped(exclude)}
        self.patterns = tuple(self.written)
        self.wild = frozenset(pattern for pattern in self.patterns if any(mark in pattern for mark in "*?["))

    @classmethod
    @abstractmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return the runtime's reading of `quant_algo`; None: it refuses."""

    @classmethod
    def listed_algorithm(cls, name: str) -> str:
        """Return the runtime's reading of the algorithm of a module in a mix."""
        return cls.algorithm(name) or name

    @classmethod
    def why_no_mix(cls, formats: frozenset[str]) -> str | None:
        """Return why the runtime refuses a mix of these formats; None: it doesn't."""
        return None

    @classmethod
    def support(cls, format_name: str) -> Support | None:
        """Return how the runtime runs a format; None: it doesn't."""
        row = cls.SUPPORT.get(format_name)
        return row if isinstance(row, Support) else None

    @classmethod
    def why_not(cls, format_name: str) -> str | None:
        """Return why the runtime doesn't run a format of ours; None: it does, or the format is none of ours."""
        row = cls.SUPPORT.get(format_name)
        return row if isinstance(row, str) else None

    @classmethod
    def method(cls, format_name: str) -> str:
        """Return the runtime's class that runs a format."""
        support = cls.support(format_name)
        return cls.other_method if support is None else support.method

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return whether the runtime's names of this architecture's modules are known here.

        Those of a language model are as the checkpoint spells them; where it is a part of a whole, runtimes differ.
        """
        return need.known or not need.multimodal

    def mapped(self, exclude: str) -> tuple[str, ...]:
        """Return what the runtime makes of one exclusion before it matches."""
        return (exclude,)

    def entry(self, module: str) -> str:
        """Return what the runtime makes of a module's name in the list of a mix before it looks layers up."""
        return module

    def listed(self, layer: Layer) -> dict[str, str]:
        """Return the entries of a mix that decide about a layer, and their formats."""
        names = (layer.name, *(self.name(module) for module in layer.modules))
        return {name: self.mix[name] for name in names if name in self.mix}

    def quantised(self, layer: Layer) -> Decision:
        """Decide about a layer that nothing excludes."""
        if self.uniform is not None:
            return Decision("quantised", (), self.uniform)
        listed = self.listed(layer)
        entries, formats = tuple(listed), set(listed.values())
        if not listed:
            return Decision("excluded")
        if len(formats) > 1:
            return Decision("mixed", entries)
        (name,) = formats
        support = self.support(name)
        if support is not None and support.in_mix is True:
            return Decision("quantised", entries, name)
        in_mix = f"{self.runtime} {self.version} leaves {name} in 16 bits where a checkpoint mixes formats"
        if support is not None and isinstance(support.in_mix, str):
            in_mix = support.in_mix
        return Decision("excluded", entries, dropped=self.why_not(name) or in_mix)

    def name(self, module: str) -> str:
        """Return the runtime's name of a module, fused ones apart."""
        return module

    def never_quantised(self, module: str) -> bool:
        """Return whether the runtime keeps a module in 16 bits, whatever the configuration says."""
        return False

    @abstractmethod
    def decide(self, layer: Layer) -> Decision:
        """Return what the exclusions make of a layer."""

    @abstractmethod
    def hits(self, pattern: str, name: str) -> bool:
        """Return whether a mapped exclusion hits a module or layer under its name in the runtime."""

    def exact(self, pattern: str, layer: Layer) -> bool:
        """Return whether an exclusion is just the name of a layer, or of a module in it, as checkpoints spell it."""
        written = self.need.rename(f"{self.written[pattern]}.").removesuffix(".")
        return written in layer.modules or pattern == layer.name

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The linears of the runtime's model, under its names; `modules` are the architecture's."""
        module_of = {self.name(module): module for module in self.need.linears}
        return tuple(
            replace(layer, modules=tuple(module_of[name] for name in layer.modules))
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

    def spellings(self, name: str) -> tuple[str, ...]:
        """Return the names under which the runtime looks a layer or module up in the list of a mix."""
        return (name,)

    def unlisted(self, layer: Layer) -> list[str]:
        """Return the modules of a layer that a mix names neither by themselves nor by their fused layer."""
        if any(name in self.mix for name in self.spellings(layer.name)):
            return []
        names = {module: self.spellings(self.name(module)) for module in layer.modules}
        return [module for module, found in names.items() if not any(name in self.mix for name in found)]

    def useless_entries(self) -> list[str]:
        """Return the modules that a mix lists, as they are written, that are none of the runtime's."""
        names = {self.name(module) for layer in self.layers for module in layer.modules}
        names |= {layer.name for layer in self.layers} | {self.need.head, self.name(self.need.head)}
        known = {found for name in names for found in self.spellings(self.need.fusing.asked_as(name))}
        return sorted(written for entry, written in self.entries.items() if entry not in known)

    def _hits_any(self, pattern: str, names: set[str]) -> bool:
        return any(self.hits(pattern, name) for name in names)
