"""How runtimes read a ModelOpt FP8 checkpoint, where they differ: which configuration, which exclusions, which names.

One class of rules a runtime, applied to the modules that an architecture has (`architectures.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from bitladder.runtimes.architectures import Architecture


@dataclass(frozen=True)
class RuntimeLayer:
    """One linear of a runtime, under its name there, and the modules of the architecture that are fused in it.

    `shards` are the runtime's names of all modules that could be in it, and `packed` whether vLLM's quantisation knows
    them; see `models.fusing.Layer`.
    """

    name: str
    modules: tuple[str, ...]
    shards: tuple[str, ...] = ()
    packed: bool = True


@dataclass(frozen=True)
class Decision:
    """What the exclusions make of a layer, and which of them hit it."""

    outcome: Literal["quantised", "excluded", "mixed"]
    patterns: tuple[str, ...] = ()


class Rules(ABC):
    """How one runtime reads a ModelOpt checkpoint, where runtimes differ."""

    runtime: ClassVar[str]
    version: ClassVar[str]
    fp8_method: ClassVar[str]
    other_method: ClassVar[str] = "UnquantizedLinearMethod"
    legacy_first: ClassVar[bool] = False  # whether hf_quant_config.json wins over config.json
    kernel_multiple: ClassVar[int | None] = None  # of a layer's two dimensions; None: any will do
    known_algorithms: ClassVar[frozenset[str]]  # besides FP8 with one scale a tensor

    def __init__(self, need: Architecture, excludes: Sequence[str]) -> None:
        self.need = need
        self.written = {pattern: exclude for exclude in excludes for pattern in self.mapped(exclude)}
        self.patterns = tuple(self.written)
        self.wild = frozenset(pattern for pattern in self.patterns if any(mark in pattern for mark in "*?["))

    @classmethod
    @abstractmethod
    def algorithm(cls, name: str | None) -> str | None:
        """Return the runtime's reading of `quant_algo`; None: it refuses."""

    @classmethod
    def reproduced(cls, need: Architecture) -> bool:
        """Return whether the runtime's names of this architecture's modules are known here.

        Those of a language model are as the checkpoint spells them; where it is a part of a whole, runtimes differ.
        """
        return need.known or not need.multimodal

    def mapped(self, exclude: str) -> tuple[str, ...]:
        """Return what the runtime makes of one exclusion before it matches."""
        return (exclude,)

    def name(self, module: str) -> str:
        """Return the runtime's name of a module, fused ones apart."""
        return module

    def never_quantised(self, module: str) -> bool:
        """Return whether the runtime keeps a module in 16 bits, whatever the configuration says."""
        return False

    @abstractmethod
    def decide(self, layer: RuntimeLayer) -> Decision:
        """Return what the exclusions make of a layer."""

    @abstractmethod
    def hits(self, pattern: str, name: str) -> bool:
        """Return whether a mapped exclusion hits a module or layer under its name in the runtime."""

    def exact(self, pattern: str, layer: RuntimeLayer) -> bool:
        """Return whether an exclusion is just the name of a layer, or of a module in it, as checkpoints spell it."""
        written = self.need.rename(f"{self.written[pattern]}.").removesuffix(".")
        return written in layer.modules or pattern == layer.name

    @cached_property
    def layers(self) -> tuple[RuntimeLayer, ...]:
        """The linears of the runtime's model."""
        module_of = {self.name(module): module for module in self.need.linears}
        return tuple(
            RuntimeLayer(layer.name, tuple(module_of[name] for name in layer.modules), layer.shards, layer.packed)
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

    def _hits_any(self, pattern: str, names: set[str]) -> bool:
        return any(self.hits(pattern, name) for name in names)
