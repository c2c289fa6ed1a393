"""What runtimes need of an architecture's files, and what families of architectures are described by.

Names are those of vLLM's modules, fused ones apart: `language_model.model.layers.0.self_attn.q_proj`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitladder.models.fusing import Fusing

Shape = tuple[int | None, ...]  # None: not derivable from the configuration


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a configuration, empty where there is none."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}


@dataclass
class Architecture:
    """What a model needs, under vLLM's names of its modules, fused ones apart.

    Attributes:
        renames: prefixes of tensor names in checkpoints -> in vLLM, tried in order.
        text, vision, head: prefixes of the language model's layers, of what sees, and the output matrix's name.
        known: False: nothing but what the files hold is known.
        tensors: name -> shape, without scales.
        linears: names of the linears among them, without `.weight`.
        open_prefixes: parts of which nothing is derived here.
        tied: whether the output matrix is the embedding.
        multimodal: whether the language model is one of several parts.
        fusing: what runtimes fuse in it.
    """

    renames: tuple[tuple[str, str], ...] = ()
    text: str = "model."
    vision: str | None = None
    head: str = "lm_head"
    known: bool = True
    tensors: dict[str, Shape] = field(default_factory=dict)
    linears: list[str] = field(default_factory=list)
    open_prefixes: tuple[str, ...] = ()
    tied: bool = False
    multimodal: bool = False
    fusing: Fusing = field(default_factory=Fusing.usual)

    def rename(self, name: str) -> str:
        """Return vLLM's name of a checkpoint's tensor or module.

        Source: vllm model_executor/models/utils.py, WeightsMapper: prefixes are replaced one after the other.
        """
        for old, new in self.renames:
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return name

    def add(self, name: str, *shape: int | None) -> None:
        """Add a tensor."""
        self.tensors[name] = shape

    def linear(self, name: str, out_features: int | None, in_features: int | None, bias: bool) -> None:
        """Add a linear's weight, [out_features, in_features], and its bias."""
        self.linears.append(name)
        self.add(f"{name}.weight", out_features, in_features)
        if bias:
            self.add(f"{name}.bias", out_features)


def number(section: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of `names` that is a whole number; None: none is, so it can't be checked."""
    return next((section[name] for name in names if isinstance(section.get(name), int)), None)


def product(*factors: float | None) -> int | None:
    """Return the product, cut to a whole number; None: a factor isn't known."""
    numbers = [factor for factor in factors if factor is not None]
    return int(math.prod(numbers)) if len(numbers) == len(factors) else None


def highest(tensors: Iterable[str], prefix: str) -> int:
    """Return how many layers the tensors below `prefix` have."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for name in tensors if (match := pattern.match(name))), default=0)


@dataclass(frozen=True)
class TextKind:
    """How the language models that are known differ."""

    qkv_bias: bool | None  # None: the configuration's attention_bias, which then covers o_proj too
    qk_norm: bool = False
    head_dim: int | None = None  # where the configuration names none; None: hidden size / heads


@dataclass(frozen=True)
class Family:
    """What models with the same name in `architectures` have in common.

    Attributes:
        text_kind: of `causal.TEXT_KINDS`; None: the language model's own model_type.
        add_vision: adds what sees, given the whole configuration and the stored names.
        renames, text, vision, head, open_prefixes: see `Architecture`.
    """

    text_kind: str | None
    add_vision: Callable[[Architecture, Mapping[str, Any], Iterable[str]], None] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    text: str = "model."
    vision: str | None = None
    head: str = "lm_head"
    open_prefixes: tuple[str, ...] = ()


def vision_language(
    text_kind: str | None,
    add_vision: Callable[[Architecture, Mapping[str, Any], Iterable[str]], None],
    renames: tuple[tuple[str, str], ...],
    vision: str = "visual.",
    open_prefixes: tuple[str, ...] = (),
) -> Family:
    """Return the family of models in which vLLM calls the language model `language_model`."""
    return Family(
        text_kind, add_vision, renames, "language_model.model.", vision, "language_model.lm_head", open_prefixes
    )
